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

from torch import Tensor

from oomless.optim.adamw import AdamW, is_quantisable, moments_of_8_bits
from oomless.optim.base import Group, State


class AdamW8bit(AdamW):
    """AdamW with blockwise 8-bit moments. Arguments: see ``AdamW`` and ``MemoryLeanOptimizer``."""

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        return moments_of_8_bits(parameter) if is_quantisable(parameter) else super()._new_moments(parameter, group)
