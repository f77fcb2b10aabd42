"""Products of 16-bit tensors on a CPU as a GPU's tensor cores make them: fp32 inside, rounded once.

A CPU without 16-bit arithmetic of its own takes up to nine times as long for a 16-bit product as for one in fp32, and some of its
kernels round on the way. Under this mode matrix products and attention of 16-bit tensors are computed in fp32 from the same
16-bit values, and their results rounded to 16 bits. Everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
INTO_NEW = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
INTO_OUT = {
    aten.mm.out: aten.mm.default,
    aten.addmm.out: aten.addmm.default,
    aten.bmm.out: aten.bmm.default,
    aten.baddbmm.out: aten.baddbmm.default,
}
INTO_SELF = {aten.addmm_.default: aten.addmm.default, aten.baddbmm_.default: aten.baddbmm.default}


class TensorCores(TorchDispatchMode):
    """Makes the products of 16-bit tensors in fp32, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        known = func in INTO_NEW or func in INTO_OUT or func in INTO_SELF
        if not known or args[0].dtype not in SIXTEEN_BITS:
            return func(*args, **keywords)
        self.products += 1
        dtype, out = args[0].dtype, args[0] if func in INTO_SELF else keywords.pop("out", None)
        compute = INTO_OUT.get(func) or INTO_SELF.get(func) or func
        result = compute(*tree_map(_widened, args), **tree_map(_widened, keywords))
        if out is not None:
            return out.copy_(result)
        if isinstance(result, Tensor):
            return result.to(dtype)
        return _attention_results(func, result, dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in SIXTEEN_BITS else value


def _attention_results(func: Any, results: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Round what the native kernel rounds: the output or the gradients, not the softmax's denominators."""
    rounded = 1 if func is aten._scaled_dot_product_flash_attention_for_cpu.default else len(results)
    return tuple(result.to(dtype) if place < rounded else result for place, result in enumerate(results))
