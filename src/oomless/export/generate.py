"""A model that writes: merged as an export merges it, tensor by tensor, on the device; transformers makes the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer, set_seed

from oomless.data.loader import collate
from oomless.data.pack import Block
from oomless.errors import ConfigError, HardwareError
from oomless.export.merged import HOST, Merged
from oomless.memory.device import Device
from oomless.models import attention, build, form
from oomless.models.form import Form
from oomless.models.verify import quiet
from oomless.techniques import lora, sharding, trainable
from oomless.training.guard import is_out_of_memory
from oomless.training.loss import head_loss, hidden_states
from oomless.training.probe import own_attention

OWN = Form(attention=form.OWN_ATTENTION)
_CACHES = ("past_key_values", "cache_params")


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


def ids_of(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tensor:
    """Return the tokens of ``prompt``, [1, T]; in a ``chat`` it is what the user says.

    Raises:
        ConfigError: it has no token, or the tokenizer has no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template: leave --chat out")
    if chat:
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        found = tokenizer(prompt)["input_ids"]
    if not found:
        raise ConfigError("the prompt is empty, and this model's text has no token that begins it: give some text")
    return torch.tensor([found])


class Speaker:
    """The model of ``merged`` on ``device``, inside of whose ``active()`` it is made and used.

    Args:
        merged: the model.
        tokenizer: that of its text.
        device: where it lies; on a fake one nothing is loaded.
        form: how its body is run where its loss is asked for; its text is made with its own attention.
    """

    def __init__(self, merged: Merged, tokenizer: Any, device: Device = HOST, form: Form = OWN) -> None:
        self.tokenizer, self.device = tokenizer, device
        spec = merged.source.base
        self.model = build.build(spec, device=device, dtype=merged.dtype, form=form)
        if trainable.is_tied(self.model) and not trainable.is_tied(merged.model):
            trainable.untie(self.model, device)
        if not device.fake:
            with torch.no_grad():
                for name, tensor in lora.plain_tensors(self.model).items():
                    with device.host():
                        made = merged.tensors[name].make()
                    sharding.fill(tensor, made)
        self.model.eval()
        assert spec.folder is not None
        if (spec.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(spec.folder)

    def go_on(self, ids: Tensor, sampling: Sampling, say: Callable[[str], None] = lambda piece: None) -> str:
        """Return how the text of ``ids``, which lie on the host, goes on; ``say`` is given it as it is made.

        Raises:
            HardwareError: the memory ran out.
        """
        set_seed(sampling.seed)
        streamer = _Streamer(self.tokenizer, say)
        given = self.device.put(ids)
        try:
            with quiet(), torch.no_grad(), own_attention(self.model):
                self.model.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), streamer=streamer, **sampling.settings()
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise HardwareError(
                f"{self.device.name} ran out of memory after {len(streamer.said)} pieces of text: lower --max-new-tokens"
            ) from error
        return "".join(streamer.said)

    @torch.no_grad()
    def loss(
        self, blocks: Iterable[Block], chunk_bytes: int, done: Callable[[], None] = lambda: None
    ) -> tuple[float, int]:
        """Return the mean cross-entropy of ``blocks``, and how many tokens they predict; ``done`` is called after each."""
        total = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        tokens, put = 0, self.device.put
        for block in blocks:
            with self.device.host():
                batch = collate([block])
            packed = attention.packed(self.model, batch.document_lengths, self.device)
            hidden = hidden_states(self.model, put(batch.input_ids), put(batch.position_ids), packed)
            total += head_loss(self.model, hidden, put(batch.labels), 1.0, chunk_bytes)
            tokens += batch.target_count
            done()
        return float(self.device.number(total)) / max(1, tokens), tokens

    @torch.no_grad()
    def rehearse_text(self, prompt: int, new: int) -> int:
        """Return the most that is held while so many tokens follow a prompt of so many, on a fake device."""
        device = self.device
        device.reset_peak()
        with own_attention(self.model):
            self._pass(prompt)
            most = device.usage().peak_allocated_bytes
            if new > 1:
                state = self._pass(prompt + new - 2)
                text = torch.zeros((1, prompt + new - 1), dtype=torch.long)
                device.reset_peak()
                self._pass(1, prompt + new - 2, **state)
                del text
                most = max(most, device.usage().peak_allocated_bytes)
        return most

    def _pass(self, tokens: int, before: int = 0, **state: Any) -> dict[str, Any]:
        """Run so many tokens as ``generate`` does, beyond ``state``, that of those ``before``; return the state after them."""
        takes = inspect.signature(self.model.forward).parameters
        settings: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        if "past_key_values" in takes:  # a state of one size has no use for the mask of what it has seen
            settings["attention_mask"] = torch.ones((1, before + tokens), dtype=torch.long)
        found = self.model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=True, **settings, **state)
        found.logits[:, -1].float()
        return {name: found[name] for name in _CACHES if found.get(name) is not None}


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands each piece of text to a function."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said: list[str] = []
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said.append(text)
        self._say(text)
