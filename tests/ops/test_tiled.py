"""A module run over tiles of the tokens: its own results and gradients, the memory of one tile."""

import copy

import pytest
import torch
from torch import nn

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.tiled import tiled


class MLP(nn.Module):
    def __init__(self, dropout=0.0, dtype=torch.float64, width=8, inner=16):
        super().__init__()
        self.up = nn.Linear(width, inner, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.down(self.dropout(torch.sigmoid(self.up(x))))


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64).to(dtype), torch.randn(*shape, dtype=torch.float64).to(dtype)


def backward(module, x, gradient, run):
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("tiles", [2, 3, 100])
@pytest.mark.parametrize("shape", [(2, 5, 8), (7, 8), (1, 1, 8)], ids=str)
def test_is_the_module(shape, tiles):
    plain = MLP()
    lean = copy.deepcopy(plain)
    x, gradient = inputs(*shape)
    ours = backward(lean, x, gradient, lambda x: tiled(lean, lean, x, tiles=tiles))
    for one, other in zip(ours, backward(plain, x, gradient, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    module = MLP()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, *_: tiled(module, module, x, tiles=4), (x, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_three_ways(dtype):
    """Four tiles in 16 bits: no further from float64 than as many micro-batches are, and than a rounding per tile allows."""
    exact = MLP(width=32, inner=48)
    x, gradient = inputs(1, 64, 32)
    x, gradient = x.to(dtype), gradient.to(dtype)
    naive, lean = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    exact.load_state_dict({name: value.double() for name, value in naive.state_dict().items()})
    truth = backward(exact, x.double(), gradient.double(), exact)
    near = backward(naive, x, gradient, naive)
    ours = backward(lean, x, gradient, lambda x: tiled(lean, lean, x, tiles=4))
    eps = torch.finfo(dtype).eps
    for place, (true, theirs, made) in enumerate(zip(truth, near, ours, strict=True)):
        roundings = 0 if place < 2 else 4
        bound = (theirs - true).abs().max() + roundings * eps / 2 * true.abs().max() + eps * true.abs().max() / 8
        assert (made - true).abs().max() <= bound


@pytest.mark.parametrize("destination", ["new", "final"])
def test_hooks_fire_once_and_gradients_accumulate(destination):
    plain, lean = MLP(), MLP()
    lean.load_state_dict(plain.state_dict())
    seen = []
    for parameter in lean.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x, gradient = inputs(2, 5, 8)
    for _ in range(2):
        seen.clear()
        plain(x).backward(gradient)
        tiled(lean, lean, x, tiles=3, destination=destination).backward(gradient)
    assert len(seen) == 3
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert any(torch.equal(ours.grad, gradient) for gradient in seen)


def test_frozen_parts_get_nothing():
    module = MLP()
    module.down.weight.requires_grad_(False)
    x, gradient = inputs(2, 5, 8)
    tiled(module, module, x, tiles=3).backward(gradient)
    assert module.down.weight.grad is None
    assert module.up.weight.grad is not None
    module.requires_grad_(False)
    assert not tiled(module, module, x, tiles=3).requires_grad


def test_dropout_is_the_same_in_backward():
    """With x of ones and an identity, the gradient of x is the mask that forward drew."""
    module = nn.Dropout(0.5)
    x = torch.ones(4, 8, requires_grad=True)
    torch.manual_seed(3)
    y = tiled(module, module, x, tiles=2, preserve_rng_state=True)
    torch.rand(5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x.grad, y.detach())
    assert 0 < int((y == 0).sum()) < y.numel()


def test_parameters_are_back_in_place_after_an_error():
    module = MLP()
    weight = module.up.weight
    x, gradient = inputs(2, 5, 8)
    calls = []

    def fails_later(x):
        calls.append(x)
        if len(calls) > 2:
            raise ValueError("later")
        return module(x)

    y = tiled(fails_later, module, x.requires_grad_(), tiles=2)
    with pytest.raises(ValueError, match="later"):
        y.backward(gradient)
    assert module.up.weight is weight


def test_a_retained_graph_can_be_used_again():
    module = MLP()
    x = torch.ones(1, 4, 8, dtype=torch.float64, requires_grad=True)
    y = tiled(module, module, x, tiles=2).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        y.backward()


def test_bytes():
    """Nothing but x is kept; backward takes one tile's inner numbers, and no second gradient of a matrix."""
    gpu = VirtualGPU(1 << 30)
    tokens, width, inner, tiles = 1024, 256, 1024, 8
    with gpu.active():
        module = MLP(width=width, inner=inner, dtype=torch.float32)
        x = torch.randn(1, tokens, width, requires_grad=True)
        before = gpu.usage().allocated_bytes
        gpu.reset_peak()
        y = tiled(module, module, x, tiles=tiles)
        row = tokens * 4
        tile = row // tiles
        assert gpu.usage().allocated_bytes - before == width * row
        # Of a tile: what goes into the activation and what comes out of it.
        assert gpu.usage().peak_allocated_bytes - before == width * row + 2 * inner * tile
        gradient = torch.ones_like(y)
        held = gpu.usage().allocated_bytes
        gpu.reset_peak()
        y.backward(gradient)
        matrix = 4 * inner * width
        made = width * row + 2 * matrix + 4 * inner
        assert gpu.usage().allocated_bytes - held == made
        # While a matrix's gradient of one tile is added to that of the others.
        assert gpu.usage().peak_allocated_bytes - held == made + matrix + (2 * inner + width) * tile
