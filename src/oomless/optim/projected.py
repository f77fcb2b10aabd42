"""Optimizers whose moments live in a random projection of the gradient: APOLLO, APOLLO-Mini and GaLore.
Experimental.

A gradient matrix G has channels (its longer side, n) of k entries (its shorter side). Each channel is
projected to r numbers, X = G·P with P of shape k × r, and AdamW's moments are kept for X alone: 8·n·r bytes
instead of 8·n·k.

- **APOLLO** (Zhu et al., 2025): the gradient itself is the update, each channel scaled by ‖X̃‖ / ‖X‖, where
  X̃ is Adam's update of X. It learns *how fast* each channel should move, not where to.
- **APOLLO-Mini**: r = 1 and one factor for the whole matrix, times √128.
- **GaLore** (Zhao et al., 2024): the update is X̃·Pᵀ, so that it stays in the subspace until P changes.

P has entries ±1/√r (APOLLO, preserves norms on average) or ±1/√k (GaLore, columns of length 1), drawn anew
every ``refresh_steps`` steps. It is a hash of seed, parameter and period (``noise.py``), so it is not stored,
a resumed run sees the same one, and the period is read from the step counter without asking the device. The
published GaLore takes the singular vectors of G instead; that asks the host when to refresh, and costs a
decomposition. Expect it to learn somewhat better than the random subspace here.

APOLLO limits the growth of the update's norm from step to step to 1 %, as published.

Tensors that are not matrices take plain AdamW. Everything but APOLLO's norm is local to a channel, so slices are
slices of channels (columns of a wide matrix, rows of a tall one). GaLore needs one pass over them. APOLLO needs
two: for the factors and for the update, which goes by rows (``scaled.py``). Temporaries: ``slice_bytes``, or those
of one pair of channels or rows, plus P (4·k·r bytes, and the same while it is drawn) and, with APOLLO, 16 bytes a
channel. Fused updates take only the latter: P is made where it is needed (``projection.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oomless.optim.adamw import AdamW
from oomless.optim.base import (
    DEFAULT_SLICE_BYTES,
    SCALAR_BYTES,
    WEIGHT_STATE_NAMES,
    Group,
    Parameters,
    State,
    require_range,
    store_unless,
    weight_precision_of,
    weight_state_slice,
)
from oomless.optim.fused import Terms
from oomless.optim.noise import noise_constants
from oomless.optim.offload import HostMemory
from oomless.optim.projection import Projection, project, subtract_projected
from oomless.optim.scaled import row_slices, subtract_scaled

_GROWTH_LIMIT = 1.01
_MOMENT_NAMES = frozenset({"projected_first_moment", "projected_second_moment"})


class _Projected(AdamW):
    """Base: moments of a random projection. Further arguments: see ``AdamW`` and ``MemoryLeanOptimizer``.

    Args:
        rank: how many numbers stand for one channel; at most the matrix's shorter side is used.
        refresh_steps: after how many steps a new projection is drawn.
        update_scale: multiplies the update of matrices, beside ``lr``.
    """

    sliced_state = AdamW.sliced_state | _MOMENT_NAMES

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 256,
        refresh_steps: int = 200,
        update_scale: float = 1.0,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        self._projection_defaults: dict[str, Any] = {
            "rank": rank,
            "refresh_steps": refresh_steps,
            "update_scale": update_scale,
        }
        super().__init__(
            parameters,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )

    def _extra_defaults(self) -> dict[str, Any]:
        return self._projection_defaults

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        require_range("rank", group["rank"], 1)
        require_range("refresh_steps", group["refresh_steps"], 1)
        require_range("update_scale", group["update_scale"], 0.0)

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        if parameter.dim() != 2:
            return super()._new_moments(parameter, group)
        shape = (max(parameter.shape), min(group["rank"], *parameter.shape))
        return {
            name: torch.zeros(shape, dtype=torch.float32, device=parameter.device) for name in sorted(_MOMENT_NAMES)
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
        if parameter.dim() != 2:
            super()._update(parameter, gradient, group, state, gradient_scale, found_inf)
            return
        terms = Terms(
            precision=weight_precision_of(parameter, group),
            rates=(*group["betas"], group["eps"]),
            step=state["step"],
            scale=gradient_scale,
            found_inf=found_inf,
            noise=self._noise_constants(parameter, group),
        )
        length, rank = min(parameter.shape), state["projected_first_moment"].shape[1]
        projection = Projection(
            shape=(length, rank),
            entry=self._entry(length, rank),
            step=state["step"],
            refresh_steps=group["refresh_steps"],
            noise=noise_constants(group["seed"] + 1, self._index[parameter]),
        )
        self._update_matrix(parameter, gradient, group, state, terms, projection)

    def _entry(self, length: int, rank: int) -> float:
        """Return the size of the projection's entries."""
        return float(rank**-0.5)

    def _update_matrix(
        self, parameter: Tensor, gradient: Tensor, group: Group, state: State, terms: Terms, projection: Projection
    ) -> None:
        raise NotImplementedError

    def _with_channels(
        self, parameter: Tensor, state: State, terms: Terms, projection: Projection
    ) -> Iterator[tuple[slice, State]]:
        """Yield slices of channels, each with its part of ``state``."""
        (length, rank), precision, count = projection.shape, terms.precision, max(parameter.shape)
        # Also where nothing is offloaded: the sums of a matrix product depend on the slice, and must not on the place.
        sliced_bytes = sum(tensor.nbytes for name, tensor in state.items() if name in self.sliced_state)
        channel_bytes = 3 * -(-sliced_bytes // count)
        if not self.fused:
            # The gradient and its update or the weight in fp32, and five tensors of the projection's rank.
            channel_bytes += max(precision.value_bytes + 8, precision.peak_bytes + 4) * length + 20 * rank
        step = max(1, (self.slice_bytes - SCALAR_BYTES) // channel_bytes // 2) * 2
        pieces = (slice(start, min(start + step, count)) for start in range(0, count, step))
        return self._with_state(parameter, state, pieces, _channel_state)


class GaLore(_Projected):
    """AdamW within a random subspace of each matrix. Arguments: see ``_Projected`` and ``AdamW``."""

    def _entry(self, length: int, rank: int) -> float:
        return float(length**-0.5)

    def _update_matrix(
        self, parameter: Tensor, gradient: Tensor, group: Group, state: State, terms: Terms, projection: Projection
    ) -> None:
        weights, gradients = _channels(parameter), _channels(gradient)
        size, keep = group["lr"] * group["update_scale"], 1.0 - group["lr"] * group["weight_decay"]
        for piece, part in self._with_channels(parameter, state, terms, projection):
            project(gradients[piece], part, terms, projection, fused=self.fused)
            start = piece.start * weights.shape[1]
            subtract_projected(weights[piece], part, size, keep, terms, projection, start, fused=self.fused)


class Apollo(_Projected):
    """The gradient scaled channel by channel. Arguments: see ``_Projected`` and ``AdamW``."""

    _by_channel = True

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        state = super()._new_moments(parameter, group)
        if parameter.dim() == 2:
            state["update_norm"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state

    def _update_matrix(
        self, parameter: Tensor, gradient: Tensor, group: Group, state: State, terms: Terms, projection: Projection
    ) -> None:
        gradients = _channels(gradient)
        moments = {name: state[name] for name in _MOMENT_NAMES}
        squares = projection.new_squares(gradients.shape[0])
        for piece, part in self._with_channels(parameter, moments, terms, projection):
            project(gradients[piece], part, terms, projection, squares[piece], fused=self.fused)
        factors, size = self._factors(squares, group, state, terms)
        del squares
        tall = parameter.shape[0] >= parameter.shape[1]
        bytes_each = 1 if self.fused else max(terms.precision.value_bytes + 4, terms.precision.peak_bytes)
        bytes_each += self._staged_bytes(parameter)
        columns = gradient.shape[1]
        rows = row_slices(gradient, bytes_each, self.slice_bytes - SCALAR_BYTES)
        pieces = (slice(piece.start * columns, piece.stop * columns) for piece in rows)
        subtract_scaled(
            parameter,
            gradient,
            (factors, None) if tall else (None, factors),
            size,
            1.0 - group["lr"] * group["weight_decay"],
            self._with_state(parameter, state, pieces, weight_state_slice),
            terms,
            fused=self.fused,
        )

    def _factors(self, squares: Tensor, group: Group, state: State, terms: Terms) -> tuple[Tensor | None, Tensor]:
        """Return each channel's factor, if they differ, and that of the whole update, from what ``project`` sums up."""
        if self._by_channel:
            whole, projected, adam = (squares.sum(2) if squares.shape[2] > 1 else squares[:, :, 0]).sqrt_().unbind(1)
            factors = adam / projected.add_(group["eps"])
            norm, size = torch.linalg.vector_norm(whole.mul_(factors)), torch.ones_like(terms.step)
        else:
            whole, projected, adam = squares.sum((0, 2)).sqrt_()
            factors, size = None, adam / (projected + group["eps"])
            norm = whole * size
        allowed = torch.where(state["update_norm"] > 0, state["update_norm"] * _GROWTH_LIMIT, norm)
        limited = torch.minimum(norm, allowed)
        store_unless(terms.found_inf, state["update_norm"], limited)
        size.mul_(limited / norm.clamp(min=torch.finfo(torch.float32).tiny)).mul_(group["lr"] * group["update_scale"])
        return factors, size if terms.scale is None else size.mul_(terms.scale)


class ApolloMini(Apollo):
    """APOLLO of rank 1 with one factor for each matrix. Arguments: see ``Apollo``, without ``rank``."""

    _by_channel = False

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh_steps: int = 200,
        update_scale: float = 128**0.5,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        super().__init__(
            parameters,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=1,
            refresh_steps=refresh_steps,
            update_scale=update_scale,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )


def _channels(matrix: Tensor) -> Tensor:
    """Return ``matrix`` with its longer side first."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()


def _channel_state(state: State, piece: slice) -> State:
    """Return the state of the channels in ``piece``; what belongs to the whole matrix as it is."""

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name in _MOMENT_NAMES:
            return tensor[piece]
        return _channels(tensor)[piece] if name in WEIGHT_STATE_NAMES else tensor

    return {name: cut(name, tensor) for name, tensor in state.items()}
