"""The two passes of a head's loss over a chunk of its logits: one for each token's statistics, one for the gradient.

With x = softcap * tanh(logit_scale * logit / softcap), or logit_scale * logit, the first keeps up for each token over its chunks::

    largest   the largest x                 target    the x of the token that it should predict
    sums      sum of exp(x - largest)       totals    sum of x, where label smoothing asks for it

and the second puts in the place of each logit::

    factor * (height * exp(x - largest) - even - (peak, where it is the target's)) * dx/dlogit

``Fused`` does each in one operator, a Triton kernel on a GPU, that reads every logit once and takes no memory. ``Plain`` is what the
kernels are measured by: it needs room for the chunk in fp32, and for dx/dlogit where there is a cap.

Shapes in names: N tokens, C columns of the chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from oomless.ops import operators


class Statistics(NamedTuple):
    """Of the logits of each token that were seen so far, [N]."""

    largest: Tensor
    sums: Tensor
    target: Tensor
    totals: Tensor | None = None

    @classmethod
    def none_yet(cls, like_N: Tensor, *, totals: bool) -> Statistics:
        """Return those of no logits, in the dtype of ``like_N``."""
        zeros = [torch.zeros_like(like_N) for _ in range(2 + totals)]
        return cls(torch.full_like(like_N, -torch.inf), zeros[0], zeros[1], zeros[2] if totals else None)


class Slopes(NamedTuple):
    """What each token's gradient is made with, [N] and for all tokens."""

    heights: Tensor
    factors: Tensor
    """0 where nothing is predicted."""

    peak: float
    even: float


class Plain:
    """Both passes in PyTorch's operators.

    Args:
        room: for the logits of the largest chunk, flat, in the head's dtype.
        softcap: of the logits, or None.
        logit_scale: what multiplies them first.
    """

    def __init__(self, room: Tensor, softcap: float | None, logit_scale: float) -> None:
        exact = exact_dtype(room.dtype)
        self.room, self._softcap, self._logit_scale = room, softcap, logit_scale
        self._full = room if room.dtype == exact else room.new_empty(room.shape, dtype=exact)
        self._slope = torch.empty_like(self._full) if softcap else None

    def statistics(self, logits_NC: Tensor, columns_N: Tensor, seen: Statistics) -> None:
        """Add ``logits_NC`` to ``seen``; a target whose column lies outside of the chunk is in another one."""
        full, _ = self._final(logits_NC)
        places, inside = _places(columns_N, full)
        seen.target.add_(full.gather(1, places)[:, 0] * inside)
        if seen.totals is not None:
            seen.totals.add_(full.sum(dim=1))
        larger = torch.maximum(seen.largest, full.amax(dim=1))
        seen.sums.mul_((seen.largest - larger).exp_()).add_(full.sub_(larger[:, None]).exp_().sum(dim=1))
        seen.largest.copy_(larger)

    def gradient(
        self, logits_NC: Tensor, columns_N: Tensor, largest_N: Tensor, slopes: Slopes, *, just_seen: bool
    ) -> Tensor | None:
        """Put the gradient in the place of ``logits_NC``, ``just_seen``: which were all that ``statistics`` was given, and last.

        Returns:
            What each token's is yet to be multiplied by [N, 1], as a product's smaller side is multiplied sooner; or None. In 16
            bits it is multiplied before it is rounded.
        """
        if just_seen:
            full, slope = self._views(logits_NC)
        else:
            full, slope = self._final(logits_NC)
            full.sub_(largest_N[:, None]).exp_()
        whole, share = (slopes.factors * slopes.heights)[:, None], slopes.factors
        later = just_seen and full.dtype == logits_NC.dtype
        if later:
            share = 1 / slopes.heights
        else:
            full.mul_(whole)
        places, inside = _places(columns_N, full)
        full.scatter_add_(1, places, (share * inside * -slopes.peak)[:, None])
        if slopes.even:
            full.sub_((share * slopes.even)[:, None])
        if slope is not None:
            full.mul_(slope)
        if self._logit_scale != 1.0:
            full.mul_(self._logit_scale)
        if full.dtype != logits_NC.dtype:
            logits_NC.copy_(full)
        return whole if later else None

    def _views(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        full, slope = (
            room if room is None else room[: logits.numel()].view(logits.shape) for room in (self._full, self._slope)
        )
        assert full is not None
        return full, slope

    def _final(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and dx/dlogit / logit_scale, in the room for them; in fp32 and fp64 x takes the place of ``logits``."""
        full, slope = self._views(logits)
        if full.dtype != logits.dtype:
            full.copy_(logits)
        if self._logit_scale != 1.0:
            full.mul_(self._logit_scale)
        if self._softcap and slope is not None:
            torch.tanh(full.div_(self._softcap), out=full)
            torch.mul(full, full, out=slope)
            slope.neg_().add_(1)
            full.mul_(self._softcap)
        return full, slope


class Fused:
    """Both passes in an operator each; arguments and methods are those of ``Plain``."""

    def __init__(self, room: Tensor, softcap: float | None, logit_scale: float) -> None:
        self.room, self._final = room, (softcap, logit_scale)

    def statistics(self, logits_NC: Tensor, columns_N: Tensor, seen: Statistics) -> None:
        """Add ``logits_NC``, which stay as they are, to ``seen``."""
        _STATISTICS(logits_NC, columns_N, *seen, *self._final)

    def gradient(
        self, logits_NC: Tensor, columns_N: Tensor, largest_N: Tensor, slopes: Slopes, *, just_seen: bool
    ) -> None:
        """Put the whole gradient in the place of ``logits_NC``."""
        _GRADIENT(logits_NC, columns_N, largest_N, *slopes, *self._final)


Passes = Plain | Fused


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is calculated in where the head is of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def bytes_of_a_logit(dtype: torch.dtype, *, fused: bool, capped: bool) -> int:
    """Return how much room the passes need for each logit of a chunk, itself included."""
    exact = exact_dtype(dtype)
    return dtype.itemsize + (0 if fused else exact.itemsize * ((dtype != exact) + capped))


def try_fused(dtype: torch.dtype, device: torch.device, softcap: float | None, logit_scale: float) -> None:
    """Go over a small chunk in both ways, on ``device``.

    Raises:
        RuntimeError: the results are not the same to rounding. What a compiler raises goes through.
    """
    shape, exact = (5, 5000), exact_dtype(dtype)
    wave = (
        torch.arange(shape[0] * shape[1], dtype=torch.float32, device=device)
        .mul_(0.37)
        .sin_()
        .mul_(9.0)
        .add_(5.0)
        .view(shape)
    )
    columns = torch.tensor([0, 4999, 700, -3, 5000], device=device)
    of_tokens = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.0], device=device, dtype=exact)
    found = []
    for kind in (Fused, Plain):
        logits = wave.to(dtype)
        passes = kind(torch.empty_like(logits).view(-1), softcap, logit_scale)
        seen = Statistics.none_yet(of_tokens, totals=True)
        for _ in range(2):
            passes.statistics(logits.clone(), columns, seen)
        slopes = Slopes(1 / seen.sums, of_tokens, 0.9, 0.1 / shape[1])
        passes.gradient(logits, columns, seen.largest, slopes, just_seen=False)
        found.append((*seen, logits))
    for ours, plain in zip(*found, strict=True):
        rounding = torch.finfo(plain.dtype).eps * (2 if plain.dtype == dtype != exact else 200)
        assert ours is not None
        assert plain is not None
        if not bool(((ours - plain).abs().to(exact) <= plain.abs().to(exact).clamp(min=1e-4) * rounding).all()):
            raise RuntimeError(f"the fused loss of {dtype} differs from its plain form")


def _places(columns: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's column in the chunk [N, 1] (any, where it lies outside), and 1 where it lies inside."""
    inside = (columns >= 0) & (columns < full.shape[1])
    return columns.clamp(0, full.shape[1] - 1)[:, None], inside.to(full.dtype)


# -- the operators of ``Fused``, and what they do on a CPU --------------------------------------------------------------


def _statistics(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    sums: Tensor,
    target: Tensor,
    totals: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    passes = Plain(logits.flatten().clone(), softcap, logit_scale)
    passes.statistics(passes.room.view(logits.shape), columns, Statistics(largest, sums, target, totals))


def _gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    heights: Tensor,
    factors: Tensor,
    peak: float,
    even: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    slopes = Slopes(heights, factors, peak, even)
    Plain(logits.view(-1), softcap, logit_scale).gradient(logits, columns, largest, slopes, just_seen=False)


_operator = partial(operators.operator, kernels="oomless.ops.loss_kernels")
_STATISTICS = _operator(
    "loss_statistics",
    "(Tensor logits, Tensor columns, Tensor(a!) largest, Tensor(b!) sums, Tensor(c!) target, Tensor(d!)? totals, "
    "float? softcap, float logit_scale) -> ()",
    _statistics,
)
_GRADIENT = _operator(
    "loss_gradient",
    "(Tensor(a!) logits, Tensor columns, Tensor largest, Tensor heights, Tensor factors, float peak, float even, "
    "float? softcap, float logit_scale) -> ()",
    _gradient,
)
