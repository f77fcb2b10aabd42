"""What every optimizer promises, for every one that ``build`` knows."""

import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from oomless.optim import NAMES, SGD, Adafactor, AdamW, AdamW8bit, build
from oomless.optim.base import MemoryLeanOptimizer

SLICE_BYTES = 1 << 16
SHAPES = [(96, 130), (33, 128), (7,)]
WEIGHTS = [
    (torch.float32, None),
    (torch.bfloat16, "master"),
    (torch.bfloat16, "correction"),
    (torch.bfloat16, "stochastic"),
    (torch.float16, "stochastic"),
    (torch.float16, "correction"),
]
SETTINGS = {
    "apollo": {"rank": 8, "refresh_steps": 3},
    "apollo_mini": {"refresh_steps": 3},
    "galore": {"rank": 8, "refresh_steps": 3},
    "muon": {"orthogonalise": True},
}
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_weight = pytest.mark.parametrize(
    ("dtype", "weight_precision"),
    WEIGHTS,
    ids=[f"{dtype}-{way}".removeprefix("torch.") for dtype, way in WEIGHTS],
)


def weights(dtype, shapes=SHAPES, scale=0.02):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for shape in shapes]


def give_gradients(parameters, number, factor=1.0):
    generator = torch.Generator().manual_seed(1000 + number)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * factor).to(parameter.dtype)


def everything(optimizer):
    """Copies of all weights and all state."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [parameter.detach().clone()]
            found += [tensor.clone() for tensor in optimizer.state_tensors(parameter).values()]
    return found


def same_bits(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def built(name, parameters, weight_precision=None, slice_bytes=SLICE_BYTES, lr=1e-2, **settings):
    return build(
        name,
        parameters,
        lr=lr,
        weight_precision=weight_precision,
        slice_bytes=slice_bytes,
        **SETTINGS.get(name, {}),
        **settings,
    )


def trained(name, dtype, weight_precision, steps, *, slice_bytes=SLICE_BYTES, factor=1.0, **step_arguments):
    parameters = weights(dtype)
    optimizer = built(name, parameters, weight_precision, slice_bytes)
    for number in range(steps):
        give_gradients(parameters, number, factor)
        optimizer.step(**step_arguments)
    return optimizer


# -- against torch ------


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (AdamW, torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.0}),
    ],
)
def test_equals_torch(ours, theirs, settings):
    mine, reference = weights(torch.float32), weights(torch.float32)
    optimizers = ours(mine, lr=1e-2, **settings), theirs(reference, lr=1e-2, **settings)
    schedulers = [torch.optim.lr_scheduler.LinearLR(each, 0.5, 1.0, 10) for each in optimizers]
    for number in range(20):
        for parameters, optimizer, scheduler in zip((mine, reference), optimizers, schedulers, strict=True):
            give_gradients(parameters, number)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


def test_adafactor_equals_torch_with_relative_steps():
    mine, reference = weights(torch.float32), weights(torch.float32)
    ours = Adafactor(mine, lr=1e-2, relative_step=True, weight_decay=0.1, slice_bytes=SLICE_BYTES)
    theirs = torch.optim.Adafactor(reference, lr=1e-2, weight_decay=0.1, eps=(1e-15, 1e-3))
    for number in range(20):
        give_gradients(mine, number, 3.0)
        give_gradients(reference, number, 3.0)
        ours.step()
        theirs.step()
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_adafactor_equals_its_formula():
    (weight,) = weights(torch.float32, [(40, 30)])
    optimizer = Adafactor([weight], lr=1e-2, clip_threshold=0.5, weight_decay=0.1)
    value = weight.detach().double()
    row, column = torch.zeros(40, 1, dtype=torch.float64), torch.zeros(1, 30, dtype=torch.float64)
    for number in range(1, 8):
        give_gradients([weight], number, number)
        gradient, fresh = weight.grad.double(), number**-0.8
        row = (1 - fresh) * row + fresh * gradient.square().mean(1, keepdim=True)
        column = (1 - fresh) * column + fresh * gradient.square().mean(0, keepdim=True)
        update = gradient / (row @ column / row.mean()).sqrt()
        update /= max(1.0, update.square().mean().sqrt().item() / 0.5)
        value = value * (1 - 1e-3) - 1e-2 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_eight_bit_moments_follow_fp32_moments():
    """Over 50 steps the weights move nearly as with fp32 moments, though gradients differ by orders."""
    generator = torch.Generator().manual_seed(3)
    size = torch.exp(1.5 * torch.randn(128, 64, generator=generator)) * 1e-4
    moved = []
    for kind in (AdamW, AdamW8bit):
        weight = nn.Parameter(torch.zeros(128, 64))
        optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
        noise = torch.Generator().manual_seed(4)
        for _ in range(50):
            weight.grad = (torch.randn(128, 64, generator=noise) + 0.3) * size
            optimizer.step()
        moved.append(weight.detach())
    assert (moved[0] - moved[1]).norm() < 0.25 * moved[0].norm()


# -- what every optimizer promises ------


@every_optimizer
@every_weight
def test_overflow_changes_nothing(name, dtype, weight_precision):
    optimizer = trained(name, dtype, weight_precision, 3)
    before = everything(optimizer)
    parameters = optimizer.param_groups[0]["params"]
    give_gradients(parameters, 7)
    parameters[0].grad[0, 0] = torch.inf
    parameters[1].grad[3] = torch.nan
    optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(1.0))
    assert same_bits(before, everything(optimizer))
    give_gradients(parameters, 8)
    optimizer.step(found_inf=torch.tensor(0.0))
    assert not same_bits(before, everything(optimizer))


@every_optimizer
@every_weight
def test_overflow_in_the_very_first_step(name, dtype, weight_precision):
    parameters = weights(dtype)
    optimizer = built(name, parameters, weight_precision, weight_decay=0.1)
    give_gradients(parameters, 0, torch.inf)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert same_bits([parameter.detach() for parameter in parameters], weights(dtype))
    for tensor in everything(optimizer):
        assert tensor.isfinite().all()
    assert optimizer.state_tensors(parameters[0])["step"] == 0


@every_optimizer
@every_weight
def test_gradient_scale_is_a_scaled_gradient(name, dtype, weight_precision):
    scaled = trained(name, dtype, weight_precision, 4, factor=256.0, gradient_scale=torch.tensor(1 / 256))
    plain = trained(name, dtype, weight_precision, 4)
    assert same_bits(everything(scaled), everything(plain))


@every_optimizer
@every_weight
def test_resumes_bit_for_bit(name, dtype, weight_precision):
    straight = trained(name, dtype, weight_precision, 8)
    first = trained(name, dtype, weight_precision, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in first.param_groups[0]["params"]]
    second = built(name, parameters, weight_precision, lr=5.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(everything(first), everything(second))
    for number in range(4, 8):
        give_gradients(parameters, number)
        second.step()
    assert same_bits(everything(straight), everything(second))


@every_optimizer
@every_weight
def test_temporaries_stay_within_a_slice(name, dtype, weight_precision, peak_temporaries):
    parameters = weights(dtype, [(1024, 256), (256, 1024)])
    slice_bytes = 1 << 18
    optimizer = built(name, parameters, weight_precision, slice_bytes)
    give_gradients(parameters, 0)
    optimizer.step()
    give_gradients(parameters, 1)
    with peak_temporaries:
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert peak_temporaries.peak_bytes <= slice_bytes + extra_temporaries(name, parameters)


def extra_temporaries(name, parameters):
    """What a projecting or orthogonalising optimizer documents beside its slices."""
    rows, columns = max(parameters[0].shape), min(parameters[0].shape)
    if name == "muon":
        size = 2 if parameters[0].dtype == torch.bfloat16 else 4
        return (3 * rows * columns + 2 * columns**2) * size
    rank = {"apollo": 8, "galore": 8, "apollo_mini": 1}.get(name, 0)
    return 8 * columns * rank + (16 * rows if "apollo" in name else 0)


def test_fp32_adamw_has_no_temporaries(peak_temporaries):
    parameters = weights(torch.float32, [(512, 512)])
    optimizer = AdamW(parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    with peak_temporaries:
        optimizer.step()
    assert peak_temporaries.peak_bytes == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
@every_weight
def test_slices_do_not_change_the_result(name, dtype, weight_precision):
    results = [
        everything(trained(name, dtype, weight_precision, 4, slice_bytes=slice_bytes))
        for slice_bytes in (1 << 14, 100_000, 1 << 26)
    ]
    assert same_bits(results[0], results[2])
    assert same_bits(results[1], results[2])


@every_optimizer
@every_weight
def test_runs_on_fake_tensors(name, dtype, weight_precision):
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in SHAPES]
        optimizer = built(name, parameters, weight_precision)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step(gradient_scale=torch.ones(()), found_inf=torch.zeros(()))
        found = sum(t.nbytes for p in parameters for t in optimizer.state_tensors(p).values())
    assert found == sum(optimizer.state_bytes(shape, dtype) for shape in SHAPES)


@every_optimizer
@every_weight
def test_state_bytes_are_those_of_the_state(name, dtype, weight_precision):
    optimizer = trained(name, dtype, weight_precision, 1)
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state_tensors(parameter)
        assert optimizer.state_bytes(parameter.shape, dtype) == sum(tensor.nbytes for tensor in state.values())
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert state["step"].dim() == 0


STEP = 4
COUNT = 1024 * 512


@pytest.mark.parametrize(
    ("name", "settings", "dtype", "weight_precision", "expected"),
    [
        ("adamw", {}, torch.float32, None, 8 * COUNT + STEP),
        ("adamw", {}, torch.bfloat16, "master", 12 * COUNT + STEP),
        ("adamw", {}, torch.bfloat16, "correction", 9 * COUNT + STEP),
        ("adamw", {}, torch.bfloat16, "stochastic", 8 * COUNT + STEP),
        ("adamw_8bit", {}, torch.float32, None, 2 * COUNT + 8 * COUNT // 256 + STEP),
        ("adamw_8bit", {}, torch.float16, "correction", 3 * COUNT + 8 * COUNT // 256 + STEP),
        ("sgd", {}, torch.float32, None, 4 * COUNT + STEP),
        ("sgd", {"momentum": 0.0}, torch.bfloat16, "stochastic", STEP),
        ("adafactor", {}, torch.bfloat16, "stochastic", 4 * (1024 + 512) + STEP),
        ("adafactor", {}, torch.bfloat16, "correction", COUNT + 4 * (1024 + 512) + STEP),
    ],
)
def test_bytes_of_state(name, settings, dtype, weight_precision, expected):
    optimizer = build(name, weights(dtype), lr=1e-3, weight_precision=weight_precision, **settings)
    assert optimizer.state_bytes((1024, 512), dtype) == expected


@every_optimizer
def test_learns_a_small_language(name):
    """Next-token prediction on a fixed cycle, in bf16 without masters: every optimizer halves the loss."""
    torch.manual_seed(0)
    tokens = torch.arange(311) * 7 % 31
    layers = nn.Embedding(31, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 31)
    model = nn.Sequential(*layers).bfloat16()
    lr = {"sgd": 0.3, "muon": 0.02, "galore": 0.05}.get(name, 0.01)
    optimizer = built(name, model.parameters(), "stochastic", lr=lr)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens[:-1]).float(), tokens[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -- groups, errors ------


def test_groups_of_different_precision():
    matrix, norm = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)), nn.Parameter(torch.ones(64))
    groups = [
        {"params": [matrix], "weight_precision": "correction", "weight_decay": 0.1},
        {"params": [norm], "lr": 1e-3},
    ]
    optimizer = build("adamw_8bit", groups, lr=1e-2)
    give_gradients([matrix, norm], 0)
    optimizer.step()
    assert "correction" in optimizer.state_tensors(matrix)
    assert "correction" not in optimizer.state_tensors(norm)
    assert (norm - 1).abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_closure_gives_the_loss():
    weight = nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (weight < 1).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adamw8bit", {}, "Did you mean 'adamw_8bit'"),
        ("adamw", {"momentum": 0.9}, "'momentum', which would have no effect"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas\[1\] must be a number from 0.0 to below 1.0; got 1.0"),
        ("adamw", {"lr": -1.0}, "lr must be"),
        ("adamw", {"lr": torch.tensor(0.1)}, "lr must be a number"),
        ("adamw", {"slice_bytes": 100}, "slice_bytes must be at least 16384"),
        ("adamw", {"weight_precision": "master"}, "float32 take no weight_precision"),
        ("adamw", {"weight_precision": "stochastics"}, "Did you mean 'stochastic'"),
        ("sgd", {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ("adafactor", {"eps": 1e-8}, "eps is a pair"),
    ],
)
def test_refuses(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, weights(torch.float32), **{"lr": 1e-3, **settings})


@pytest.mark.parametrize(
    ("dtype", "weight_precision", "message"),
    [
        (torch.bfloat16, None, "need a weight_precision"),
        (torch.float64, None, "weights are float32, bfloat16 or float16"),
    ],
)
def test_refuses_a_precision_that_does_not_fit(dtype, weight_precision, message):
    with pytest.raises(ValueError, match=message):
        AdamW(weights(dtype), weight_precision=weight_precision)


def test_a_refused_group_leaves_no_trace():
    optimizer = AdamW(weights(torch.float32))
    with pytest.raises(ValueError, match="weight_precision"):
        optimizer.add_param_group({"params": weights(torch.bfloat16)})
    assert len(optimizer.param_groups) == 1


def test_refuses_gradients_that_it_cannot_slice():
    weight = nn.Parameter(torch.zeros(4, 8))
    optimizer = AdamW([weight])
    with pytest.raises(ValueError, match="gradients must be dense, contiguous"):
        optimizer.step_parameter(weight, torch.zeros(8, 4).t(), optimizer.param_groups[0])
    with pytest.raises(ValueError, match="gradients must be dense, contiguous"):
        optimizer.step_parameter(weight, torch.zeros(4, 8).to_sparse(), optimizer.param_groups[0])


def test_refuses_a_state_that_does_not_fit():
    saved = trained("adamw", torch.float32, None, 1).state_dict()
    other = trained("adamw_8bit", torch.float32, None, 1)
    before = everything(other)
    with pytest.raises(ValueError, match="resume with the optimizer and settings that wrote it"):
        other.load_state_dict(saved)
    assert same_bits(before, everything(other))
    with pytest.raises(ValueError, match=r"sizes \[3\]; this optimizer's have \[2\]"):
        AdamW(weights(torch.float32)[:2]).load_state_dict(saved)


def test_every_name_is_a_sliced_optimizer():
    for name in NAMES:
        assert isinstance(built(name, weights(torch.float32)), MemoryLeanOptimizer)
