"""The loss' two passes in a kernel each: Triton's interpreter runs the very kernels here, and a rehearsal counts their operators."""

import pytest
import torch
import torch.nn.functional as F

from oomless.memory.fake_mode import QuickFakeMode
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops import loss_kernels, loss_passes
from oomless.ops.linear_cross_entropy import linear_cross_entropy

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, VOCABULARY, WIDTH = 6, 45, 16
SETTINGS = {
    "nothing": {},
    "capped": dict(softcap=3.0, logit_scale=0.7),
    "smoothed": dict(label_smoothing=0.2),
    "z-loss": dict(z_loss=1e-2),
    "everything": dict(softcap=3.0, logit_scale=0.7, label_smoothing=0.2, z_loss=1e-2),
}


@pytest.fixture
def on_kernels(monkeypatch):
    """Operators of CPU tensors go to the kernels, which the interpreter runs."""
    monkeypatch.setattr(loss_passes, "_STATISTICS", loss_kernels.loss_statistics)
    monkeypatch.setattr(loss_passes, "_GRADIENT", loss_kernels.loss_gradient)


@pytest.fixture
def in_blocks(monkeypatch):
    """Kernels take several blocks for a token's columns, the last of them not full."""
    monkeypatch.setattr(loss_kernels, "READ_AT_ONCE", 16)
    monkeypatch.setattr(loss_kernels, "WRITTEN_AT_ONCE", 32)


class Alone:
    """A head's parts where one process has all of them."""

    first, count = 0, VOCABULARY

    def of_all(self, tensor):
        return tensor

    own = largest = sum = own_sum = of_all


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    leaves = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::5] = -100
    targets[1:3] = torch.tensor([0, VOCABULARY - 1])
    return leaves, targets


def plain_lines(
    hidden, weight, targets, *, bias, scale, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0
):
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, FP32)) * logit_scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return scale * (loss + z_loss * (logits.logsumexp(1)[targets != -100] ** 2).sum())


def loss_and_gradients(function, leaves, targets, needs, **settings):
    leaves = [leaf.clone().requires_grad_(needed) for leaf, needed in zip(leaves, needs, strict=True)]
    loss = function(leaves[0], leaves[1], targets, bias=leaves[2], scale=8.0, **settings)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


ORDERS = {
    "head trains": ((True, True, True), {}),
    "head is frozen": ((True, False, False), {}),
    "head in parts": ((True, False, False), {"parts": Alone()}),
}


CASES = [
    *((name, order, dtype) for name in ("nothing", "everything") for order in ORDERS for dtype in (FP32, BF16, FP16)),
    *((name, "head trains", BF16) for name in ("capped", "smoothed", "z-loss")),
]


@pytest.mark.parametrize(("name", "order", "dtype"), CASES, ids=str)
def test_kernels_are_as_exact_as_plain_lines_in_low_precision(name, order, dtype, on_kernels, in_blocks):
    leaves, targets = inputs(dtype)
    needs, how = ORDERS[order]
    settings = SETTINGS[name]
    truth = loss_and_gradients(plain_lines, [leaf.double() for leaf in leaves], targets, needs, **settings)
    naive = loss_and_gradients(plain_lines, leaves, targets, needs, **settings)
    how = dict(chunk_bytes=dtype.itemsize * 3 * VOCABULARY, fused=True, **how)
    ours = loss_and_gradients(linear_cross_entropy, leaves, targets, needs, **settings, **how)
    assert len(truth) == len(ours)
    for true, rough, own in zip(truth, naive, ours, strict=True):
        assert own.dtype == rough.dtype
        error, allowed = (own.double() - true).abs(), (rough.double() - true).abs()
        # In the interpreter an exponential is numpy's, which on some processors is a few fp32 roundings off.
        eps = torch.finfo(dtype).eps * (2 if dtype == FP32 else 1)
        assert bool((error <= allowed + 8 * eps * true.abs().clamp_min(true.abs().mean())).all())
        assert error.norm() <= 1.1 * allowed.norm() + eps * true.norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_an_operator_on_the_cpu_is_its_plain_form_to_the_bit(dtype, order):
    needs, how = ORDERS[order]
    given = (linear_cross_entropy, *inputs(dtype), needs)
    fused, plain = (loss_and_gradients(*given, fused=form, **SETTINGS["everything"], **how) for form in (True, False))
    assert all(map(torch.equal, fused, plain))


def test_kernels_are_tried_against_their_plain_form(on_kernels, monkeypatch):
    for dtype, softcap in ((BF16, 30.0), (FP16, None)):
        loss_passes.try_fused(dtype, torch.device("cpu"), softcap, 0.7)

    def steeper(*given):
        loss_kernels.loss_gradient(*given[:-1], given[-1] * 1.01)

    monkeypatch.setattr(loss_passes, "_GRADIENT", steeper)
    with pytest.raises(RuntimeError, match="the fused loss of torch.float16 differs from its plain form"):
        loss_passes.try_fused(FP16, torch.device("cpu"), None, 0.7)


# -- what is held, and what a rehearsal counts ------


def peak_bytes(needs, dtype, *, tokens, vocabulary, fake=False, **settings):
    """The most that is held beside the inputs and their gradients."""
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active():
        hidden = torch.ones(tokens, WIDTH, dtype=dtype).requires_grad_(needs[0])
        weight = torch.ones(vocabulary, WIDTH, dtype=dtype).requires_grad_(needs[1])
        targets = torch.zeros(tokens, dtype=torch.int64)
        gpu.reset_peak()
        before = gpu.usage().allocated_bytes
        linear_cross_entropy(hidden, weight, targets, fused=True, **settings).backward()
        gradients = sum(leaf.grad.nbytes for leaf in (hidden, weight) if leaf.grad is not None)
        return gpu.usage().peak_allocated_bytes - before - gradients


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("order", ["head trains", "head is frozen"])
def test_a_chunk_is_its_logits_alone(order, dtype):
    needs, tokens, chunk_bytes = ORDERS[order][0], 64, 1 << 20
    given = dict(tokens=tokens, vocabulary=1 << 15, chunk_bytes=chunk_bytes, **SETTINGS["everything"])
    held = peak_bytes(needs, dtype, **given)
    summed = (
        tokens * WIDTH * 6 if needs[1] and dtype == BF16 else 0
    )  # the gradient of the hidden states, and a chunk's part
    assert chunk_bytes <= held <= chunk_bytes + summed + 16 * 512  # numbers of each token
    assert peak_bytes(needs, dtype, fake=True, **given) == held


def work_of_llama(head_trains, fused, settings):
    """Operators, and bytes that they move, beside matrix products: the head of Llama 3.2 1B in bf16, 2,048 tokens."""
    with QuickFakeMode() as mode:
        hidden = torch.empty(2048, 2048, dtype=BF16, requires_grad=True)
        weight = torch.empty(128_256, 2048, dtype=BF16, requires_grad=head_trains)
        targets = torch.empty(2048, dtype=torch.int64)
        mode.work.on = True
        linear_cross_entropy(hidden, weight, targets, fused=fused, **settings)
        mode.work.on = False
        costs = mode.work.work().of_passes
    beside = [(moved, count) for (_, flops, moved), count in costs if not flops]
    return sum(count for _, count in beside), sum(moved * count for moved, count in beside)


@pytest.mark.parametrize(
    ("head_trains", "name", "operators", "bytes_"),
    [(True, "nothing", 15, 9), (True, "everything", 30, 30), (False, "nothing", 9, 7), (False, "everything", 12, 22)],
)
def test_every_logit_is_read_twice_and_written_once(head_trains, name, operators, bytes_):
    many, moved = work_of_llama(head_trains, False, SETTINGS[name])
    few, least = work_of_llama(head_trains, True, SETTINGS[name])
    logits_bytes = 2048 * 128_256 * 2
    of_hidden = 2048 * 2048 * 10 * 9 if head_trains else 0  # its gradient is summed in fp32 over eight chunks
    assert 3 * logits_bytes <= least <= 3.005 * logits_bytes + of_hidden
    assert many >= operators * few
    assert moved >= bytes_ * least
