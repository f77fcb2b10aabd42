"""Updates in one kernel: Triton's interpreter runs the very kernels here, and a rehearsal counts their operators."""

import math

import pytest
import torch
from torch import nn

from oomless.memory.fake_mode import QuickFakeMode
from oomless.optim import adafactor, adamw, build, kernels, scaled, sgd
from oomless.optim.blockwise import decode_signed, decode_unsigned
from oomless.optim.precision import weight_precision

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COUNT = 4250  # moments of 8 bits, and a last block that is not full
FORMS = [
    *[("adamw_8bit", dtype, way) for dtype, way in ((FP32, None), (BF16, "correction"), (FP16, "correction"))],
    *[("adamw_8bit", BF16, "master"), ("adamw_8bit", FP16, "stochastic"), ("adamw_8bit", BF16, "plain")],
    *[("adamw", FP32, None), ("adamw", BF16, "stochastic"), ("adamw", FP16, "master")],
    *[("sgd", FP32, None), ("sgd", BF16, "correction"), ("sgd", FP16, "stochastic"), ("sgd", BF16, "master")],
]
every_form = pytest.mark.parametrize(("name", "dtype", "way"), FORMS)
SETTINGS = {"sgd": {"momentum": 0.9, "nesterov": True}}


@pytest.fixture
def on_kernels(monkeypatch):
    """Operators of CPU tensors go to the kernels, which the interpreter runs."""
    monkeypatch.setattr(adamw._UPDATE, "_operator", kernels.adamw)
    monkeypatch.setattr(sgd._UPDATE, "_operator", kernels.sgd)


def begun(name, dtype, way, *, fused, count=COUNT, slice_bytes=1 << 26):
    """An optimizer of one parameter after two plain steps."""
    weight = nn.Parameter((torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    optimizer = build(
        name,
        [weight],
        lr=1e-3,
        weight_decay=0.1,
        weight_precision=way,
        slice_bytes=slice_bytes,
        **SETTINGS.get(name, {}),
    )
    for number in range(2):
        step(optimizer, weight, number)
    optimizer.fused = fused
    return optimizer, weight


def step(optimizer, weight, number, found_inf=0.0):
    generator = torch.Generator().manual_seed(1000 + number)
    weight.grad = (torch.randn(weight.shape, generator=generator) * 0.1).to(weight.dtype)
    optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(found_inf))


def values(optimizer, weight, way):
    """The weight's value, and what its moments stand for."""
    state = optimizer.state[weight]
    found = {"value": weight_precision(way, weight.dtype).read(weight.detach(), state).double()}
    for name, decode in (("first_moment", decode_signed), ("second_moment", decode_unsigned)):
        if f"{name}_scale" in state:
            found[name] = decode(state[name], state[f"{name}_scale"]).double()
        elif name in state:
            found[name] = state[name].double()
    return found | {name: state[name].double() for name in ("momentum",) if name in state}


def exact(name, dtype, before, number):
    """The step in fp64, from the values ``before``."""
    weight = nn.Parameter(torch.empty(COUNT, dtype=dtype))
    step(build("sgd", [weight], lr=0.0, weight_precision=None if dtype == FP32 else "plain"), weight, number)
    gradient = weight.grad.double() * 0.5 if dtype != FP32 else weight.grad.double()  # fp32's was scaled in place
    value = before["value"]
    if name == "sgd":
        gradient = gradient + 0.1 * value
        momentum = 0.9 * before["momentum"] + gradient
        return {"value": value - 1e-3 * (gradient + 0.9 * momentum), "momentum": momentum}
    first = 0.9 * before["first_moment"] + 0.1 * gradient
    second = 0.999 * before["second_moment"] + 0.001 * gradient**2
    root = (second / (1 - 0.999**3)).sqrt() + 1e-8
    return {
        "value": value * (1 - 1e-3 * 0.1) - 1e-3 * first / (1 - 0.9**3) / root,
        "first_moment": first,
        "second_moment": second,
    }


@every_form
def test_a_kernel_is_as_exact_as_its_plain_form(name, dtype, way, on_kernels):
    errors = {}
    for fused in (True, False):
        optimizer, weight = begun(name, dtype, way, fused=fused)
        wanted = exact(name, dtype, values(optimizer, weight, way), 2)
        step(optimizer, weight, 2)
        found = values(optimizer, weight, way)
        assert found.keys() == wanted.keys()
        errors[fused] = {key: (found[key] - wanted[key]).abs() for key in wanted}
    for key in errors[True]:
        fused, plain = errors[True][key], errors[False][key]
        rounding = (
            torch.finfo(FP32).eps * wanted[key].abs()
        )  # plain forms fuse a product with a sum, the interpreter none
        assert fused.mean() <= plain.mean() * 1.01 + rounding.mean(), key
        assert fused.max() <= plain.max() * 1.1 + rounding.max(), key


@every_form
def test_a_kernel_that_finds_an_infinity_changes_no_bit(name, dtype, way, on_kernels):
    optimizer, weight = begun(name, dtype, way, fused=True)
    before = [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]
    step(optimizer, weight, 2, found_inf=1.0)
    assert all(map(torch.equal, before, (weight, *optimizer.state[weight].values())))


def test_bits_of_chance_are_the_same_in_slices_and_in_both_forms(on_kernels):
    weights = []
    for fused, slices in ((False, 1), (True, 1), (True, 3)):
        optimizer, weight = begun("sgd", BF16, "stochastic", fused=fused)
        if slices > 1:  # as where the state comes from the host
            optimizer._slices = lambda *_: iter((slice(0, 512), slice(512, 2304), slice(2304, COUNT)))
        step(optimizer, weight, 2)
        weights.append(weight.detach().clone())
    assert torch.equal(weights[1], weights[2])
    # A value within a rounding of the boundary may fall to the other side.
    assert (weights[0] != weights[1]).sum() <= COUNT // 1000


def test_kernels_are_tried_against_their_plain_form(on_kernels, monkeypatch):
    optimizer, weight = begun("adamw_8bit", BF16, "correction", fused=False)
    before = [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]
    optimizer.try_fused()
    assert all(map(torch.equal, before, (weight, *optimizer.state[weight].values())))
    assert list(optimizer._index) == [weight]
    monkeypatch.setattr(kernels, "log_of", lambda beta: math.log(beta) * 1.1)
    with pytest.raises(RuntimeError, match="fused updates of torch.bfloat16 differ"):
        optimizer.try_fused()


# -- Adafactor's matrices ------

MATRICES = [(FP32, None), (BF16, "stochastic"), (FP16, "stochastic"), (BF16, "correction"), (FP16, "master")]
every_matrix = pytest.mark.parametrize(("dtype", "way"), MATRICES)


@pytest.fixture
def adafactor_on_kernels(monkeypatch):
    monkeypatch.setattr(adafactor, "_SQUARES", kernels.adafactor_squares)
    monkeypatch.setattr(adafactor, "_LENGTH", kernels.adafactor_length)
    monkeypatch.setattr(scaled, "_SUBTRACT_SCALED", kernels.subtract_scaled)


def matrix(dtype, way, fused, shape=(150, 200), steps=2, slice_bytes=1 << 26):
    weight = nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    optimizer = build("adafactor", [weight], lr=1e-2, weight_decay=0.1, weight_precision=way, slice_bytes=slice_bytes)
    for number in range(steps):
        step(optimizer, weight, number)
    optimizer.fused = fused
    return optimizer, weight


def exact_adafactor(before, gradient):
    """The third step in fp64, with lr 1e-2 and weight decay 0.1, and the moments after it."""
    gradient, fresh = gradient.double(), 3.0**-0.8
    squares = (gradient * 0.5) ** 2 + 1e-30
    row = torch.lerp(before["row_moment"], squares.mean(1), fresh)
    column = torch.lerp(before["column_moment"], squares.mean(0), fresh)
    update = gradient * 0.5 / (row[:, None] * column / row.mean()).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    return {"value": before["value"] * (1 - 1e-2 * 0.1) - 1e-2 * update, "row_moment": row, "column_moment": column}


def adafactor_values(optimizer, weight, way):
    state = optimizer.state[weight]
    value = weight_precision(way, weight.dtype).read(weight.detach(), state).double()
    return {"value": value} | {name: state[name].double() for name in ("row_moment", "column_moment")}


@every_matrix
def test_adafactors_kernels_are_as_exact_as_their_plain_form(dtype, way, adafactor_on_kernels):
    errors = {}
    for fused in (True, False):
        optimizer, weight = matrix(dtype, way, fused)
        before = adafactor_values(optimizer, weight, way)
        step(optimizer, weight, 2)
        wanted = exact_adafactor(before, weight.grad)
        found = adafactor_values(optimizer, weight, way)
        errors[fused] = {key: (found[key] - wanted[key]).abs() for key in wanted}
    for key in errors[True]:
        fused, plain, rounding = errors[True][key], errors[False][key], torch.finfo(FP32).eps * wanted[key].abs()
        assert fused.mean() <= plain.mean() * 1.01 + rounding.mean(), key
        assert fused.max() <= plain.max() * 1.1 + 4 * rounding.max(), key


@every_matrix
def test_adafactor_that_finds_an_infinity_changes_no_bit(dtype, way, adafactor_on_kernels):
    optimizer, weight = matrix(dtype, way, fused=True)
    before = [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]
    step(optimizer, weight, 2, found_inf=1.0)
    assert all(map(torch.equal, before, (weight, *optimizer.state[weight].values())))


@every_matrix
def test_adafactors_operators_on_the_cpu_do_what_its_plain_form_does(dtype, way):
    found = []
    for fused in (True, False):
        optimizer, weight = matrix(dtype, way, fused, slice_bytes=1 << 17)
        step(optimizer, weight, 2)
        found.append(adafactor_values(optimizer, weight, way)["value"])
    spacing = 0.0 if way is None else torch.finfo(dtype).eps * found[1].abs()
    assert ((found[0] - found[1]).abs() <= spacing + 1e-7).all()
    assert (found[0] != found[1]).float().mean() < 0.05 or dtype == FP32 or way in ("master", "correction")


def test_adafactors_kernels_are_tried_against_their_plain_form(adafactor_on_kernels, monkeypatch):
    optimizer, _ = matrix(BF16, "stochastic", fused=False)
    optimizer.try_fused()
    monkeypatch.setattr(adafactor, "_LENGTH", lambda *arguments: kernels.adafactor_length(*arguments) * 9)
    with pytest.raises(RuntimeError, match="fused updates of torch.bfloat16 differ"):
        optimizer.try_fused()


@every_matrix
@pytest.mark.parametrize(("shape", "most"), [((1024, 1024), 1.05), ((1024, 64), 1.2), ((64, 1024), 1.2)])
def test_adafactor_reads_the_gradient_three_times(dtype, way, shape, most, peak_temporaries):
    with QuickFakeMode() as mode:
        weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        optimizer = build("adafactor", [weight], lr=1e-3, weight_precision=way)
        optimizer.fused = True
        weight.grad = torch.empty_like(weight)
        mode.work.on = True
        optimizer.step(gradient_scale=torch.ones(()), found_inf=torch.zeros(()))
        mode.work.on = False
        costs = mode.work.work().of_passes
    kept = sum(tensor.nbytes for name, tensor in optimizer.state[weight].items() if name in ("master", "correction"))
    read_weight = weight.nbytes if way != "master" else 0
    least = 3 * weight.grad.nbytes + weight.nbytes + read_weight + 2 * kept
    assert sum(cost[2] * count for cost, count in costs) <= most * least
    assert sum(count for cost, count in costs if cost[2] >= weight.numel()) == 3
    optimizer, weight = matrix(dtype, way, fused=True, shape=shape, steps=0)
    weight.grad = torch.ones_like(weight)
    with peak_temporaries:
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert peak_temporaries.peak_bytes <= max(weight.numel() // 8, 24 * sum(shape))


# -- what a rehearsal counts ------


def counted(name, dtype, way):
    """Bytes moved and operators of an update of 65,536 weights, with all that a step gives it."""
    with QuickFakeMode() as mode:
        weight = nn.Parameter(torch.empty(256, 256, dtype=dtype))
        optimizer = build(name, [weight], lr=1e-3, weight_precision=way, **SETTINGS.get(name, {}))
        optimizer.fused = True
        weight.grad = torch.empty_like(weight)
        scaling = {"gradient_scale": torch.ones(()), "found_inf": torch.zeros(())}
        mode.work.on = True
        optimizer.step(**scaling)
        mode.work.on = False
        state_bytes = sum(tensor.nbytes for tensor in optimizer.state[weight].values())
        costs = mode.work.work().of_passes
    read_weight = weight.nbytes if way != "master" else 0
    least = weight.nbytes + read_weight + weight.grad.nbytes + 2 * state_bytes
    return sum(cost[2] * count for cost, count in costs) / least, sum(count for _, count in costs)


@every_form
def test_an_update_moves_what_it_must_in_three_operators(name, dtype, way):
    ratio, operators = counted(name, dtype, way)
    assert ratio <= 1.001
    assert operators <= 3


@every_form
def test_a_fused_update_asks_for_no_memory(name, dtype, way, peak_temporaries):
    optimizer, weight = begun(name, dtype, way, fused=True, count=1 << 16)
    weight.grad = torch.ones_like(weight)
    with peak_temporaries:
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert peak_temporaries.peak_bytes <= 64


@every_form
def test_an_operator_on_the_cpu_is_its_plain_form_to_the_bit(name, dtype, way):
    results = []
    for fused in (True, False):
        optimizer, weight = begun(name, dtype, way, fused=fused)
        for number in range(2, 4):
            step(optimizer, weight, number)
        results.append([weight.detach(), *optimizer.state[weight].values()])
    assert all(map(torch.equal, *results))
