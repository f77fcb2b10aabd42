"""Norms, gated products and rotary embeddings in one kernel: Triton's interpreter runs the very kernels here, and a rehearsal counts their operators."""

import pytest
import torch

from oomless.ops import gated_product as products
from oomless.ops import layer_kernels
from oomless.ops import rms_norm as norms
from oomless.ops import rotary as rotations
from oomless.ops.gated_product import FUSED, gated_product
from oomless.ops.rms_norm import rms_norm
from oomless.ops.rotary import rotary

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
FORMS = {
    "llama": {"round_first": True},
    "gemma": {"round_first": False, "unit_offset": True},
    "olmo": {"round_first": False},
}
every_dtype = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


@pytest.fixture
def on_kernels(monkeypatch):
    """Operators of CPU tensors go to the kernels, which the interpreter runs, several tiles a program."""
    monkeypatch.setattr(layer_kernels, "TILE", 256)
    monkeypatch.setattr(rotations, "_OPERATOR", layer_kernels.rotary)
    for module, name in ((norms, "rms_norm"), (products, "gated_product")):
        monkeypatch.setattr(module, "_FORWARD", getattr(layer_kernels, name))
        monkeypatch.setattr(module, "_BACKWARD", getattr(layer_kernels, f"{name}_backward"))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function, tensors, gradient):
    """The output and the gradients of ``tensors``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_exact(ours, plain, tensors, gradient):
    """The errors against fp64 are at most those of ``plain`` in the type of ``tensors``."""
    exact = results(plain, [tensor.double() for tensor in tensors], gradient.double())
    for own, near, true in zip(results(ours, tensors, gradient), results(plain, tensors, gradient), exact, strict=True):
        assert own.dtype == near.dtype
        error, allowed = (own - true).abs(), (near - true).abs()
        rounding = torch.finfo(FP32).eps * true.abs()  # plain forms fuse a product with a sum, the interpreter none
        assert error.mean() <= 1.01 * allowed.mean() + rounding.mean()
        assert error.max() <= 1.1 * allowed.max() + 4 * rounding.max()


def plain_norm(x, weight, round_first, unit_offset=False):
    wide = x.to(torch.promote_types(x.dtype, FP32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if round_first:
        return weight * normal.to(x.dtype)
    return (normal * (1 + weight.to(wide.dtype) if unit_offset else weight)).to(x.dtype)


@every_dtype
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_is_as_exact_as_its_plain_form(form, dtype, on_kernels):
    x, weight, gradient = (
        t.to(dtype) for t in (numbers(2, 10, 100) * 3, numbers(100, seed=1), numbers(2, 10, 100, seed=2))
    )
    ours = lambda x, w: rms_norm(x, w, eps=EPS, fused=x.dtype != torch.float64, **FORMS[form])  # noqa: E731
    assert_as_exact(ours, lambda x, w: plain_norm(x, w, **FORMS[form]), [x, weight], gradient)
    if dtype != FP32:  # whose sums have another order
        assert torch.equal(ours(x, weight), plain_norm(x, weight, **FORMS[form]))


@every_dtype
@pytest.mark.parametrize("activation", FUSED)
def test_a_gated_product_is_as_exact_as_its_plain_form(activation, dtype, on_kernels):
    gate, up, gradient = (numbers(2, 2, 200, seed=seed).to(dtype) * 3 for seed in range(3))
    function, _ = FUSED[activation]
    ours = lambda g, u: gated_product(g, u, function, fused=activation if g.dtype != torch.float64 else None)  # noqa: E731
    assert_as_exact(ours, lambda g, u: function(g) * u, [gate, up], gradient)


def plain_rotary(x, cos, sin):
    """The lines that the operator's docstring gives, for what is rotated."""
    left, right = x[..., : cos.shape[-1]].chunk(2, -1)
    turned = torch.cat([left, right], -1) * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
    return torch.cat([turned, x[..., cos.shape[-1] :]], -1)


@every_dtype
@pytest.mark.parametrize("width", [24, 18])
def test_a_rotation_is_as_exact_as_its_plain_form(width, dtype, on_kernels):
    """Of all of a head or a part of it, by angles that both blocks share."""
    x, gradient = (numbers(2, 3, 7, 24, seed=seed).to(dtype).transpose(1, 2) for seed in range(2))
    cos, sin = (numbers(1, 3, width, seed=seed).to(dtype) for seed in (2, 3))

    def of(function):
        return lambda x: function(x, cos.to(x.dtype), sin.to(x.dtype))

    exact = of(plain_rotary)
    assert_as_exact(lambda x: exact(x) if x.dtype == torch.float64 else of(rotary)(x), exact, [x], gradient)
    assert rotary(x, cos, sin).stride() == x.stride()


def test_where_numbers_lie_is_no_matter(on_kernels):
    """Parts of a wider row, a gradient that is one number, tensors of which one is frozen, a stream that is wider than the weights."""
    both = numbers(2, 3, 120)
    for x, weight, gradient in (
        (both[..., :50], numbers(50), numbers(2, 3, 50)),
        (both.transpose(0, 2), numbers(2), torch.ones(()).expand(120, 3, 2)),
    ):
        lean, fused = (
            results(lambda x, w, f=f: rms_norm(x, w, eps=EPS, fused=f), [x, weight], gradient) for f in (0, 1)
        )
        torch.testing.assert_close(fused, lean, rtol=1e-5, atol=1e-5)
    function, _ = FUSED["silu"]
    gradient = numbers(2, 3, 60)
    lean, fused = (
        results(lambda b, f=f: gated_product(*b.chunk(2, -1), function, fused=f), [both], gradient)
        for f in (None, "silu")
    )
    torch.testing.assert_close(fused, lean, rtol=1e-5, atol=1e-6)
    for frozen in (0, 1):
        x, weight = both.clone().requires_grad_(frozen == 1), numbers(120).requires_grad_(frozen == 0)
        found = []
        for way in (False, True):
            y = rms_norm(x, weight, eps=EPS, fused=way) + gated_product(
                x, both + weight, function, fused=way and "silu" or None
            )
            found.append(torch.autograd.grad(y.sum(), x if frozen else weight))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)
    x, weight = numbers(3, 50) * 3, numbers(50).to(FP16)
    lean, fused = (
        results(lambda x, w, f=f: rms_norm(x, w, eps=EPS, dtype=FP16, fused=f), [x, weight], x) for f in (0, 1)
    )
    assert [t.dtype for t in fused] == [FP16, FP32, FP16]
    torch.testing.assert_close(fused, lean, rtol=1e-3, atol=1e-5)
