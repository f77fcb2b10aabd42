"""Sixteen-bit weights that learn: what each way keeps, what it loses, and the bits of chance."""

import pytest
import torch
from torch import nn

from oomless.optim import SGD, AdamW
from oomless.optim.blockwise import decode_signed, decode_unsigned, encode_signed, encode_unsigned
from oomless.optim.noise import noise_16_bits, noise_constants, noise_key
from oomless.optim.precision import weight_precision

SIXTEEN = (torch.bfloat16, torch.float16)


def every_finite_value(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        *[(dtype, way) for dtype in SIXTEEN for way in ("master", "correction", "stochastic", "plain")],
    ],
)
def test_writing_back_what_was_read_changes_no_bit(dtype, way):
    """For every finite weight; with correction, from every state that a write can have left."""
    precision = weight_precision(way, dtype)
    key = noise_key(noise_constants(0, 0), torch.tensor(3.0))
    for nudge in torch.linspace(-1, 1, 41):
        weight = every_finite_value(dtype)
        state = precision.new_state(weight)
        if way == "correction":
            spacing = torch.finfo(dtype).eps * weight.float().abs().clamp(min=torch.finfo(dtype).tiny)
            value = (weight.float() + nudge * spacing).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
            precision.write(weight, state, value, key, 0)
        before = [tensor.clone() for tensor in (weight, *state.values())]
        precision.write(weight, state, precision.read(weight, state), key, 0)
        assert all(map(torch.equal, before, (weight, *state.values())))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float16, 18)])
def test_correction_holds_as_many_bits_as_it_says(dtype, bits):
    generator = torch.Generator().manual_seed(0)
    value = torch.exp(torch.randn(100_000, generator=generator)) * 0.02
    precision = weight_precision("correction", dtype)
    weight = value.to(dtype)
    state = precision.new_state(weight)
    precision.write(weight, state, value.clone(), None, 0)
    error = (precision.read(weight, state) - value).abs() / value
    assert error.max() <= 2.0**-bits
    assert error.median() * 64 < ((weight.float() - value).abs() / value).median()


def test_small_updates_are_lost_by_plain_weights_only():
    """300 updates of 1/2000 of the weight each: 14 % in all."""
    moved = {}
    for dtype, way in (
        (torch.float32, None),
        (torch.bfloat16, "plain"),
        (torch.bfloat16, "master"),
        (torch.bfloat16, "correction"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "plain"),
        (torch.float16, "correction"),
        (torch.float16, "stochastic"),
    ):
        weight = nn.Parameter(torch.full((4096,), 1.0, dtype=dtype))
        optimizer = SGD([weight], lr=5e-4, momentum=0.0, weight_precision=way)
        for _ in range(300):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        moved[dtype, way] = weight.float().mean().item() - 1.0
    assert moved[torch.float32, None] == pytest.approx(0.15, rel=1e-4)
    assert moved[torch.bfloat16, "plain"] == 0.0
    exact = {(dtype, way) for dtype in SIXTEEN for way in ("master", "correction")}
    for dtype, way in moved.keys() & exact:
        assert moved[dtype, way] == pytest.approx(0.15, abs=2**-8)
    for dtype in SIXTEEN:
        assert moved[dtype, "stochastic"] == pytest.approx(0.15, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "lower", "neighbours_apart"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, -2.0 + 2.0**-10, 2.0**-10),
        (torch.float16, 2.0**-24 * 5, 2.0**-24),
        (torch.float16, -0.046875, 2.0**-15),
    ],
)
def test_stochastic_rounding_is_right_on_average(dtype, lower, neighbours_apart):
    """1,000 roundings between two neighbours: the mean is the value, within five standard errors."""
    fraction = torch.linspace(0.0, 1.0, 101)[:-1]
    value = lower + fraction * neighbours_apart
    precision = weight_precision("stochastic", dtype)
    total = torch.zeros_like(value)
    for step in range(1000):
        weight = torch.ones_like(value, dtype=dtype)
        precision.write(weight, {}, value.clone(), noise_key(noise_constants(1, 2), torch.tensor(float(step))), 0)
        assert ((weight == lower) | (weight == lower + neighbours_apart)).all()
        total += weight.float()
    up = (total / 1000 - lower) / neighbours_apart
    standard_error = (fraction * (1 - fraction) / 1000).sqrt()
    assert ((up - fraction).abs() <= 5 * standard_error + 1e-3).all()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stochastic_rounding_keeps_infinity_and_nan_visible(dtype):
    value = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    value.view(torch.int32)[2] = 0x7FFFFFFF
    weight = torch.zeros(4, dtype=dtype)
    key = noise_key(noise_constants(0, 0), torch.tensor(1.0))
    weight_precision("stochastic", dtype).write(weight, {}, value, key, 0)
    assert weight.isfinite().tolist() == [False, False, False, True]


def test_noise_is_uniform_and_has_no_memory():
    def noise(seed=0, index=0, step=1.0, start=0, count=1 << 18):
        return noise_16_bits(noise_key(noise_constants(seed, index), torch.tensor(step)), start, count).float() + 0.5

    first = noise()
    others = [noise(seed=1), noise(index=1), noise(step=2.0), noise(start=2), first.roll(1), first.roll(2)]
    uniform_deviation = 65536 / 12**0.5
    for values in (first, *others):
        assert values.mean().abs() < 5 * uniform_deviation / 512
        assert values.std().item() == pytest.approx(uniform_deviation, rel=0.01)
    for values in others:
        assert torch.corrcoef(torch.stack([first, values]))[0, 1].abs() < 5 / 512
    for bit in range(16):
        assert ((first - 0.5).int() >> bit & 1).float().mean().item() == pytest.approx(0.5, abs=5 / 1024)


def test_noise_does_not_depend_on_slices():
    key = noise_key(noise_constants(3, 4), torch.tensor(5.0))
    whole = noise_16_bits(key, 0, 1001)
    assert torch.equal(whole, torch.cat([noise_16_bits(key, 0, 256), noise_16_bits(key, 256, 745)]))


def test_the_seed_decides():
    def weight_after(seed):
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, weight_precision="stochastic", seed=seed)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight.detach()

    assert torch.equal(weight_after(1), weight_after(1))
    assert not torch.equal(weight_after(1), weight_after(2))


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_moments_of_eight_bits(count):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, generator=generator) * 1e-6
    second = first.square()
    codes, scales = encode_signed(first)
    assert (codes.dtype, scales.shape) == (torch.int8, (-(-count // 256),))
    top = first.abs().max()
    # A step of the signed square is at most 2/127 of the block's largest value; half of it is lost.
    assert (decode_signed(codes, scales) - first).abs().max() <= top / 127 * 1.01
    codes, scales = encode_unsigned(second.clone())
    roots, true_roots = decode_unsigned(codes, scales).sqrt(), second.sqrt()
    assert (roots - true_roots).abs().max() <= true_roots.max() / 255 * 1.01
    assert (roots > 0)[true_roots > 1e-4 * true_roots.max()].all()


def test_moments_of_zero_stay_zero():
    zero = torch.zeros(300)
    assert not decode_signed(*encode_signed(zero)).any()
    assert not decode_unsigned(*encode_unsigned(zero.clone())).any()
