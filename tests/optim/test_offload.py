"""State in host memory: the same updates bit for bit, and a device that holds three slices of it."""

import pytest
import torch
from torch import nn

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.optim import build
from oomless.optim.offload import SMALLEST_OFFLOADED

SHAPE = (512, 1024)
COUNT = SHAPE[0] * SHAPE[1]
SLICE = 1 << 18
RANK = 8
SETTINGS = {"apollo": {"rank": RANK}, "galore": {"rank": RANK}, "muon": {"orthogonalise": True}}
PROJECTION = 8 * 512 * RANK + 16 * 1024
BESIDE_SLICES = dict.fromkeys(("apollo", "apollo_mini", "galore"), PROJECTION) | {"muon": 4 * (3 * COUNT + 2 * 512**2)}
ROUTES = [
    ("adamw", torch.float32, None, 8),
    ("adamw", torch.bfloat16, "master", 12),
    ("adamw", torch.float16, "correction", 9),
    ("adamw_8bit", torch.float32, None, 2.03125),
    ("adamw_8bit", torch.bfloat16, "correction", 3.03125),
    ("adafactor", torch.float16, "master", 4),
    ("adafactor", torch.bfloat16, "correction", 1),
    ("sgd", torch.float32, None, 4),
    ("sgd", torch.float16, "master", 8),
    ("apollo", torch.bfloat16, "master", 4 + 8 * RANK / 512),
    ("apollo", torch.float32, None, 8 * RANK / 512),
    ("apollo_mini", torch.float16, "correction", 1 + 8 / 512),
    ("galore", torch.float32, None, 8 * RANK / 512),
    ("galore", torch.bfloat16, "correction", 1 + 8 * RANK / 512),
    ("muon", torch.float32, None, 4),
    ("muon", torch.bfloat16, "master", 8),
]


def train(device, name, dtype, way, *, offload, found_inf=None, fused=False):
    """Three steps on a matrix and a vector; return weights, state, and bytes held and at the peak of the steps."""
    generator = torch.Generator().manual_seed(0)
    with device.active():
        starts = [torch.randn(shape, generator=generator) for shape in (SHAPE, (1024,))]
        parameters = [nn.Parameter(start.to(dtype)) for start in starts]
        before = device.usage().allocated_bytes
        optimizer = build(
            name,
            parameters,
            lr=1e-2,
            weight_precision=way,
            slice_bytes=SLICE,
            offload=device if offload else None,
            **SETTINGS.get(name, {}),
        )
        optimizer.fused = fused
        held = device.usage().allocated_bytes - before
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            device.reset_peak()
            start = device.usage().allocated_bytes
            optimizer.step(found_inf=found_inf)
            peak = device.usage().peak_allocated_bytes - start
        device.wait()
        state = [tensor.clone() for p in parameters for tensor in optimizer.state_tensors(p).values()]
        return [p.detach().clone() for p in parameters], state, held, peak


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "dtype", "way", "bytes_each"), ROUTES)
def test_same_bits_and_three_slices(name, dtype, way, bytes_each, fused):
    device = VirtualGPU(1 << 30)
    ours = train(device, name, dtype, way, offload=True, fused=fused)
    plain = train(VirtualGPU(1 << 30), name, dtype, way, offload=False, fused=fused)
    for left, right in zip(ours[0] + ours[1], plain[0] + plain[1], strict=True):
        if name != "adafactor":
            assert torch.equal(left, right)
        elif left.dtype != torch.int8:  # sums over columns are taken slice by slice, and staging makes slices smaller
            torch.testing.assert_close(
                left.float(), right.float(), rtol=1e-3, atol=1e-2 if left.dtype.itemsize < 4 else 1e-6
            )
    assert plain[2] - ours[2] == bytes_each * COUNT
    assert ours[3] <= SLICE + BESIDE_SLICES.get(name, 0)
    assert bytes_each * COUNT <= device.host_peak_allocated_bytes <= (bytes_each + 4) * COUNT + 4096


@pytest.mark.parametrize(("name", "dtype", "way", "bytes_each"), ROUTES)
def test_state_is_made_with_no_second_one_beside_it(name, dtype, way, bytes_each):
    """... but one tensor of it, or the parameter that it is made of."""
    device = VirtualGPU(1 << 30)
    with device.active():
        parameter = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
        settings = {"weight_precision": way, "offload": device, **SETTINGS.get(name, {})}
        optimizer = build(name, [parameter], lr=1e-2, **settings)
        sizes = [tensor.nbytes for tensor in (parameter, *optimizer.state_tensors(parameter).values())]
    assert device.host_peak_allocated_bytes <= sum(sizes[1:]) + max(sizes) + 4096


def test_an_overflow_changes_nothing():
    found = []
    for overflow in (torch.ones(()), None):
        device = VirtualGPU(1 << 30)
        found.append(train(device, "adamw", torch.float16, "correction", offload=True, found_inf=overflow))
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(found[0][0][0], start)
    assert not torch.equal(found[1][0][0], start)


def test_state_comes_back_bit_for_bit():
    device = VirtualGPU(1 << 30)
    with device.active():
        weight = nn.Parameter(torch.ones(SHAPE))
        optimizer = build("adamw", [weight], lr=1e-2, offload=device)
        weight.grad = torch.ones(SHAPE)
        optimizer.step()
        device.wait()
        with device.host():
            saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors(weight).items()}
        other = build("adamw", [weight], lr=1e-2, offload=device)
        other.load_state_tensors(weight, saved)
        assert all(torch.equal(saved[name], tensor) for name, tensor in other.state_tensors(weight).items())


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("adafactor", COUNT, "keeps nothing of these"),
        ("adamw", SMALLEST_OFFLOADED - 1, "keeps nothing of these"),
    ],
)
def test_refused_where_it_has_no_effect(name, count, message):
    device = VirtualGPU(1 << 30)
    with device.active(), pytest.raises(ValueError, match=message):
        build(name, [nn.Parameter(torch.zeros(count))], lr=1e-2, offload=device)
