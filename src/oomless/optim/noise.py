"""Random bits that are a function of (seed, parameter, step, element) and of nothing else.

Stochastic rounding needs sixteen random bits per weight. A generator would hand them out in the order of the
calls, so that the slice size, the order in which a backward pass reaches the parameters, and a skipped step
would all change the run, and its hidden state would have to be saved. A hash of the element's position has
none of this: the bits are the same on every device, for every slice size and after every resume, and a step
that was skipped because of an overflow does not use any up (the step counter is a tensor that did not move).

The hash is the 32-bit integer mixer "lowbias32" (xor-shift, multiply, xor-shift, multiply, xor-shift, found
by Chris Wellons' exhaustive search for low bias), with the key added before the first and before the second
multiplication so that two steps do not see shifted copies of one sequence. One hash serves two elements. It
costs 4 to 6 bytes of temporaries per element and about fourteen elementwise passes over 2 bytes per element.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def _mix_64(value: int) -> int:
    """Return a well-mixed 64-bit integer (the finaliser of splitmix64); for the host's small integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _as_int32(value: int) -> int:
    """Return the low 32 bits of ``value`` read as a signed integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _xor_shift_(bits: Tensor, shift: int) -> Tensor:
    """``bits ^= bits >> shift`` in place, where the shift brings in zeros (torch's brings in the sign)."""
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def noise_constants(seed: int, parameter_index: int) -> tuple[int, int]:
    """Return what a parameter's noise has in all steps, as two signed integers of 32 bits."""
    base = _mix_64(_mix_64(seed) ^ parameter_index)
    return _as_int32(base), _as_int32(base >> 32)


def noise_key(constants: tuple[int, int], step: Tensor) -> Tensor:
    """Return the int32 ``(2,)`` key of a parameter's noise in one step, on the device of ``step``."""
    count = step.to(torch.int32)
    halves = [(count * _as_int32(0x9E3779B1) + constants[0]), (count * _as_int32(0x85EBCA77) + constants[1])]
    return _hash_(torch.stack(halves), None)


def random_signs(key: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return an fp32 matrix of +1 and -1, equally likely."""
    bits = noise_16_bits(key, 0, shape[0] * shape[1]).view(shape)
    return bits.bitwise_and_(1).float().mul_(2.0).sub_(1.0)


def noise_16_bits(key: Tensor, start: int, count: int) -> Tensor:
    """Return ``count`` uniform int16 values (all 65,536 equally likely) for the elements from ``start`` on.

    ``start`` is even, as one hash serves two elements.
    """
    pairs = torch.arange(start // 2, start // 2 + (count + 1) // 2, dtype=torch.int32, device=key.device)
    return _hash_(pairs, key).view(torch.int16)[:count]


def _hash_(bits: Tensor, key: Tensor | None) -> Tensor:
    """Mix int32 ``bits`` in place (multiplication wraps around)."""
    if key is not None:
        bits.add_(key[0])
    _xor_shift_(bits, 16).mul_(0x7FEB352D)
    if key is not None:
        bits.bitwise_xor_(key[1])
    _xor_shift_(bits, 15).mul_(_as_int32(0x846CA68B))
    return _xor_shift_(bits, 16)
