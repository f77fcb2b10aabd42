"""Matrices of APOLLO, APOLLO-Mini and GaLore in two kernels a slice: their numbers, and what a rehearsal counts of them."""

import pytest
import torch
from tests.optim.test_fused import step
from torch import nn

from oomless.memory.fake_mode import QuickFakeMode
from oomless.optim import build, kernels, projection, projection_kernels, scaled
from oomless.optim.noise import noise_constants, noise_key, random_signs
from oomless.optim.precision import weight_precision

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("apollo", "apollo_mini", "galore")
WAYS = [(FP32, None), (BF16, "stochastic"), (FP16, "stochastic"), (BF16, "correction"), (FP16, "master")]
RATE, DECAY, RANK, REFRESH = 1e-2, 0.1, 20, 2
MOMENTS = ("projected_first_moment", "projected_second_moment")
every_name = pytest.mark.parametrize("name", NAMES)
every_way = pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
every_side = pytest.mark.parametrize("shape", [(150, 70), (70, 150)], ids=["tall", "wide"])


@pytest.fixture
def on_kernels(monkeypatch):
    """Operators of CPU tensors go to the kernels, which the interpreter runs."""
    monkeypatch.setattr(projection, "_PROJECT", projection_kernels.project)
    monkeypatch.setattr(projection, "_SUBTRACT_PROJECTED", projection_kernels.subtract_projected)
    monkeypatch.setattr(scaled, "_SUBTRACT_SCALED", kernels.subtract_scaled)


def begun(name, shape, dtype, way, *, fused, rank=RANK, steps=2, slice_bytes=1 << 26):
    """An optimizer of one matrix after plain steps."""
    weight = nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    optimizer = build(
        name,
        [weight],
        lr=RATE,
        weight_decay=DECAY,
        weight_precision=way,
        slice_bytes=slice_bytes,
        refresh_steps=REFRESH,
        **({} if name == "apollo_mini" else {"rank": rank}),
    )
    for number in range(steps):
        step(optimizer, weight, number)
    optimizer.fused = fused
    return optimizer, weight


def values(optimizer, weight, way):
    """The weight's value and its moments, in fp64."""
    state = optimizer.state[weight]
    value = weight_precision(way, weight.dtype).read(weight.detach(), state).double()
    return {"value": value} | {name: state[name].double() for name in (*MOMENTS, "update_norm") if name in state}


def channels(matrix):
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()


def exact(name, before, gradient, rank):
    """The third step in fp64, from the values ``before``."""
    g, value = channels(gradient.double() * 0.5), channels(before["value"])
    key = noise_key(noise_constants(1, 0), torch.tensor(float((3 - 1) // REFRESH)))
    rank = 1 if name == "apollo_mini" else rank
    signs = random_signs(key, (g.shape[1], rank)).double()
    projected = g @ (signs / (g.shape[1] if name == "galore" else rank) ** 0.5)
    first = 0.9 * before[MOMENTS[0]] + 0.1 * projected
    second = 0.999 * before[MOMENTS[1]] + 0.001 * projected**2
    adam = first / (1 - 0.9**3) / ((second / (1 - 0.999**3)).sqrt() + 1e-8)
    wanted = dict(zip(MOMENTS, (first, second), strict=True))
    if name == "galore":
        update = adam @ signs.t() / g.shape[1] ** 0.5
    else:
        over = 1 if name == "apollo" else (0, 1)
        update = g * (adam.norm(dim=over, keepdim=True) / (projected.norm(dim=over, keepdim=True) + 1e-8))
        norm = torch.minimum(update.norm(), 1.01 * before["update_norm"])
        update *= norm / update.norm() * (128**0.5 if name == "apollo_mini" else 1.0)
        wanted["update_norm"] = norm
    new = value * (1 - RATE * DECAY) - RATE * update
    return wanted | {"value": new if gradient.shape[0] >= gradient.shape[1] else new.t()}


def check_errors(name, shape, dtype, way, rank):
    errors = {}
    for fused in (True, False):
        optimizer, weight = begun(name, shape, dtype, way, fused=fused, rank=rank)
        before = values(optimizer, weight, way)
        step(optimizer, weight, 2)
        wanted, found = exact(name, before, weight.grad, rank), values(optimizer, weight, way)
        assert found.keys() == wanted.keys()
        errors[fused] = {key: (found[key] - wanted[key]).abs() for key in wanted}
    for key in errors[True]:
        fused, plain, rounding = errors[True][key], errors[False][key], torch.finfo(FP32).eps * wanted[key].abs()
        # A sum of n numbers has a rounding of its own order in each form.
        assert fused.mean() <= plain.mean() * 1.02 + 4 * rounding.mean(), key
        assert fused.max() <= plain.max() * 1.1 + 8 * rounding.max(), key


@every_name
@every_side
@every_way
def test_kernels_are_as_exact_as_their_plain_form(name, shape, dtype, way, on_kernels):
    check_errors(name, shape, dtype, way, RANK)


@pytest.mark.parametrize("name", ["apollo", "galore"])
def test_a_rank_that_several_programs_share(name, on_kernels):
    check_errors(name, (310, 300), FP32, None, 280)


@every_name
@every_side
@every_way
def test_an_infinity_changes_no_bit(name, shape, dtype, way, on_kernels):
    for steps in (0, 2):
        optimizer, weight = begun(name, shape, dtype, way, fused=True, steps=steps)
        before = [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]
        weight.grad = torch.full_like(weight, torch.inf)
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(1.0))
        assert all(map(torch.equal, before, (weight, *optimizer.state[weight].values())))


@every_name
@every_side
def test_bits_of_chance_are_the_same_in_slices_and_in_both_forms(name, shape, on_kernels):
    weights = []
    for fused, slice_bytes in ((False, 1 << 26), (True, 1 << 26), (True, 1 << 14)):
        optimizer, weight = begun(name, shape, BF16, "stochastic", fused=fused)
        optimizer.slice_bytes = slice_bytes
        step(optimizer, weight, 2)
        weights.append(weight.detach().clone())
    assert torch.equal(weights[1], weights[2])
    # A value within a rounding of the boundary may fall to the other side.
    assert (weights[0] != weights[1]).sum() <= weights[0].numel() // 200


@every_name
@every_side
@every_way
def test_operators_on_the_cpu_are_their_plain_forms_to_the_bit(name, shape, dtype, way):
    results = []
    for fused in (True, False):
        optimizer, weight = begun(name, shape, dtype, way, fused=fused)
        for number in range(2, 4):
            step(optimizer, weight, number)
        results.append([weight.detach(), *optimizer.state[weight].values()])
    assert all(map(torch.equal, *results))


@every_name
def test_kernels_are_tried_against_their_plain_form(name, on_kernels, monkeypatch):
    optimizer, weight = begun(name, (150, 70), BF16, "correction", fused=False)
    optimizer.try_fused()
    ours = projection_kernels.project
    monkeypatch.setattr(projection, "_PROJECT", lambda *given, **named: ours(*given[:-1], (1, 2), **named))
    with pytest.raises(RuntimeError, match="fused updates of torch.bfloat16 differ"):
        optimizer.try_fused()


# -- what a rehearsal counts ------

SHAPES = [(256, 256), (1024, 64), (64, 1024), (4096, 16), (16, 4096), (4096, 4096), (32000, 2048), (4096, 14336)]


def counted(name, shape, dtype, way):
    """Work of an update, and the least bytes that it must move: the gradient, moments and weight in each pass that needs them."""
    with QuickFakeMode() as mode:
        weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        optimizer = build(name, [weight], lr=1e-3, weight_precision=way)
        optimizer.fused = True
        weight.grad = torch.empty_like(weight)
        scaling = {"gradient_scale": torch.ones(()), "found_inf": torch.zeros(())}
        mode.work.on = True
        optimizer.step(**scaling)
        mode.work.on = False
        costs = mode.work.work().of_passes
    state = optimizer.state[weight]
    kept = sum(tensor.nbytes for name, tensor in state.items() if name in ("master", "correction"))
    moments = sum(state[name].nbytes for name in MOMENTS)
    least = (1 if way == "master" else 2) * weight.nbytes + 2 * kept + 2 * moments
    # GaLore's second pass needs X̃, half as many numbers as the moments, and APOLLO's the gradient.
    least += weight.grad.nbytes + (moments // 2 if name == "galore" else weight.grad.nbytes)
    return costs, least


@every_name
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_way
def test_an_update_moves_little_more_than_it_must(name, shape, dtype, way):
    costs, least = counted(name, shape, dtype, way)
    assert sum(cost[2] * count for cost, count in costs) <= 1.2 * least


@every_name
@every_way
def test_an_update_is_two_operators_and_some_of_few_numbers(name, dtype, way):
    costs, _ = counted(name, (1024, 1024), dtype, way)
    assert sum(count for cost, count in costs if cost[2] >= 1024 * 1024) == 2
    assert sum(count for _, count in costs) <= (4 if name == "galore" else 21)


@pytest.mark.parametrize(("name", "products"), [("apollo", 1), ("galore", 2)])
def test_products_with_the_projection_are_counted(name, products):
    costs, _ = counted(name, (2048, 1024), BF16, "stochastic")
    assert sum(cost[1] * count for cost, count in costs) == products * 2 * 2048 * 1024 * 256


@every_name
@every_side
@every_way
def test_fused_updates_ask_for_16_bytes_a_channel(name, shape, dtype, way, peak_temporaries):
    shape = tuple(side * 8 for side in shape)
    optimizer, weight = begun(name, shape, dtype, way, fused=True, steps=0)
    weight.grad = torch.ones_like(weight)
    with peak_temporaries:
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    # The rest are numbers without a dimension; GaLore has no more.
    assert peak_temporaries.peak_bytes <= (0 if name == "galore" else 16 * max(shape)) + 64
