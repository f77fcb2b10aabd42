"""The gated product: autograd's results to the bit, half the bytes."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops import gated_product as module
from oomless.ops.gated_product import gated_product
from oomless.ops.recompute import recomputing


def results(function, tensors, gradient):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("slice_bytes", [1 << 24, 1 << 10], ids=["whole", "slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu2"])
def test_is_autograd(name, dtype, slice_bytes, monkeypatch):
    monkeypatch.setattr(module, "SLICE_BYTES", slice_bytes)
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(2, 33, 24).to(dtype) for _ in range(3))
    activation = ACT2FN[name]
    plain = results(lambda g, u: activation(g) * u, (gate, up), gradient)
    lean = results(lambda g, u: gated_product(g, u, activation), (gate, up), gradient)
    assert torch.equal(lean[0], plain[0])
    for ours, theirs in zip(lean[1:], plain[1:], strict=True):
        # A CPU's vectors end elsewhere in a slice, and what is left over takes another route to the last bit.
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert slice_bytes == 1 << 10 or torch.equal(ours, theirs)


def test_gradcheck():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda g, u: gated_product(g, u, functional.silu), (gate, up))


def test_of_halves_of_one_matrix():
    both, gradient = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    plain = results(lambda b: functional.silu(b.chunk(2, -1)[0]) * b.chunk(2, -1)[1], (both,), gradient)
    lean = results(lambda b: gated_product(*b.chunk(2, -1), functional.silu), (both,), gradient)
    for ours, theirs in zip(lean, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_a_frozen_side_gets_no_gradient():
    gate, up = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    gated_product(gate, up, functional.silu).sum().backward()
    assert gate.grad is None
    torch.testing.assert_close(up.grad, functional.silu(gate))


@pytest.mark.parametrize(("way", "kept"), [("autograd", 4), ("lean", 3), ("recomputed", 2)])
def test_what_is_kept(way, kept):
    """Of gate, up, the activation and the product, each 64 KiB: all four, three, or gate and up alone."""
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        x = torch.randn(128, 64, requires_grad=True).bfloat16().detach().requires_grad_()
        gate_proj, up_proj = (nn.Linear(64, 256, bias=False, dtype=torch.bfloat16) for _ in range(2))
        down_proj = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        before = gpu.usage().allocated_bytes
        if way == "autograd":
            y = down_proj(functional.silu(gate_proj(x)) * up_proj(x))
        elif way == "lean":
            y = down_proj(gated_product(gate_proj(x), up_proj(x), functional.silu))
        else:
            with recomputing():
                y = down_proj(gated_product(gate_proj(x), up_proj(x), functional.silu))
        assert gpu.usage().allocated_bytes - before - y.nbytes == kept * 128 * 256 * 2
        y.sum().backward()
