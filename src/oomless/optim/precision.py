"""How a weight of sixteen bits takes updates that are smaller than its own resolution.

A bf16 weight has eight significant bits: an update below 1/512 of the weight is rounded away, and at the
learning rates of continued pretraining most updates are. Four ways, chosen by ``weight_precision`` of a
parameter group:

===============  =================  =======================================================================
name             bytes a parameter  what happens
===============  =================  =======================================================================
``master``       + 4                An fp32 copy takes the update; the weight is that copy rounded to nearest.
``correction``   + 1                A signed byte beside the weight; the value is ``w + c/128 * ulp(w)/2``.
                                    Error below 2^-15 of the weight (bf16), 2^-18 (fp16). As FlashOptim
                                    publishes it ("ULP-based weight splitting"), here with steps of 1/128
                                    instead of 1/127 so that reading and writing back without a change changes
                                    no bit.
``stochastic``   + 0                Rounds up with a probability equal to the distance from the lower
                                    neighbour: right on average, at the price of noise (``noise.py``).
``plain``        + 0                Rounds to nearest. Small updates are lost: training stalls.
===============  =================  =======================================================================

Weights in fp32 take none of these (``None``). Every way shares one contract: ``read`` gives the value of a
slice in fp32, the optimizer changes it in place, ``write`` puts it back; writing back an unchanged value
changes nothing, which is how a skipped step leaves every bit as it was.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from oomless.errors import nearest
from oomless.optim.noise import noise_16_bits

WeightPrecisionName = Literal["master", "correction", "stochastic", "plain"]
SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}
_EXPONENT_FIELD = 0x7F800000
_CODES = 128


class WeightPrecision:
    """An fp32 weight: the value is the weight itself. The base of the four ways for sixteen bits."""

    name: WeightPrecisionName | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    value_bytes: int = 0
    """What the value that ``read`` returns takes beyond the state, in bytes per element."""

    peak_bytes: int = 0
    """The most that ``read`` or ``write`` has alive at once, the value included, in bytes per element."""

    needs_noise: bool = False

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what must be kept beside ``weight``, each of its shape."""
        return {}

    def read(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the value of a slice in fp32; the caller may change it in place."""
        return weight

    def write(self, weight: Tensor, state: dict[str, Tensor], value: Tensor, key: Tensor | None, start: int) -> None:
        """Store ``value``, which ``read`` returned and the caller changed. ``value`` is used up.

        ``key`` and ``start`` say which random bits a way that needs them takes.
        """


class _Master(WeightPrecision):
    name = "master"
    dtypes = (torch.bfloat16, torch.float16)

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"master": weight.detach().float()}

    def read(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return state["master"]

    def write(self, weight: Tensor, state: dict[str, Tensor], value: Tensor, key: Tensor | None, start: int) -> None:
        weight.copy_(value)


class _Plain(WeightPrecision):
    name = "plain"
    dtypes = (torch.bfloat16, torch.float16)
    value_bytes = 4
    peak_bytes = 4

    def read(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return weight.float()

    def write(self, weight: Tensor, state: dict[str, Tensor], value: Tensor, key: Tensor | None, start: int) -> None:
        weight.copy_(value)


class _Stochastic(WeightPrecision):
    name = "stochastic"
    dtypes = (torch.bfloat16, torch.float16)
    value_bytes = 4
    peak_bytes = 12
    needs_noise = True

    def read(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return weight.float()

    def write(self, weight: Tensor, state: dict[str, Tensor], value: Tensor, key: Tensor | None, start: int) -> None:
        assert key is not None
        noise = noise_16_bits(key, start, value.numel()).view(value.shape)
        if weight.dtype == torch.float16:
            # Neighbours become whole numbers, below 2,048 with 13 bits behind the point: as many as the noise is cut to.
            apart = _neighbour_distance(value, weight.dtype)
            value.div_(apart).add_(noise.bitwise_right_shift_(3), alpha=2.0**-13).add_(0.5).floor_()
            weight.copy_(value.mul_(apart))
            return
        # A NaN's bits may overflow into those of zero when noise is added; infinity's cannot.
        bits = value.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
        bits.add_(noise).add_(1 << 15).bitwise_and_(-1 << 16)
        weight.copy_(value)


class _Correction(WeightPrecision):
    name = "correction"
    dtypes = (torch.bfloat16, torch.float16)
    value_bytes = 4
    peak_bytes = 12

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"correction": torch.zeros_like(weight, dtype=torch.int8)}

    def read(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        value = weight.float()
        return value.add_(_correction_unit(value, weight.dtype).mul_(state["correction"]))

    def write(self, weight: Tensor, state: dict[str, Tensor], value: Tensor, key: Tensor | None, start: int) -> None:
        weight.copy_(value)
        rounded = weight.float()
        value.sub_(rounded).div_(_correction_unit(rounded, weight.dtype))
        state["correction"].copy_(value.round_().clamp_(1 - _CODES, _CODES - 1))


def _correction_unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half the distance between ``value``'s neighbours in ``dtype``, over 128; ``value`` is fp32."""
    return _neighbour_distance(value, dtype).mul_(0.5 / _CODES)


def _neighbour_distance(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far the neighbours of ``value``, which is fp32, are apart in ``dtype``."""
    power_of_two = value.view(torch.int32).bitwise_and(_EXPONENT_FIELD).view(torch.float32)
    # Below the smallest normal number neighbours stay equally far.
    smallest = torch.finfo(dtype).tiny
    return power_of_two.clamp_(min=smallest).mul_(2.0 ** (1 - SIGNIFICAND_BITS[dtype]))


_FULL = WeightPrecision()
_PRECISIONS: dict[str | None, WeightPrecision] = {
    way.name: way for way in (_FULL, _Master(), _Correction(), _Stochastic(), _Plain())
}


def weight_precision(name: str | None, dtype: torch.dtype) -> WeightPrecision:
    """Return how a weight of ``dtype`` takes its updates.

    Raises:
        ValueError: the name is unknown, or the way and the dtype do not go together.
    """
    if name not in _PRECISIONS:
        known = get_args(WeightPrecisionName)
        raise ValueError(
            f"weight_precision is one of {', '.join(known)} or None; got {name!r}.{nearest(str(name), known)}"
        )
    way = _PRECISIONS[name]
    if dtype in way.dtypes:
        return way
    if dtype == torch.float32:
        raise ValueError(
            f"weights in float32 take no weight_precision; got {name!r}; put them in a group of their own with None"
        )
    if dtype in SIGNIFICAND_BITS:
        raise ValueError(
            f"weights in {dtype} need a weight_precision: master, correction, stochastic or plain; got None"
        )
    raise ValueError(f"weights are float32, bfloat16 or float16; got {dtype}")
