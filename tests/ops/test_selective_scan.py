"""The selective scan: a loop over tokens in every number, whatever the chunks; what it keeps, and what it needs on the way."""

import pytest
import torch
from tests.ops.test_numerics import looped_scan, outputs_and_gradients, scan_inputs
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops import selective_scan as module
from oomless.ops.selective_scan import CHUNK, STEPS, selective_scan


@pytest.mark.parametrize("slice_bytes", [1 << 27, 1 << 10], ids=["whole", "slices"])
@pytest.mark.parametrize("tokens", [1, 2, STEPS, STEPS + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 44])
def test_is_a_loop_over_tokens(tokens, slice_bytes, monkeypatch):
    monkeypatch.setattr(module, "SLICE_BYTES", slice_bytes)
    inputs = scan_inputs(tokens)
    plain, ours = (outputs_and_gradients(scan, inputs) for scan in (looped_scan, selective_scan))
    for theirs, own in zip(plain, ours, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-11, atol=1e-11)
    single = outputs_and_gradients(selective_scan, [tensor.float() for tensor in inputs])
    for theirs, own in zip(plain, single, strict=True):
        assert (own - theirs).norm() <= 1e-5 * theirs.norm()


def test_in_16_bits_it_is_nearer_to_the_truth_than_transformers():
    """Which rounds steps, states and outputs to 16 bits on the way."""
    low = [tensor.to(torch.bfloat16) for tensor in scan_inputs(300, channels=16, states=8)]
    low = [tensor.float() if place in (2, 5, 7) else tensor for place, tensor in enumerate(low)]

    def theirs(x, delta, A, B, C, D, z, delta_bias):
        return mamba_selective_scan(x, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True).to(x.dtype)

    truth = outputs_and_gradients(looped_scan, [tensor.double() for tensor in low])
    rough, own = (outputs_and_gradients(scan, low) for scan in (theirs, selective_scan))
    for true, one, other in zip(truth, own, rough, strict=True):
        assert one.dtype == other.dtype
        assert (one - true).norm() <= (other - true).norm()


@pytest.mark.parametrize("step", [-60.0, 30.0, 1e4])
def test_states_that_stay_and_states_that_are_forgotten_at_once(step):
    """Steps of next to nothing decay nothing, large ones all: no number is divided by a decay."""
    inputs = scan_inputs(CHUNK + 30)
    inputs[1] = inputs[1] + step
    plain, ours = (outputs_and_gradients(scan, inputs) for scan in (looped_scan, selective_scan))
    for theirs, own in zip(plain, ours, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_an_overflow_stays_seen():
    """``found_inf`` is asked of the gradients."""
    inputs = scan_inputs(CHUNK + 3)
    inputs[0][0, 0, 5] = torch.inf
    _, *gradients = outputs_and_gradients(selective_scan, inputs)
    assert not all(gradient.isfinite().all() for gradient in gradients)


def test_parameters_that_do_not_train_have_no_gradient():
    leaves = [tensor.requires_grad_(place not in (2, 5, 7)) for place, tensor in enumerate(scan_inputs(20))]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    ours = torch.autograd.grad(selective_scan(*leaves).sum(), trained)
    plain = torch.autograd.grad(looped_scan(*leaves).sum(), trained)
    for own, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("states", [1, 16, 64])
def test_what_is_kept_and_what_is_needed_on_the_way(monkeypatch, states):
    """Of 1,024 tokens and 64 channels: the output and a state per chunk are kept; temporaries stay within their bound."""
    monkeypatch.setattr(module, "SLICE_BYTES", 1 << 20)
    tokens, channels = 1024, 64
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        leaves = [tensor.float().requires_grad_() for tensor in scan_inputs(tokens, 1, channels, states)]
        before = gpu.usage().allocated_bytes
        gpu.reset_peak()
        y = selective_scan(*leaves)
        kept = tokens // CHUNK * channels * states * 4
        assert gpu.usage().allocated_bytes - before == y.nbytes + kept
        assert gpu.usage().peak_allocated_bytes - before - y.nbytes - kept <= module.SLICE_BYTES
        gradient = torch.ones_like(y)
        before = gpu.usage().allocated_bytes
        gpu.reset_peak()
        gradients = torch.autograd.grad(y, leaves, gradient)
        carry = kept * CHUNK // tokens
        made = sum(gradient.nbytes for gradient in gradients) + carry
        temporaries = gpu.usage().peak_allocated_bytes - before - made
        assert module.SLICE_BYTES // 3 <= temporaries <= module.SLICE_BYTES
