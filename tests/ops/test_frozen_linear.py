"""Linear layers in few bits: rounding, gradients, bytes, and what is kept for backward."""

import pytest
import torch
from bitsandbytes import functional as theirs

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.frozen_linear import frozen_linear, new_code, pack, packed_shapes

KINDS = ["nf4", "int8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(kind, shape=(96, 192), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    return weight, pack(weight, kind, new_code(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 192), (64, 96), (1, 64), (5, 7), (33, 130)], ids=str)
@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.11), ("int8", 0.01)])
def test_rounding_is_small_and_shapes_are_as_said(kind, limit, shape, dtype):
    weight, packed = make(kind, shape, dtype)
    unpacked = packed.unpack(dtype)
    assert unpacked.dtype == dtype
    assert (unpacked - weight).float().norm() <= limit * weight.float().norm()
    for name, (size, kept) in packed_shapes(shape, kind).items():
        assert (tuple(getattr(packed, name).shape), getattr(packed, name).dtype) == (size, kept)


def test_nf4_rounds_no_more_than_bitsandbytes_own_double_quantisation():
    weight, packed = make("nf4", (512, 512))
    values, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    naive = (theirs.dequantize_4bit(values, state) - weight).norm()
    assert (packed.unpack(torch.float32) - weight).norm() <= 1.01 * naive


def test_int8_rounds_to_less_than_a_step():
    weight, packed = make("int8", (64, 256))
    steps = weight.view(-1, 256).abs().amax(dim=1) / 127
    assert bool(((packed.unpack(torch.float32) - weight).view(-1, 256).abs() <= 0.75 * steps[:, None]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_weight(kind):
    numbers = sum(
        torch.Size(size).numel() * dtype.itemsize for size, dtype in packed_shapes((4096, 4096), kind).values()
    )
    count = 4096 * 4096
    expected = {"nf4": count // 2 + count // 64 + count // 64 // 256 * 4 + 4, "int8": count + count // 256 * 4}
    assert numbers == expected[kind]
    assert 8 * numbers / count == pytest.approx({"nf4": 4.127, "int8": 8.125}[kind], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_as_linear_with_the_unpacked_weight(kind, dtype, with_bias):
    _, packed = make(kind, (33, 130))
    bias = torch.linspace(-1, 1, 33).to(dtype) if with_bias else None
    inputs = torch.randn(2, 5, 130, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    outputs = frozen_linear(inputs, packed, bias)
    expected = torch.nn.functional.linear(inputs, packed.unpack(dtype), bias)
    assert torch.equal(outputs, expected)
    slope = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (ours,) = torch.autograd.grad(outputs, inputs, slope)
    (plain,) = torch.autograd.grad(expected, inputs, slope)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_backward(kind):
    device = VirtualGPU(1 << 24)
    with device.active():
        _, packed = make(kind, dtype=torch.float16)
        inputs = torch.zeros(64, 192, dtype=torch.float16, requires_grad=True)
        before = device.usage().allocated_bytes
        outputs = frozen_linear(inputs * 1, packed)
        assert device.usage().allocated_bytes - before == outputs.nbytes
        outputs.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_fake_is_real_to_the_byte(kind):
    peaks = []
    for fake in (False, True):
        device = VirtualGPU(1 << 24, fake=fake)
        with device.active():
            packed = pack(torch.zeros(96, 192, dtype=torch.float16), kind, new_code(kind))
            inputs = torch.zeros(64, 192, dtype=torch.float16, requires_grad=True)
            frozen_linear(inputs, packed).sum().backward()
        usage = device.usage()
        peaks.append((usage.peak_allocated_bytes, usage.allocated_bytes))
    assert peaks[0] == peaks[1]
