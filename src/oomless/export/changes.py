"""What training changed of one parameter, applied to it in fp32 and rounded once, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oomless.errors import ModelError

_NUMBERS_AT_ONCE = 1 << 24


class Change(Protocol):
    """What training changed of one parameter."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether it is of a parameter of ``shape``."""

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """Return the parameter that ``read`` gives, as it is after training, in ``dtype``."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """The parameter was trained whole."""

    new: Callable[[], Tensor]

    def fits(self, shape: tuple[int, ...]) -> bool:  # noqa: D102
        return tuple(self.new().shape) == shape

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.new().to(dtype)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of its rows were trained."""

    ids: Tensor
    new: Callable[[], Tensor]

    def fits(self, shape: tuple[int, ...]) -> bool:  # noqa: D102
        return tuple(self.new().shape) == (len(self.ids), *shape[1:]) and int(self.ids.max()) < shape[0]

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:  # noqa: D102
        matrix = read()
        matrix = matrix.clone() if matrix.dtype == dtype else matrix.to(dtype)
        return matrix.index_copy_(0, self.ids, self.new().to(dtype))


@dataclass(frozen=True, slots=True)
class Added:
    """A vector times ``scale`` is added to it, as it is or as it was ``trained`` itself."""

    new: Callable[[], Tensor]
    scale: float
    trained: Change | None

    def fits(self, shape: tuple[int, ...]) -> bool:  # noqa: D102
        return tuple(self.new().shape) == shape and (self.trained is None or self.trained.fits(shape))

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:  # noqa: D102
        vector = read().float() if self.trained is None else self.trained.of(read, torch.float32)
        return (vector + self.new().float() * self.scale).to(dtype)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product of two thin matrices is added: ``scale * b @ a``, [out, in], to a matrix that may lie [in, out]."""

    a: Callable[[], Tensor]
    """[rank, in]."""

    b: Callable[[], Tensor]
    """[out, rank]."""

    scale: float
    transposed: bool = False
    magnitude: Callable[[], Tensor] | None = None
    """DoRA's: what the norm of each row of [out, in] is made."""

    begun: str | None = None
    """How the adapter began, where it took what it began with off the matrix (peft's ``init_lora_weights``)."""

    def fits(self, shape: tuple[int, ...]) -> bool:  # noqa: D102
        (rank, inputs), (outputs, same) = self.a().shape, self.b().shape
        return rank == same and shape == ((inputs, outputs) if self.transposed else (outputs, inputs))

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:  # noqa: D102
        matrix, a, b = read(), self.a().float(), self.b().float()
        if self.begun is not None:
            matrix = _less_its_beginning(matrix, len(a), self.scale, self.transposed, self.begun)
        return low_rank(matrix, a, b, self.scale, self.transposed, self.magnitude, dtype)


def _less_its_beginning(matrix: Tensor, rank: int, scale: float, transposed: bool, begun: str) -> Tensor:
    """Return what peft leaves of ``matrix`` when it loads an adapter that began as ``begun``: it does so, to this matrix alone."""
    from peft import LoraConfig, inject_adapter_in_model

    layer = nn.Linear(1, 1, bias=False, device="meta")
    whole = matrix.t() if transposed else matrix
    layer.out_features, layer.in_features = whole.shape
    layer.weight = nn.Parameter(whole.to(torch.float32, copy=True), requires_grad=False)
    holder = nn.ModuleDict({"layer": layer})
    alpha: Any = scale * rank
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=begun)
    inject_adapter_in_model(settings, holder)
    left: Tensor = layer.weight.detach()
    return left.t() if transposed else left


def low_rank(
    matrix: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    transposed: bool,
    magnitude: Callable[[], Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``matrix`` with the product added, as ``LowRank`` says."""
    merged = torch.empty(matrix.shape, dtype=dtype)
    base, target = (matrix.t(), merged.t()) if transposed else (matrix, merged)
    norms = None if magnitude is None else magnitude().float().reshape(-1, 1)
    for rows in blocks(*base.shape):
        changed = torch.addmm(base[rows].float(), b[rows], a, alpha=scale)
        if norms is not None:
            changed *= norms[rows] / changed.norm(dim=1, keepdim=True)
        target[rows] = changed.to(dtype)
    return merged


def require_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Check that ``dtype`` reaches as far as the numbers of ``tensor``, the one called ``name``.

    Raises:
        ModelError: it does not.
    """
    largest = float(tensor.abs().max()) if dtype == torch.float16 and tensor.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:
        raise ModelError(f"{name} has numbers that fp16 does not hold (up to 65504): use --dtype bf16")


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of ``rows``, each of few enough to be held in fp32 beside the rest."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, columns))
    return (slice(first, min(rows, first + step)) for first in range(0, rows, step))
