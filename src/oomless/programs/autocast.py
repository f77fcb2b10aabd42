"""Automatic casting as CUDA does it (``torch.autocast``), for tensors that torch's own dispatcher does not take for CUDA's.

Which functions run in the lower precision and which in fp32 is torch's list for CUDA. Copies of leaf weights are kept until the
outermost region ends, as torch keeps them: they are memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def _named(*names: str) -> set[Any]:
    owners = (torch, Tensor, F, torch._C._nn, torch.linalg)
    return {getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)}


LOWER = frozenset(
    _named(
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addbmm",
        "baddbmm",
        "addmv",
        "addr",
    )
    | _named(
        "einsum", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "prelu", "chain_matmul", "multi_dot", "bilinear"
    )
    | _named("scaled_dot_product_attention")
)
FP32 = frozenset(
    _named("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "softmin", "cross_entropy", "nll_loss")
    | _named(
        "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cosine_embedding_loss", "binary_cross_entropy_with_logits"
    )
    | _named(
        "exp", "expm1", "log", "log10", "log2", "log1p", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "norm"
    )
    | _named(
        "sum", "prod", "cumsum", "cumprod", "logsumexp", "cosine_similarity", "softplus", "acos", "asin", "cosh", "sinh"
    )
    | _named("tan", "erfinv", "dist", "cdist", "renorm", "vector_norm")
)


class Casting:
    """Whether and to what ``torch.autocast("cuda")`` casts at this moment."""

    def __init__(self) -> None:
        self.enabled, self.dtype = False, torch.float16
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def cast(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], on_gpu: Callable[[Tensor], bool]) -> Any:
        """Return ``args`` and ``kwargs`` as CUDA's autocast gives them to ``func``."""
        wanted = self.dtype if func in LOWER else torch.float32 if func in FP32 else None
        if wanted is None or (wanted is torch.float32 and kwargs.get("dtype") is not None):
            return args, kwargs

        def to_wanted(tensor: Tensor) -> Tensor:
            floats = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
            if not floats or tensor.dtype is wanted or not on_gpu(tensor):
                return tensor
            if not (tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32):
                return tensor.to(wanted)
            if id(tensor) not in self._cache:
                self._cache[id(tensor)] = (tensor, tensor.to(wanted))
            return self._cache[id(tensor)][1]

        return pytree.tree_map_only(Tensor, to_wanted, (tuple(args), kwargs))

    def changes(self) -> list[tuple[Any, str, Any]]:
        """Return what of torch asks and sets the state of casting for CUDA."""
        before = {
            name: getattr(torch, name)
            for name in (
                "is_autocast_enabled",
                "set_autocast_enabled",
                "get_autocast_dtype",
                "set_autocast_dtype",
                "clear_autocast_cache",
            )
        }

        def is_enabled(device_type: str = "cuda") -> bool:
            return self.enabled if device_type == "cuda" else before["is_autocast_enabled"](device_type)

        def set_enabled(*given: Any) -> None:
            if len(given) == 2 and given[0] != "cuda":
                before["set_autocast_enabled"](*given)
            else:
                self.enabled = bool(given[-1])

        def get_dtype(device_type: str) -> torch.dtype:
            return self.dtype if device_type == "cuda" else before["get_autocast_dtype"](device_type)

        def set_dtype(device_type: str, dtype: torch.dtype) -> None:
            if device_type == "cuda":
                self.dtype = dtype
            else:
                before["set_autocast_dtype"](device_type, dtype)

        def clear() -> None:
            self._cache.clear()
            before["clear_autocast_cache"]()

        return [
            (torch, "is_autocast_enabled", is_enabled),
            (torch, "set_autocast_enabled", set_enabled),
            (torch, "get_autocast_dtype", get_dtype),
            (torch, "set_autocast_dtype", set_dtype),
            (torch, "get_autocast_gpu_dtype", lambda: self.dtype),
            (torch, "set_autocast_gpu_dtype", lambda dtype: set_dtype("cuda", dtype)),
            (torch, "clear_autocast_cache", clear),
            (torch.amp.autocast_mode, "is_autocast_available", lambda device_type: True),
        ]
