"""What DeepSpeed's ZeRO holds of a training on one of its GPUs, as its source asks for it (0.19: deepspeed/runtime/zero).

Weights and gradients are in 16 bits. N trained parameters are shared out among the GPUs, P = N / GPUs to each. A GPU holds a copy of its
part in fp32 and AdamW's two moments of it, 12 P bytes, unless they are offloaded. Gradients go through a bucket of
``reduce_bucket_size`` numbers, two where sending overlaps; stage 1 keeps all of them to the step, stages 2 and 3 those of the part alone. In
the step the part's gradients exist in 16 bits once more and then in fp32. Stage 3 has its part of the weights, and gathers layers.

What is left out: how long stage 3 keeps what it gathered (``stage3_max_live_parameters``), and parameters too small to be cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oomless.memory.device import Device

SUB_GROUP = 1_000_000_000
"""Numbers that stage 3 updates at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """How DeepSpeed shares a training out."""

    stage: int
    gpus: int
    bucket: int
    """Numbers in a bucket of gradients."""

    offloads: bool = False
    """Whether the optimizer's state lies in the host's memory."""

    @property
    def overlaps(self) -> bool:
        """Whether sending overlaps with computing, as it does in stage 3 where it is not told."""
        return self.stage == 3


@dataclass(kw_only=True, slots=True)
class Part:
    """The part of the optimizer's work that this GPU does."""

    zero: Zero
    trained: list[nn.Parameter]
    device: Device
    masters: list[nn.Parameter] = field(default_factory=list)
    """The copies in fp32, as flat as DeepSpeed makes them; none where they are offloaded."""

    gradients: Tensor | None = None
    buckets: list[Tensor] = field(default_factory=list)

    def build(self) -> None:
        """Hold what lies there before the first step."""
        if self.zero.offloads:
            return
        left = self.count
        while left > 0:
            size = min(left, SUB_GROUP) if self.zero.stage == 3 else left
            self.masters.append(nn.Parameter(self._empty(size, torch.float32, "optimizer state")))
            left -= size
        zeros = self._empty(max(m.numel() for m in self.masters), torch.float32, "gradients")
        del zeros  # the gradients under which the optimizer makes its state

    @property
    def count(self) -> int:
        """Return how many numbers are this GPU's."""
        return -(-sum(parameter.numel() for parameter in self.trained) // self.zero.gpus)

    def listen(self) -> None:
        """Take each gradient as soon as it is there, in stage 2."""
        if self.zero.stage == 2:
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(self._taken)  # type: ignore[no-untyped-call]

    def _taken(self, parameter: Tensor) -> None:
        if self.gradients is None and not self.zero.offloads:
            self.gradients = self._empty(self.count, parameter.dtype, "gradients")
        parameter.grad = None

    def before_backward(self) -> None:
        """Hold the buckets."""
        if not self.buckets:
            dtype = self.trained[0].dtype
            self.buckets = [
                self._empty(self.zero.bucket, dtype, "gradients") for _ in range(2 if self.zero.overlaps else 1)
            ]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the part, and leave no gradient behind but those that stage 3 keeps room for."""
        if self.zero.stage < 3:
            self.buckets = []
        for master in self.masters:
            flat = self._empty(master.numel(), self.trained[0].dtype, "gradients")
            master.grad = self._empty(master.numel(), torch.float32, "gradients")
            del flat
            self._forget()
            optimizer.step()
            master.grad = None

    def _forget(self) -> None:
        """Drop the gradients, but those that stage 3 keeps room for."""
        if self.zero.stage == 3:
            return
        self.gradients = None
        for parameter in self.trained:
            parameter.grad = None

    def _empty(self, count: int, dtype: torch.dtype, category: Any) -> Tensor:
        made = torch.empty(count, dtype=dtype, device=self.device.torch_device)
        self.device.label([made], category)
        return made
