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

Tensors that are not matrices take plain AdamW. Everything is local to a channel, so slices are slices of
channels (columns of a wide matrix, rows of a tall one). Temporaries: ``slice_bytes``, or those of one pair of
channels, plus P (4·k·r bytes, and the same while it is drawn) and 8 bytes a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
)
from oomless.optim.noise import noise_constants, noise_key, random_signs
from oomless.optim.offload import HostMemory

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
        channels = _channels(gradient)
        rank = state["projected_first_moment"].shape[1]
        period = (state["step"] - 1).div(group["refresh_steps"]).floor()
        key = noise_key(noise_constants(group["seed"] + 1, self._index[parameter]), period)
        projection = random_signs(key, (channels.shape[1], rank))
        self._update_matrix(parameter, channels, projection, group, state, gradient_scale, found_inf)

    def _update_matrix(
        self,
        parameter: Tensor,
        channels: Tensor,
        projection: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        raise NotImplementedError

    def _channel_slices(self, parameter: Tensor, group: Group, projection: Tensor) -> Iterator[slice]:
        precision = weight_precision_of(parameter, group)
        count, length = max(parameter.shape), projection.shape[0]
        # The gradient and its update or the weight in fp32, and five tensors of the projection's rank.
        channel_bytes = max(precision.value_bytes + 8, precision.peak_bytes + 4) * length
        channel_bytes += 20 * projection.shape[1]
        # Also where nothing is offloaded: the sums of a matrix product depend on the slice, and must not on the place.
        weight_state = precision.new_state(parameter.new_empty((), device="meta"))
        staged_bytes = 8 * projection.shape[1] + sum(tensor.nbytes for tensor in weight_state.values()) * length
        channel_bytes += 3 * staged_bytes
        free_bytes = max(0, self.slice_bytes - SCALAR_BYTES)
        step = max(1, free_bytes // channel_bytes // 2) * 2
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _project(
        self,
        gradient: Tensor,
        projection: Tensor,
        group: Group,
        state: State,
        found_inf: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return a slice's X and X̃, and update its moments; ``state`` is the slice's."""
        projected = gradient @ projection
        first, second = state["projected_first_moment"], state["projected_second_moment"]
        beta1, beta2 = group["betas"]
        store_unless(found_inf, first, torch.lerp(first, projected, 1 - beta1))
        store_unless(found_inf, second, (second * beta2).addcmul_(projected, projected, value=1 - beta2))
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        return projected, torch.div(first, root).div_(1 - beta1 ** state["step"])

    def _apply(
        self,
        parameter: Tensor,
        piece: slice,
        update: Tensor,
        group: Group,
        state: State,
        key: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Decay some channels of ``parameter`` and subtract ``update``, which is used up; ``state`` is theirs."""
        precision = weight_precision_of(parameter, group)
        weight = _channels(parameter)[piece]
        value = precision.read(weight, state)
        decay: Tensor | float = 1.0 - group["lr"] * group["weight_decay"]
        if found_inf is not None:
            update.masked_fill_(found_inf.bool(), 0.0)
            decay = torch.where(found_inf.bool(), 1.0, decay)
        value.mul_(decay).sub_(update)
        precision.write(weight, state, value, key, piece.start * weight.shape[1])


class GaLore(_Projected):
    """AdamW within a random subspace of each matrix. Arguments: see ``_Projected`` and ``AdamW``."""

    def _update_matrix(
        self,
        parameter: Tensor,
        channels: Tensor,
        projection: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        projection.div_(projection.shape[0] ** 0.5)
        key = self._noise_key(parameter, group, state)
        pieces = self._channel_slices(parameter, group, projection)
        for piece, part in self._with_state(parameter, state, pieces, _channel_state):
            gradient = _scaled(channels[piece], gradient_scale)
            _, adam = self._project(gradient, projection, group, part, found_inf)
            del gradient
            update = adam.mul_(group["lr"] * group["update_scale"]) @ projection.t()
            del adam
            self._apply(parameter, piece, update, group, part, key, found_inf)
            del update


class Apollo(_Projected):
    """The gradient scaled channel by channel. Arguments: see ``_Projected`` and ``AdamW``."""

    _by_channel = True

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        state = super()._new_moments(parameter, group)
        if parameter.dim() == 2:
            state["update_norm"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state

    def _update_matrix(
        self,
        parameter: Tensor,
        channels: Tensor,
        projection: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        projection.div_(projection.shape[1] ** 0.5)
        pieces = list(self._channel_slices(parameter, group, projection))
        moments = {name: state[name] for name in ("step", *_MOMENT_NAMES)}
        parts = self._with_state(parameter, moments, pieces, _channel_state)
        factors, squares = self._factors(channels, projection, parts, group, gradient_scale, found_inf)
        norm = (factors.square() * squares).sum().sqrt()
        allowed = torch.where(state["update_norm"] > 0, state["update_norm"] * _GROWTH_LIMIT, norm)
        limited = torch.minimum(norm, allowed)
        factors.mul_(limited / norm.clamp(min=torch.finfo(torch.float32).tiny))
        factors.mul_(group["lr"] * group["update_scale"])
        if gradient_scale is not None:
            factors.mul_(gradient_scale)
        store_unless(found_inf, state["update_norm"], limited)
        key = self._noise_key(parameter, group, state)
        weight_state = {name: tensor for name, tensor in state.items() if name in WEIGHT_STATE_NAMES}
        for piece, part in self._with_state(parameter, weight_state, pieces, _channel_state):
            update = channels[piece] * factors[piece, None]
            self._apply(parameter, piece, update, group, part, key, found_inf)
            del update

    def _factors(
        self,
        channels: Tensor,
        projection: Tensor,
        parts: Iterable[tuple[slice, State]],
        group: Group,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the factor and the squared norm of each channel's gradient; updates the moments."""
        factors = projection.new_empty(channels.shape[0])
        squares = torch.empty_like(factors)
        sums = projection.new_zeros(2)
        for piece, part in parts:
            gradient = _scaled(channels[piece], gradient_scale)
            squares[piece] = torch.linalg.vector_norm(gradient, dim=1).square_()
            projected, adam = self._project(gradient, projection, group, part, found_inf)
            del gradient
            norms = torch.linalg.vector_norm(adam, dim=1), torch.linalg.vector_norm(projected, dim=1)
            if self._by_channel:
                factors[piece] = norms[0] / (norms[1] + group["eps"])
            else:
                sums += torch.stack([norm.square().sum() for norm in norms])
            del projected, adam
        if not self._by_channel:
            factors.copy_(sums[0].sqrt() / (sums[1].sqrt() + group["eps"]))
        return factors, squares


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


def _scaled(gradient: Tensor, gradient_scale: Tensor | None) -> Tensor:
    """Return a slice of the gradient in fp32: itself, or a new tensor."""
    if gradient_scale is None:
        return gradient.float()
    if gradient.dtype == torch.float32:
        return gradient * gradient_scale
    return gradient.float().mul_(gradient_scale)
