"""RMSNorm in its three forms: autograd's results, fewer bytes, the same recomputation."""

import pytest
import torch
from torch import nn

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops import rms_norm as module
from oomless.ops.recompute import recomputing
from oomless.ops.rms_norm import rms_norm

FORMS = {
    "llama": dict(round_first=True),
    "gemma": dict(round_first=False, unit_offset=True),
    "olmo": dict(round_first=False),
}
EPS = 1e-6


def plain(x, weight, form):
    """The lines that the operator's docstring gives."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if form == "llama":
        return weight * normal.to(x.dtype)
    return (normal * (1.0 + weight.to(wide.dtype) if form == "gemma" else weight)).to(x.dtype)


def inputs(shape, dtype, seed=0):
    torch.manual_seed(seed)
    x, weight, gradient = torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5, torch.randn(shape)
    return [tensor.to(dtype) for tensor in (x, weight, gradient)]


def results(function, x, weight, gradient):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    y.backward(gradient)
    return y.detach(), x.grad, weight.grad


@pytest.fixture(params=[1 << 24, 1 << 12], ids=["whole", "slices"])
def _slices(request, monkeypatch):
    monkeypatch.setattr(module, "SLICE_BYTES", request.param)


@pytest.mark.usefixtures("_slices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 37, 96), (1, 1, 8), (300, 33)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_three_ways(form, shape, dtype):
    """Against float64: the forward is the plain one to the bit, gradients are at least as near as autograd's."""
    x, weight, gradient = inputs(shape, dtype)
    truth = results(lambda x, w: plain(x, w, form), x.double(), weight.double(), gradient.double())
    naive = results(lambda x, w: plain(x, w, form), x, weight, gradient)
    lean = results(lambda x, w: rms_norm(x, w, eps=EPS, **FORMS[form]), x, weight, gradient)
    assert torch.equal(lean[0], naive[0])
    for true, near, ours in zip(truth[1:], naive[1:], lean[1:], strict=True):
        assert ours.dtype == dtype
        scale = true.abs().max() * torch.finfo(dtype).eps
        assert (ours - true).abs().max() <= (near - true).abs().max() + scale / 2
        assert (ours - true).norm() <= (near - true).norm() * 1.02 + 1e-12


@pytest.mark.usefixtures("_slices")
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x, weight, _ = inputs((2, 5, 8), torch.float64)
    torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, eps=EPS, **FORMS[form]), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_chosen_gradients(trained):
    x, weight, gradient = inputs((4, 8), torch.float32)
    (x if trained == "x" else weight).requires_grad_()
    rms_norm(x, weight, eps=EPS).backward(gradient)
    expected = results(lambda x, w: plain(x, w, "llama"), x.detach(), weight.detach(), gradient)
    for tensor, wanted in ((x, expected[1]), (weight, expected[2])):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, wanted)
        else:
            assert tensor.grad is None


def kept_bytes(run):
    """Bytes on the device after ``run``, which returns what keeps its graph, beyond those before it."""
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        x = torch.randn(128, 256).bfloat16().requires_grad_()
        norm_weight = torch.ones(256, dtype=torch.bfloat16, requires_grad=True)
        projections = [nn.Linear(256, 128, bias=False, dtype=torch.bfloat16) for _ in range(3)]
        before = gpu.usage().allocated_bytes
        outputs = run(x, norm_weight, projections)
        after = gpu.usage().allocated_bytes - sum(y.nbytes for y in outputs)
        sum(y.sum() for y in outputs).backward()
    return after - before


def test_what_is_kept():
    """x is the caller's; beyond it: 4 bytes per token, and the output where it is not computed again."""

    def lean(x, weight, projections):
        normal = rms_norm(x, weight, eps=EPS)
        return [projection(normal) for projection in projections]

    def lean_and_recomputed(x, weight, projections):
        with recomputing():
            return lean(x, weight, projections)

    def autograd(x, weight, projections):
        normal = plain(x, weight, "llama")
        return [projection(normal) for projection in projections]

    numbers, tokens = 128 * 256, 128
    assert kept_bytes(lean_and_recomputed) == 4 * tokens
    assert kept_bytes(lean) == 4 * tokens + 2 * numbers
    assert kept_bytes(autograd) == 4 * tokens + (4 + 2 + 2) * numbers
