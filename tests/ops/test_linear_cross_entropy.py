"""The head and its loss against the plain lines it replaces: values, gradients, rounding, bytes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.linear_cross_entropy import _Work, linear_cross_entropy

TOKENS, VOCABULARY, WIDTH = 13, 37, 7
MIB = 1 << 20


def plain(
    hidden, weight, targets, *, bias=None, scale=1.0, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0
):
    """The lines in the head docstring, with torch's own smoothing and the z-loss written out."""
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing)
    return scale * (loss + z_loss * (logits.logsumexp(dim=1) ** 2)[targets != -100].sum())


def make_inputs(tokens=TOKENS, vocabulary=VOCABULARY, width=WIDTH, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, weight, bias, targets


def loss_and_gradients(function, inputs, needs=(True, True, True), **settings):
    """Return the loss and the gradients of hidden, weight and bias, None where not asked for."""
    hidden, weight, bias, targets = inputs
    leaves = [
        t if t is None else t.detach().clone().requires_grad_(needed)
        for t, needed in zip((hidden, weight, bias), needs, strict=True)
    ]
    loss = function(leaves[0], leaves[1], targets, bias=leaves[2], **settings)
    if any(leaf is not None and leaf.requires_grad for leaf in leaves):
        loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def assert_same(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=tolerance)
    for our_gradient, gradient in zip(ours[1], expected[1], strict=True):
        assert (our_gradient is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(our_gradient, gradient, rtol=tolerance, atol=tolerance)


# Equality with the plain lines.


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCABULARY * 3, 64 * MIB], ids=["row", "three rows", "whole"])
def test_equals_the_plain_lines(needs, chunk_bytes):
    inputs = make_inputs()
    ours = loss_and_gradients(linear_cross_entropy, inputs, needs, chunk_bytes=chunk_bytes)
    assert ours[0].dtype == torch.float32
    assert ours[0].shape == ()
    assert_same(ours, loss_and_gradients(plain, inputs, needs))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 5), (13, 1, 5), (31, 2, 1), (64, 129, 33)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 64 * MIB])
def test_odd_shapes(shape, chunk_bytes):
    inputs = make_inputs(*shape)
    ours = loss_and_gradients(linear_cross_entropy, inputs, chunk_bytes=chunk_bytes)
    assert_same(ours, loss_and_gradients(plain, inputs))


@pytest.mark.parametrize(
    "settings",
    [
        dict(softcap=3.0),
        dict(logit_scale=0.3),
        dict(softcap=2.0, logit_scale=1.7),
        dict(scale=0.25),
        dict(scale=torch.tensor(17.0)),
        dict(scale=torch.tensor(0.5), softcap=5.0, logit_scale=0.5),
        dict(label_smoothing=0.1),
        dict(z_loss=1e-2),
        dict(scale=0.5, softcap=5.0, logit_scale=0.5, label_smoothing=0.2, z_loss=1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [500, 64 * MIB])
def test_settings(settings, with_bias, chunk_bytes):
    hidden, weight, bias, targets = make_inputs()
    inputs = (hidden, weight, bias if with_bias else None, targets)
    ours = loss_and_gradients(linear_cross_entropy, inputs, chunk_bytes=chunk_bytes, **settings)
    assert_same(ours, loss_and_gradients(plain, inputs, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 500, 64 * MIB])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_in_the_place_of_the_weights(chunk_bytes, with_bias, dtype):
    hidden, weight, bias, targets = make_inputs(dtype=dtype)
    bias = bias if with_bias else None
    ids = torch.tensor([3, 36, 0, 11])
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = []
    for function in (linear_cross_entropy, plain):
        leaves = [hidden.clone().requires_grad_(), rows.clone().requires_grad_()]
        settings = dict(bias=bias, scale=0.5, softcap=4.0)
        if function is plain:
            loss = plain(leaves[0], weight.index_copy(0, ids, leaves[1]), targets, **settings)
        else:
            chunks = dict(chunk_bytes=chunk_bytes)
            loss = linear_cross_entropy(leaves[0], weight, targets, rows=leaves[1], row_ids=ids, **settings, **chunks)
        loss.backward()
        found.append((loss.detach(), [leaf.grad for leaf in leaves]))
    assert_same(*found, tolerance=1e-5 if dtype == torch.float32 else 6e-2)


def test_rows_beside_a_weight_that_trains():
    hidden, weight, _, targets = make_inputs()
    with pytest.raises(ValueError, match="must not want a gradient"):
        linear_cross_entropy(
            hidden, weight.requires_grad_(), targets, rows=torch.zeros(1, WIDTH), row_ids=torch.tensor([0])
        )


@pytest.mark.parametrize("chunk_bytes", [1, 4 * TOKENS * 2, 64 * MIB])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("extra", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)], ids=str)
def test_by_columns_fp32_would_have_the_plain_gradients_too(chunk_bytes, softcap, extra):
    inputs = make_inputs()
    settings = dict(softcap=softcap, logit_scale=0.5, label_smoothing=extra[0], z_loss=extra[1])
    work = _Work(*inputs, chunk_bytes=chunk_bytes, gradients=True, destination="new", **settings)
    loss, gradients = work.by_columns(torch.tensor(2.0), None, True, True)
    expected = loss_and_gradients(plain, inputs, scale=2.0, **settings)
    assert_same((loss * 2, gradients[:3]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_targets_ignored(dtype):
    hidden, weight, bias, targets = make_inputs(dtype=dtype)
    inputs = (hidden, weight, bias, torch.full_like(targets, -100))
    loss, gradients = loss_and_gradients(linear_cross_entropy, inputs, chunk_bytes=300)
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype):
    hidden, weight, bias, targets = make_inputs(dtype=dtype)
    loss, gradients = loss_and_gradients(linear_cross_entropy, (hidden[:0], weight, bias, targets[:0]))
    assert loss == 0
    assert [tuple(g.shape) for g in gradients] == [(0, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("chunk_bytes", [1, 700])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_double_precision(chunk_bytes, softcap):
    hidden, weight, bias, targets = make_inputs(6, 11, 3, torch.float64)

    class Again(torch.autograd.Function):
        """gradcheck goes backward many times, so every backward computes the loss anew."""

        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return Again.loss(*leaves)

        @staticmethod
        def backward(ctx, gradient):
            leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(Again.loss(*leaves), leaves, gradient)

        @staticmethod
        def loss(hidden, weight, bias):
            settings = dict(scale=0.7, softcap=softcap, logit_scale=1.3, chunk_bytes=chunk_bytes)
            loss = linear_cross_entropy(hidden, weight, targets, bias=bias, **settings)
            assert loss.dtype == torch.float64
            return loss

    assert torch.autograd.gradcheck(Again.apply, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_gradient_from_above_multiplies():
    inputs = make_inputs()
    ours = loss_and_gradients(lambda *args, **kwargs: 3 * linear_cross_entropy(*args, **kwargs), inputs)
    assert_same(ours, loss_and_gradients(plain, inputs, scale=3.0))


def test_second_backward_is_refused():
    hidden, weight, _, targets = make_inputs()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


# Rounding.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("chunk_bytes", [6 * 40 * 24, 64 * MIB], ids=["many chunks", "one chunk"])
def test_no_less_exact_than_plain_in_low_precision(dtype, needs, softcap, chunk_bytes):
    inputs = make_inputs(96, 200, 32, dtype)
    settings = dict(scale=8.0, softcap=softcap, logit_scale=0.5)
    truth = loss_and_gradients(plain, [t if t.dtype == torch.int64 else t.float() for t in inputs], needs, **settings)
    naive = loss_and_gradients(plain, inputs, needs, **settings)
    ours = loss_and_gradients(linear_cross_entropy, inputs, needs, chunk_bytes=chunk_bytes, **settings)
    for true, rough, own in zip([truth[0], *truth[1]], [naive[0], *naive[1]], [ours[0], *ours[1]], strict=True):
        if true is None:
            continue
        assert own.dtype == rough.dtype
        # By columns each chunk's share of the hidden gradient is rounded before it is summed in fp32.
        tolerance = 2 * torch.finfo(dtype).eps * true.abs().clamp_min(true.abs().mean())
        assert ((own.float() - true).abs() <= (rough.float() - true).abs() + tolerance).all()


@pytest.mark.parametrize("needs", [(False, True, False), (True, False, False)], ids=["by columns", "by rows"])
def test_scale_saves_the_softmax_from_vanishing_in_half_precision(needs):
    """16 words hold 90 % of the softmax; over 2,048 tokens, each of the rest holds less than fp16's smallest number."""
    tokens, common, rare, width, loss_scale = 2048, 16, 4080, 2, 2.0**16
    weight = torch.tensor([-1.0, 1.0]).repeat(common + rare, 1)
    weight[:common] = math.log(0.9 / common / (0.1 / rare)) / width
    inputs = [torch.ones(tokens, width), weight, None, torch.arange(tokens) % common]
    _, truth = loss_and_gradients(plain, inputs, needs, scale=1 / tokens)
    half = [t.half() if t is not None and t.is_floating_point() else t for t in inputs]

    def worst_error(scale):
        _, gradients = loss_and_gradients(linear_cross_entropy, half, needs, scale=scale)
        which = needs.index(True)
        true, own = truth[which], gradients[which].float() / (scale * tokens)
        return ((own - true).abs() / true.abs())[-rare:].max().item()

    assert worst_error(1 / tokens) > 0.3
    assert worst_error(loss_scale / tokens) < 0.01


# Work and bytes.


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
        return function(*args, **(kwargs or {}))


def products(needs, dtype, no_grad=False):
    hidden, weight, _, targets = make_inputs(dtype=dtype)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    with torch.set_grad_enabled(not no_grad), CountProducts() as count:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (any(needs) and not no_grad)
    return count.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_gradients_asked_for_are_computed(dtype):
    by_columns = dtype == torch.bfloat16
    assert products((True, True), dtype) == 3 + by_columns
    assert products((False, True), dtype) == 2 + by_columns
    assert products((True, False), dtype) == 2
    assert products((False, False), dtype) == 1
    assert products((True, True), dtype, no_grad=True) == 1


def rounded(size_bytes):
    """What the caching allocator books for a tensor."""
    return max(512, -(-size_bytes // 512) * 512)


def peak(tokens, vocabulary, width, dtype, needs, *, fake=False, backward=True, **settings):
    """Return the most bytes held above the inputs during the loss and its backward."""
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active():
        hidden = torch.ones(tokens, width, dtype=dtype).requires_grad_(needs[0])
        weight = torch.ones(vocabulary, width, dtype=dtype).requires_grad_(needs[1])
        targets = torch.zeros(tokens, dtype=torch.int64)
        gpu.reset_peak()
        before = gpu.usage().allocated_bytes
        loss = linear_cross_entropy(hidden, weight, targets, **settings)
        if backward and any(needs):
            loss.backward()
        return gpu.usage().peak_allocated_bytes - before


N, V, D = 64, 1024, 32
SMALL = 16  # at most this many tensors of one number a token are alive at once
CHUNK = 32 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_peak_is_the_chunk_and_the_gradients(dtype, needs, softcap):
    size = dtype.itemsize
    gradients = (N * D * size if needs[0] else 0) + (V * D * size if needs[1] else 0)
    if needs == (True, True) and size == 2:
        gradients += N * D * 4  # by columns the hidden gradient is summed in fp32 before it is rounded
    most = peak(N, V, D, dtype, needs, softcap=softcap, chunk_bytes=CHUNK)
    assert gradients < most
    assert most - gradients <= CHUNK + SMALL * rounded(8 * N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_does_not_grow_with_tokens_times_vocabulary(dtype):
    needs = (True, False)
    small = peak(N, V, D, dtype, needs, chunk_bytes=CHUNK)
    assert peak(N, 4 * V, D, dtype, needs, chunk_bytes=CHUNK) <= small
    plain_logits = N * 4 * V * 4
    assert small < plain_logits / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_rehearsal_books_what_the_run_books(dtype, needs, softcap):
    run = peak(N, V, D, dtype, needs, softcap=softcap, chunk_bytes=CHUNK)
    assert peak(N, V, D, dtype, needs, softcap=softcap, chunk_bytes=CHUNK, fake=True) == run
