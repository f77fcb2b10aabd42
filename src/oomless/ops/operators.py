"""Operators of oomless' own: a Triton kernel on a GPU, its plain form on a CPU, and a fake form for a rehearsal.

On a virtual GPU, whose tensors lie on the CPU, the plain form stands for the kernel: the books see what the kernel asks for, which
is what the operator returns. A rehearsal counts an operator by its schema: what is read, and what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SMALLEST_CAPABILITY = (7, 5)
"""Triton makes no kernels for older GPUs."""

SCRATCH: dict[Any, Callable[..., Sequence[int]]] = {}
"""What an operator's kernel takes on the GPU for itself until it ends, once its results are there: bytes by request, from its arguments."""

_LIBRARY: Any = torch.library.Library("oomless", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(
    name: str,
    schema: str,
    on_cpu: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    *,
    kernels: str,
    scratch: Callable[..., Sequence[int]] | None = None,
) -> Callable[..., Any]:
    """Register the operator whose kernel is the function ``name`` of the module ``kernels``, and return it.

    ``on_cpu`` does what the kernel does, ``fake`` makes what it returns; by default that is nothing.
    ``scratch`` is for ``SCRATCH``.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, _on_gpu(name, kernels), "CUDA")
    torch.library.register_fake(f"oomless::{name}", fake or _asks_for_nothing, lib=_LIBRARY)
    registered: Callable[..., Any] = getattr(torch.ops.oomless, name).default
    if scratch is not None:
        SCRATCH[registered] = scratch
    return registered


def _on_gpu(name: str, kernels: str) -> Callable[..., Any]:
    def launch(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.cuda.device(first.device):
            return getattr(import_module(kernels), name)(first, *arguments, **keywords)

    return launch


def _asks_for_nothing(*_: Any, **__: Any) -> None:
    pass
