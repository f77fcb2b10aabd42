"""Adafactor (Shazeer and Stern, 2018): the second moment of a matrix as one row and one column, and no first.

    R ← β·R + (1−β)·mean over columns of (g² + ε1)      C ← β·C + (1−β)·mean over rows of (g² + ε1)
    V = R·Cᵀ / mean(R)       U = g/√V       U ← U / max(1, RMS(U)/d)       w ← (1 − lr·λ)·w − α·U

with β = 1 − t^(−0.8). α is ``lr``, or with ``relative_step`` max(ε2, RMS(w)) · min(lr, 1/√t). A tensor of one
dimension keeps its whole second moment; one of three or more is a matrix of its last dimension.

State: 4·(rows + columns) bytes for a matrix, 4 a parameter for a vector; plus that of the weight's precision
and 4 for the step counter. No parameter-sized state at all makes this the leanest optimizer for sixteen-bit
weights.

Written anew because torch's reads two numbers back from the device for each parameter and step, holds the
whole update, and has neither sixteen-bit precision nor an overflow flag. Here the update is never held: the
gradient is read three times (for R and C, for RMS(U), for the update), each time in slices of whole rows.
Clipping U by its RMS bounds every update, so that clipping by the global norm, which a fused backward pass
cannot do, is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oomless.optim.base import (
    DEFAULT_SLICE_BYTES,
    SCALAR_BYTES,
    Group,
    MemoryLeanOptimizer,
    Parameters,
    State,
    require_range,
    store_unless,
    weight_precision_of,
    weight_state_slice,
)
from oomless.optim.fused import TILE, Terms, operator
from oomless.optim.noise import noise_key
from oomless.optim.offload import HostMemory
from oomless.optim.scaled import kept, row_slices, subtract_scaled


class Adafactor(MemoryLeanOptimizer):
    """Adafactor without momentum. Further arguments: see ``MemoryLeanOptimizer``.

    Slices are two rows at least, also where that is more than ``slice_bytes``.

    Args:
        lr: the step size; with ``relative_step`` its upper bound.
        eps: added to squared gradients; lower bound of RMS(w) for ``relative_step``.
        decay: exponent of the second moment's memory, below 0.
        clip_threshold: d, the largest RMS of an update before ``lr``.
        relative_step: scale steps by RMS(w) and min(lr, 1/√t), as the paper and ``torch.optim.Adafactor``.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-2,
        eps: tuple[float, float] = (1e-30, 1e-3),
        decay: float = -0.8,
        clip_threshold: float = 1.0,
        relative_step: bool = False,
        weight_decay: float = 0.0,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "decay": decay,
            "clip_threshold": clip_threshold,
            "relative_step": relative_step,
            "weight_decay": weight_decay,
        }
        super().__init__(
            parameters,
            defaults,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if not isinstance(group["eps"], tuple | list) or len(group["eps"]) != 2:
            raise ValueError(f"Adafactor's eps is a pair (of g², of RMS(w)); got {group['eps']!r}")
        require_range("eps[0]", group["eps"][0], 0.0)
        require_range("eps[1]", group["eps"][1], 0.0)
        require_range("-decay", -group["decay"], 0.0, 1.0)
        require_range("clip_threshold", group["clip_threshold"], 1e-6)

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        if parameter.dim() < 2:
            return {"second_moment": torch.zeros_like(parameter, dtype=torch.float32)}
        rows, columns = parameter.numel() // parameter.shape[-1], parameter.shape[-1]
        return {
            "row_moment": torch.zeros(rows, dtype=torch.float32, device=parameter.device),
            "column_moment": torch.zeros(columns, dtype=torch.float32, device=parameter.device),
        }

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        precision = weight_precision_of(parameter, group)
        rows = gradient.view(-1, gradient.shape[-1]) if gradient.dim() > 1 else gradient.view(-1, 1)
        weights = parameter.view(rows.shape)
        fused = self.fused and gradient.dim() > 1
        update_bytes = max(precision.value_bytes + 4, precision.peak_bytes, 8 if gradient.dim() < 2 else 0)
        update_bytes = (1 if fused else update_bytes) + self._staged_bytes(parameter)
        vector_bytes = 16 * sum(rows.shape) if rows.shape[1] > 1 else 0
        pieces = list(row_slices(rows, update_bytes, self.slice_bytes - SCALAR_BYTES - vector_bytes))
        self._update_moments(rows, pieces, group, state, gradient_scale, found_inf, fused)
        factors = _factors(state) if fused else None
        if factors is not None:
            squares = [_LENGTH(rows[piece], factors[0][piece], factors[1]).sum() for piece in pieces]
        else:
            squares = [_direction(rows, piece, state).square_().sum() for piece in pieces]
        rms = (torch.stack(squares).sum() / rows.numel()).sqrt()
        step_size = self._step_size(weights, pieces, group, state)
        if gradient_scale is not None:
            rms, step_size = rms * gradient_scale, step_size * gradient_scale
        step_size = step_size / (rms / group["clip_threshold"]).clamp(min=1.0)
        keep = 1.0 - group["lr"] * group["weight_decay"]
        flats = (slice(piece.start * rows.shape[1], piece.stop * rows.shape[1]) for piece in pieces)
        with_state = self._with_state(parameter, state, flats, weight_state_slice)
        noise = self._noise_constants(parameter, group)
        if factors is not None:
            terms = Terms(
                precision=precision, rates=(), step=state["step"], scale=None, found_inf=found_inf, noise=noise
            )
            subtract_scaled(weights, rows, factors, step_size, keep, with_state, terms, fused=True)
            return
        key = None if noise is None else noise_key(noise, state["step"])
        for piece, (flat, part) in zip(pieces, with_state, strict=True):
            value = precision.read(weights[piece].view(-1), part)
            update = _direction(rows, piece, state).mul_(step_size).view(-1)
            if found_inf is not None:
                update.masked_fill_(found_inf.bool(), 0.0)
            value.mul_(kept(keep, found_inf)).sub_(update)
            del update
            precision.write(weights[piece].view(-1), part, value, key, flat.start)

    def _update_moments(
        self,
        rows: Tensor,
        pieces: list[slice],
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
        fused: bool,
    ) -> None:
        fresh = state["step"].pow(group["decay"])
        squared_scale = 1.0 if gradient_scale is None else gradient_scale.square()
        if "second_moment" in state:
            moment = state["second_moment"].view(-1, 1)
            for piece in pieces:
                squares = rows[piece].float().square().mul_(squared_scale).add_(group["eps"][0])
                store_unless(found_inf, moment[piece], torch.lerp(moment[piece], squares, fresh))
            return
        row_squares = torch.empty_like(state["row_moment"])
        column_squares = torch.zeros_like(state["column_moment"])
        for piece in pieces:
            if fused:
                of_rows, of_columns = _SQUARES(rows[piece])
                row_squares[piece] = of_rows.sum(1)
                column_squares += of_columns.sum(0)
                continue
            # Norms read sixteen-bit gradients into fp32 sums without a copy of them on a GPU.
            norm = torch.linalg.vector_norm(rows[piece], dim=1, dtype=torch.float32)
            row_squares[piece] = norm.square_()
            norm = torch.linalg.vector_norm(rows[piece], dim=0, dtype=torch.float32)
            column_squares += norm.square_()
        for name, squares, count in (
            ("row_moment", row_squares, rows.shape[1]),
            ("column_moment", column_squares, rows.shape[0]),
        ):
            squares.mul_(squared_scale).div_(count).add_(group["eps"][0])
            store_unless(found_inf, state[name], torch.lerp(state[name], squares, fresh))

    def _step_size(self, weights: Tensor, pieces: list[slice], group: Group, state: State) -> Tensor:
        """Return α before clipping: 0-dim fp32."""
        if not group["relative_step"]:
            return torch.full_like(state["step"], group["lr"])
        norms = [torch.linalg.vector_norm(weights[piece], dtype=torch.float32) for piece in pieces]
        rms = torch.linalg.vector_norm(torch.stack(norms)) / weights.numel() ** 0.5
        bounded: Tensor = state["step"].rsqrt().clamp(max=group["lr"]) * rms.clamp(min=group["eps"][1])
        return bounded


def _direction(rows: Tensor, piece: slice, state: State) -> Tensor:
    """Return U = g/√V of some rows in a new fp32 tensor, before clipping, from the gradient as stored."""
    if "second_moment" in state:
        return state["second_moment"].view(-1, 1)[piece].rsqrt().mul_(rows[piece])
    row, column = state["row_moment"], state["column_moment"]
    return (rows[piece] * column.rsqrt()).mul_((row.mean() / row[piece]).sqrt()[:, None])


# -- a matrix in three kernels, each of which reads the gradient once: for R and C, for RMS(U), for the update -----------


def _factors(state: State) -> tuple[Tensor, Tensor]:
    """Return what each row and each column of the gradient is multiplied by in U."""
    row, column = state["row_moment"], state["column_moment"]
    return (row.mean() / row).sqrt_(), column.rsqrt()


def _no_sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squares of parts of rows and of columns, all zero: a part is what one program of the kernel sees."""
    rows, columns = gradient.shape
    return (
        gradient.new_zeros((rows, -(-columns // TILE)), dtype=torch.float32),
        gradient.new_zeros((-(-rows // TILE), columns), dtype=torch.float32),
    )


def _squares(gradient: Tensor) -> tuple[Tensor, Tensor]:
    of_rows, of_columns = _no_sums(gradient)
    of_rows[:, 0] = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32).square_()
    of_columns[0] = torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float32).square_()
    return of_rows, of_columns


def _length(gradient: Tensor, row_factor: Tensor, column_factor: Tensor) -> Tensor:
    sums = _no_lengths(gradient, row_factor, column_factor)
    sums[0, 0] = (gradient * column_factor).mul_(row_factor[:, None]).square_().sum()
    return sums


def _no_lengths(gradient: Tensor, row_factor: Tensor, column_factor: Tensor) -> Tensor:
    rows, columns = gradient.shape
    return row_factor.new_zeros((-(-rows // TILE), -(-columns // TILE)))


_SQUARES = operator("adafactor_squares", "(Tensor gradient) -> (Tensor, Tensor)", _squares, _no_sums)
_LENGTH = operator(
    "adafactor_length", "(Tensor gradient, Tensor row_factor, Tensor column_factor) -> Tensor", _length, _no_lengths
)
