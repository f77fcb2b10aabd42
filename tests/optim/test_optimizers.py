"""The optimizers against PyTorch's, their state and temporaries to the byte, and what they do when gradients overflow."""

import pytest
import torch
from torch import nn

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.optim import build
from oomless.optim.base import clip_coefficient, global_gradient_norm

SHAPES = [(33, 7), (129,), (5, 3, 2), (1,)]
LOW = [torch.bfloat16, torch.float16]
SETTINGS = {
    "adamw": dict(lr=1e-2, weight_decay=0.1),
    "sgd": dict(lr=1e-2, momentum=0.9, weight_decay=0.1),
    "plain sgd": dict(lr=1e-2, momentum=0.0, weight_decay=0.1),
}
PYTORCH = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "plain sgd": torch.optim.SGD}


def make_parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_optimizer(name, parameters, **changes):
    return build(name.split()[-1], [{"params": parameters}], **{**SETTINGS[name], **changes})


def set_gradients(parameters, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = gradient * factor


def snapshot(optimizer, parameters):
    """Return copies of weights and state, in order."""
    state = [t.clone() for p in parameters for _, t in sorted(optimizer.state_tensors(p).items())]
    return [p.detach().clone() for p in parameters] + state


def same_bits(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


def train(name, parameters, steps=20, **changes):
    optimizer = make_optimizer(name, parameters, **changes)
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer


# The same steps as PyTorch.


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_as_pytorch(name):
    parameters, expected = make_parameters(), make_parameters()
    train(name, parameters)
    reference = PYTORCH[name](expected, **SETTINGS[name])
    for step in range(20):
        set_gradients(expected, step)
        reference.step()
    start = make_parameters()
    for ours, theirs, before in zip(parameters, expected, start, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert not torch.equal(ours, before)


@pytest.mark.parametrize("name", SETTINGS)
def test_groups_have_their_own_learning_rate_and_decay(name):
    parameters, expected = make_parameters(), make_parameters()
    optimizer = build(
        name.split()[-1], [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:]}], **SETTINGS[name]
    )
    set_gradients(parameters, 0)
    optimizer.step()
    assert torch.equal(parameters[0], expected[0])
    assert not torch.equal(parameters[1], expected[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_without_a_gradient_stay(name):
    parameters = make_parameters()
    optimizer = make_optimizer(name, parameters)
    set_gradients(parameters, 0)
    parameters[0].grad = None
    before = snapshot(optimizer, parameters[:1])
    optimizer.step()
    assert same_bits(snapshot(optimizer, parameters[:1]), before)
    assert optimizer.state_tensors(parameters[1])["step"] == 1


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_gradient_scale_equals_scaled_gradients(name, dtype):
    """An eighth is exact in every dtype, so only the place of the product differs."""
    scaled, expected = make_parameters(dtype), make_parameters(dtype)
    optimizers = [make_optimizer(name, parameters) for parameters in (scaled, expected)]
    for step in range(5):
        set_gradients(scaled, step)
        set_gradients(expected, step, factor=0.125)
        optimizers[0].step(gradient_scale=torch.tensor(0.125))
        optimizers[1].step()
    assert same_bits(snapshot(optimizers[0], scaled), snapshot(optimizers[1], expected))


@pytest.mark.parametrize("name", SETTINGS)
def test_any_gradient_scale(name):
    scaled, expected = make_parameters(), make_parameters()
    optimizers = [make_optimizer(name, parameters) for parameters in (scaled, expected)]
    set_gradients(scaled, 0)
    set_gradients(expected, 0, factor=0.3)
    optimizers[0].step(gradient_scale=torch.tensor(0.3))
    optimizers[1].step()
    torch.testing.assert_close(snapshot(optimizers[0], scaled), snapshot(optimizers[1], expected))


# Overflow.


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [None, 0.5, float("nan")])
def test_an_overflow_changes_nothing(name, dtype, bad, scale):
    parameters = make_parameters(dtype)
    optimizer = train(name, parameters, steps=2)
    before = snapshot(optimizer, parameters)
    set_gradients(parameters, 9, factor=bad)
    scale = None if scale is None else torch.tensor(scale)
    optimizer.step(gradient_scale=scale, found_inf=torch.tensor(1.0))
    assert same_bits(snapshot(optimizer, parameters), before)
    set_gradients(parameters, 9)
    optimizer.step(found_inf=torch.tensor(0.0))
    assert not same_bits(snapshot(optimizer, parameters), before)
    assert optimizer.state_tensors(parameters[0])["step"] == 3


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_no_overflow_is_a_plain_step(name, dtype):
    flagged, plain = make_parameters(dtype), make_parameters(dtype)
    optimizers = [make_optimizer(name, parameters) for parameters in (flagged, plain)]
    for step in range(3):
        for parameters in (flagged, plain):
            set_gradients(parameters, step)
        optimizers[0].step(found_inf=torch.tensor(0.0))
        optimizers[1].step()
    assert same_bits(snapshot(optimizers[0], flagged), snapshot(optimizers[1], plain))


# Masters and slices.


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_master_takes_updates_that_the_weight_alone_would_lose(name, dtype):
    small = dict(lr=1e-5, weight_decay=0.0)
    low = [nn.Parameter(torch.ones(64, dtype=dtype))]
    full = [nn.Parameter(torch.ones(64))]
    optimizers = [make_optimizer(name, parameters, **small) for parameters in (low, full)]
    alone = torch.ones(64, dtype=dtype)
    for _ in range(500):
        for parameters, optimizer in zip((low, full), optimizers, strict=True):
            parameters[0].grad = torch.ones_like(parameters[0])
            before = full[0].detach().clone()
            optimizer.step()
        alone += (full[0].detach() - before).to(dtype)
    assert same_bits([optimizers[0].state_tensors(low[0])["master"]], [full[0].detach()])
    assert same_bits([low[0].detach()], [full[0].detach().to(dtype)])
    assert (low[0] < 1).all()
    if name != "sgd":  # momentum makes the single update large enough for fp16
        assert (alone == 1).all()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_size_of_a_slice_changes_no_bit(name, dtype):
    whole = make_parameters(dtype, [(40, 31), (1000,)])
    expected = snapshot(train(name, whole, steps=5), whole)
    for slice_bytes in (1, 256, 1000, 4096):
        sliced = make_parameters(dtype, [(40, 31), (1000,)])
        optimizer = train(name, sliced, steps=5, slice_bytes=slice_bytes)
        assert optimizer.slice_elements < 1240
        assert same_bits(snapshot(optimizer, sliced), expected)


# Bytes. Everything that the allocator books is a multiple of 512.

ROWS, COLUMNS = 96, 128  # 48 KiB in fp32
SCALAR = 512


def measure(name, dtype, *, fake=False, scaled=False, slice_bytes=8192):
    """Return the bytes of the state of one matrix, and the most that two steps hold above weights and state."""
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active():
        parameter = nn.Parameter(torch.ones(ROWS, COLUMNS, dtype=dtype))
        before = gpu.usage().allocated_bytes
        optimizer = make_optimizer(name, [parameter], slice_bytes=slice_bytes)
        state = gpu.usage().allocated_bytes - before
        parameter.grad = torch.ones_like(parameter)
        arguments = dict(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0)) if scaled else {}
        held = gpu.usage().allocated_bytes
        gpu.reset_peak()
        optimizer.step(**arguments)
        optimizer.step(**arguments)
        assert gpu.usage().allocated_bytes == held
        return state, gpu.usage().peak_allocated_bytes - held


@pytest.mark.parametrize(
    ("name", "dtype", "state_bytes"),
    [
        ("adamw", torch.float32, 8),
        ("adamw", torch.bfloat16, 12),
        ("adamw", torch.float16, 12),
        ("sgd", torch.float32, 4),
        ("sgd", torch.bfloat16, 8),
        ("plain sgd", torch.float32, 0),
        ("plain sgd", torch.float16, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_bytes_of_state_and_step_are_exact(name, dtype, state_bytes, scaled):
    state, temporaries = measure(name, dtype, scaled=scaled)
    assert state == state_bytes * ROWS * COLUMNS + SCALAR
    scalars = 1 + scaled  # the kernel's copy of the step count; the inverse of the scale
    assert temporaries == scalars * SCALAR + (0 if dtype == torch.float32 else 8192)
    if dtype != torch.float32:
        assert measure(name, dtype, scaled=scaled, slice_bytes=16384)[1] == scalars * SCALAR + 16384
    assert measure(name, dtype, scaled=scaled, fake=True) == (state, temporaries)


# Saving and loading.


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_state_goes_round_bit_for_bit_in_the_middle_of_training(name, dtype):
    parameters = make_parameters(dtype)
    optimizer = train(name, parameters, steps=3)
    resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
    second = make_optimizer(name, resumed)
    for old, new in zip(parameters, resumed, strict=True):
        second.load_state_tensors(new, {k: t.clone() for k, t in optimizer.state_tensors(old).items()})
    for step in range(3, 6):
        for leaves, stepping in ((parameters, optimizer), (resumed, second)):
            set_gradients(leaves, step)
            stepping.step()
    assert same_bits(snapshot(second, resumed), snapshot(optimizer, parameters))


def test_state_of_another_optimizer_is_refused():
    parameter = nn.Parameter(torch.ones(4, 2))
    optimizer = make_optimizer("adamw", [parameter])
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors(parameter).items()}
    before = snapshot(optimizer, [parameter])
    other = nn.Parameter(torch.ones(4, 2))
    wrong = [
        {},
        {name: tensor for name, tensor in state.items() if name != "exp_avg"},
        {**state, "master": torch.ones(4, 2)},
        {**state, "exp_avg": torch.ones(2, 4)},
        {**state, "exp_avg": torch.ones(4, 2, dtype=torch.bfloat16)},
        make_optimizer("sgd", [other]).state_tensors(other),
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="must be"):
            optimizer.load_state_tensors(parameter, tensors)
    assert same_bits(snapshot(optimizer, [parameter]), before)


def test_pytorchs_way_to_load_state_is_refused():
    optimizer = make_optimizer("adamw", make_parameters(torch.bfloat16))
    with pytest.raises(NotImplementedError, match="load_state_tensors"):
        optimizer.load_state_dict(optimizer.state_dict())


# Clipping.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_norm_and_clipping_as_pytorch(dtype, max_norm):
    parameters = make_parameters(dtype)
    set_gradients(parameters, 0)
    parameters.append(nn.Parameter(torch.ones(3)))  # without a gradient
    ours = global_gradient_norm(parameters)
    coefficient = clip_coefficient(ours, max_norm)
    exact = make_parameters()
    for low, full in zip(parameters, exact, strict=False):
        full.grad = low.grad.float()
    before = [p.grad.clone() for p in exact]
    norm = nn.utils.clip_grad_norm_(exact, max_norm)
    assert ours.dtype == coefficient.dtype == torch.float32
    torch.testing.assert_close(ours, norm)
    for gradient, parameter in zip(before, exact, strict=True):
        torch.testing.assert_close(gradient * coefficient, parameter.grad)


def test_a_norm_beyond_half_precision_is_finite():
    parameter = nn.Parameter(torch.ones(10000, dtype=torch.float16))
    parameter.grad = torch.full_like(parameter, 60000.0)
    assert global_gradient_norm([parameter]) == pytest.approx(6e6, rel=1e-5)


@pytest.mark.parametrize("fake", [False, True])
def test_a_norm_books_only_scalars(fake):
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active():
        parameters = [nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16)) for _ in range(3)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        held = gpu.usage().allocated_bytes
        gpu.reset_peak()
        clip_coefficient(global_gradient_norm(parameters), 1.0)
        assert gpu.usage().peak_allocated_bytes - held == (3 + 2) * SCALAR


def test_unknown_optimizer_or_setting():
    with pytest.raises(KeyError):
        build("adam", [{"params": make_parameters()}], lr=1.0)
    with pytest.raises(TypeError, match="momentum"):
        build("adamw", [{"params": make_parameters()}], lr=1.0, momentum=0.9)
