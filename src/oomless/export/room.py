"""What a model that writes will take, rehearsed before it is loaded.

The same model on fake tensors runs the pass over the prompt and the pass for the last new token, which are the ones that hold most, and
blocks of text where their loss is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from oomless.data.pack import Block
from oomless.errors import ConfigError, HardwareError
from oomless.export.generate import OWN, Sampling, Speaker
from oomless.export.merged import HOST, Merged
from oomless.hardware import available_host_bytes
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.blame import blamed
from oomless.models.form import Form
from oomless.models.spec import most_positions
from oomless.units import format_bytes

_NO_END = 1 << 50


class Room:
    """What a model and its text take on ``device``, before anything is loaded; made and asked outside of ``device.active()``.

    Args:
        merged: the model.
        tokenizer: that of its text.
        device: where it shall lie.
        form: as in ``Speaker``.
        prompts: the tokens of each prompt.
        sampling: how they go on.
        blocks: of text whose loss is asked for.
        chunk_bytes: most bytes of logits held at once for that.
    """

    def __init__(
        self,
        merged: Merged,
        tokenizer: Any,
        device: Device = HOST,
        form: Form = OWN,
        *,
        prompts: Sequence[Tensor] = (),
        sampling: Sampling = Sampling(),
        blocks: Sequence[Block] = (),
        chunk_bytes: int = 0,
    ) -> None:
        self.merged, self.device, self.sampling = merged, device, sampling
        self._blocks, self._chunk_bytes = blocks, chunk_bytes
        self.longest = max((ids.shape[1] for ids in prompts), default=0)
        sizes = [tensor.numel() * tensor.element_size() for tensor in merged.tensors.values()]
        self.on_the_way_bytes = 3 * max(sizes)
        self.free_bytes = _free_bytes(device)
        self._virtual = VirtualGPU(_NO_END, fake=True)
        with self._virtual.active():
            self._speaker = Speaker(merged, tokenizer, self._virtual, form)
            self.weights_bytes = self._virtual.usage().allocated_bytes

    @cached_property
    def text_bytes(self) -> int | None:
        """What text takes beyond the weights at most; ``None`` where the model's own code wants to know values."""
        return self._beyond(lambda: self._with(self.longest, self.sampling.max_new_tokens)) if self.longest else 0

    @cached_property
    def blocks_bytes(self) -> int | None:
        """What the loss of a block takes beyond the weights at most; ``None`` as for ``text_bytes``."""
        return self._beyond(self._with_blocks) if self._blocks else 0

    def _beyond(self, most: Callable[[], int]) -> int | None:
        try:
            return most() - self.weights_bytes
        except Exception as error:
            if blamed(error) is None:
                raise
            return None

    def require(self) -> None:
        """Check that all of it has room.

        Raises:
            ConfigError: a text would be longer than the model's positions.
            HardwareError: the memory that is free does not hold it.
        """
        longest, new = self.longest, self.sampling.max_new_tokens
        positions = most_positions(self.merged.model.config)
        if longest and positions and longest + new > positions:
            raise ConfigError(
                f"{longest} tokens of the prompt and {new} new ones are more than the {positions} that the model was made for: "
                "shorten the prompt or --max-new-tokens"
            )
        name, where = self.merged.source.name, self.device.name
        host = self.on_the_way_bytes + (self.weights_bytes if self.device.capacity_bytes is None else 0)
        if host > available_host_bytes():
            raise HardwareError(
                f"loading {name} wants {format_bytes(host)} of the host's memory; {format_bytes(available_host_bytes())} is free: close "
                "other programs, or take a machine with more"
            )
        if self.weights_bytes > self.free_bytes:
            raise HardwareError(
                f"the weights of {name} want {format_bytes(self.weights_bytes)}; {where} has {format_bytes(self.free_bytes)} free: "
                "give --gpu cpu, or take a machine with more"
            )
        left_bytes = self.free_bytes - self.weights_bytes
        left = f"{where} has {format_bytes(left_bytes)} left for it"
        if self.blocks_bytes is not None and self.blocks_bytes > left_bytes:
            raise HardwareError(
                f"the loss of a block of text wants {format_bytes(self.blocks_bytes)} beside the weights of {name}; {left}: compare on "
                "prompts alone with --no-loss"
            )
        if self.text_bytes is None or self.text_bytes <= left_bytes:
            return
        wants = f"a prompt of {longest} tokens and {new} new ones want {format_bytes(self.text_bytes)} beside the weights of {name}"
        fitting = _most(new, lambda count: self._with(longest, count) <= self.free_bytes)
        if fitting:
            raise HardwareError(f"{wants}; {left}: --max-new-tokens {fitting} fits")
        fitting = _most(longest, lambda count: self._with(count, 1) <= self.free_bytes)
        raise HardwareError(f"{wants}; {left}: a prompt of {fitting} tokens fits, with --max-new-tokens 1")

    def _with_blocks(self) -> int:
        with self._virtual.active():
            self._virtual.reset_peak()
            self._speaker.loss(self._blocks, self._chunk_bytes)
            return self._virtual.usage().peak_allocated_bytes

    def _with(self, prompt: int, new: int) -> int:
        with self._virtual.active():
            return self._speaker.rehearse_text(prompt, new)


def _most(above: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number below ``above`` that ``fits``, or one that is at most 2 % smaller; 0 where none does."""
    low, high = 0, above
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _free_bytes(device: Device) -> int:
    """Return what tensors can still take of ``device``."""
    if device.capacity_bytes is None:
        return available_host_bytes()
    if device.torch_device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device.torch_device)
        usage = device.usage()
        return int(free) + usage.reserved_bytes - usage.allocated_bytes
    return device.capacity_bytes - device.usage().allocated_bytes
