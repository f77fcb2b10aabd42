"""Text from what was trained: merged as an export merges it, tensor by tensor, into a model on the host; transformers makes the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from oomless.errors import ConfigError, HardwareError
from oomless.export.hugging_face import tokenizer_of
from oomless.export.merged import HOST, Merged
from oomless.export.source import Source
from oomless.hardware import available_host_bytes
from oomless.models import build, form
from oomless.models.verify import quiet
from oomless.techniques import lora, trainable
from oomless.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How text goes on: the likeliest token each time, or with a ``temperature`` a drawn one."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is at least 1; got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is 0 (the likeliest token) or more; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is above 0 and at most 1; got {self.top_p}")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError("--top-p is for text that is drawn: give --temperature too, such as 0.8")

    def settings(self) -> dict[str, Any]:
        """Return what transformers' ``generate`` is told."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(drawn), **drawn}


class Speaker:
    """The model of ``source`` on the host, its adapters merged.

    Raises:
        HardwareError: the memory that is free does not hold its weights; nothing was loaded.
    """

    def __init__(self, source: Source) -> None:
        merged = Merged(source)
        sizes = [tensor.numel() * tensor.element_size() for tensor in merged.tensors.values()]
        wanted, free = sum(sizes) + 3 * max(sizes), available_host_bytes()
        if wanted > free:
            raise HardwareError(
                f"the weights of {source.name} want {format_bytes(wanted)} of memory; {format_bytes(free)} is free: close "
                "other programs, or take a machine with more"
            )
        spec = source.base
        self.tokenizer = tokenizer_of(source)
        self.model = build.build(spec, device=HOST, dtype=merged.dtype, form=form.Form(attention=form.OWN_ATTENTION))
        if trainable.is_tied(self.model) and not trainable.is_tied(merged.model):
            trainable.untie(self.model, HOST)
        with torch.no_grad():
            for name, tensor in lora.plain_tensors(self.model).items():
                late = merged.tensors[name]
                assert not isinstance(late, torch.Tensor)
                tensor.copy_(late.make())
        self.model.eval()
        assert spec.folder is not None
        if (spec.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(spec.folder)

    def ids(self, prompt: str, *, chat: bool = False) -> torch.Tensor:
        """Return the tokens of ``prompt``, [1, T]; in a ``chat`` it is what the user says.

        Raises:
            ConfigError: it has no token, or the tokenizer has no chat template.
        """
        if chat and not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template: leave --chat out")
        if chat:
            said = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            found = self.tokenizer(prompt)["input_ids"]
        if not found:
            raise ConfigError("the prompt is empty, and this model's text has no token that begins it: give some text")
        return torch.tensor([found])

    def go_on(self, ids: torch.Tensor, sampling: Sampling, say: Callable[[str], None]) -> str:
        """Return how the text of ``ids`` goes on; ``say`` is given it as it is made.

        Raises:
            ConfigError: the text would be longer than the model's positions.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and ids.shape[1] + sampling.max_new_tokens > longest:
            raise ConfigError(
                f"{ids.shape[1]} tokens of the prompt and {sampling.max_new_tokens} new ones are more than the {longest} that the "
                "model was made for: shorten the prompt or --max-new-tokens"
            )
        set_seed(sampling.seed)
        streamer = _Streamer(self.tokenizer, say)
        with quiet(), torch.no_grad():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **sampling.settings()
            )
        return "".join(streamer.said)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands each piece of text to a function."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said: list[str] = []
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said.append(text)
        self._say(text)
