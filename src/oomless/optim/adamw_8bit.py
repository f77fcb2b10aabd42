"""AdamW with moments of eight bits: a quarter of the state of ``adamw.py``, the same update.

A slice of the moments is widened to fp32 (``blockwise.py``), updated by the same fused kernel, and coded
again. State, in bytes a parameter: 2.03125 (two codes, two scales per 256), plus that of the weight's
precision and 4 for each tensor's step counter. With bf16 or fp16 weights and ``correction``: weight 2 +
correction 1 + moments 2.03 = 5.03, and 2 more while a gradient exists.

Tensors of fewer than 4,096 elements (norms, biases) keep fp32 moments: they are where few values must stand
for much, and together cost nothing. Temporaries are 14 to 18 bytes an element of a slice. Eager elementwise
passes make a step several times slower than the fp32 one; beside a forward and backward pass over thousands
of tokens it is small.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022; the codes are our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oomless.optim.adamw import AdamW
from oomless.optim.base import Group, State, store_unless
from oomless.optim.blockwise import (
    block_count,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)

SMALLEST_QUANTISED = 4096
"""Tensors of fewer elements keep fp32 moments; for a part of one it is the whole (``whole_numel``) that counts."""


class AdamW8bit(AdamW):
    """AdamW with blockwise 8-bit moments. Arguments: see ``AdamW`` and ``MemoryLeanOptimizer``."""

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        if getattr(parameter, "whole_numel", parameter.numel()) < SMALLEST_QUANTISED:
            return super()._new_moments(parameter, group)
        blocks = block_count(parameter.numel())
        return {
            "first_moment": torch.zeros_like(parameter, dtype=torch.int8),
            "first_moment_scale": torch.zeros(blocks, dtype=torch.float32, device=parameter.device),
            "second_moment": torch.zeros_like(parameter, dtype=torch.uint8),
            "second_moment_scale": torch.zeros(blocks, dtype=torch.float32, device=parameter.device),
        }

    def _moment_bytes(self, state: State) -> int:
        return 14 if "first_moment_scale" in state else 0

    def _read_moments(self, state: State) -> tuple[Tensor, Tensor]:
        if "first_moment_scale" not in state:
            return super()._read_moments(state)
        return (
            decode_signed(state["first_moment"], state["first_moment_scale"]),
            decode_unsigned(state["second_moment"], state["second_moment_scale"]),
        )

    def _write_moments(self, state: State, first: Tensor, second: Tensor, found_inf: Tensor | None) -> None:
        if "first_moment_scale" not in state:
            return
        for name, (codes, scales) in (
            ("first_moment", encode_signed(first)),
            ("second_moment", encode_unsigned(second)),
        ):
            store_unless(found_inf, state[name], codes)
            store_unless(found_inf, state[f"{name}_scale"], scales)
