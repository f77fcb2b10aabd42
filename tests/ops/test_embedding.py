"""The lean embedding and the one gradient buffer against autograd's own."""

import pytest
import torch
from torch import nn

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.embedding import embedding
from oomless.ops.linear_cross_entropy import linear_cross_entropy

VOCABULARY, WIDTH = 50, 12


def make(dtype=torch.float32, tokens=(3, 7), vocabulary=VOCABULARY, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(vocabulary, width, generator=generator).to(dtype))
    ids = torch.randint(0, 9, tokens, generator=generator)  # few ids, so that they repeat
    return weight, ids, torch.randn(*tokens, width, generator=generator).to(dtype)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("padding_index", [None, 3])
@pytest.mark.parametrize("tokens", [(3, 7), (1,), (0,), (2, 0)])
def test_rows_and_gradient(tokens, padding_index, chunk_bytes):
    weight, ids, upstream = make(torch.float64, tokens)
    expected = torch.nn.functional.embedding(ids, weight, padding_idx=padding_index)
    ours = embedding(ids, weight, padding_index=padding_index, chunk_bytes=chunk_bytes)
    assert torch.equal(ours, expected)
    (wanted,) = torch.autograd.grad(expected, weight, upstream)
    (got,) = torch.autograd.grad(ours, weight, upstream)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_rows_that_occur_are_touched(dtype):
    weight, ids, upstream = make(dtype)
    before = torch.full_like(weight, torch.nan)
    before[ids.unique()] = 1.0
    before[0] = 1.0  # a row that may be added nothing to
    weight.grad = before.clone()
    embedding(ids, weight, destination="final").backward(upstream)
    occurs = torch.isin(torch.arange(VOCABULARY), ids)
    assert weight.grad[~occurs].isnan().sum() == before[~occurs].isnan().sum() > 0
    assert torch.isfinite(weight.grad[occurs]).all()
    assert (weight.grad[occurs] != 1).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frequent_row_is_rounded_once(dtype):
    """500 tokens of one id, against fp32; a running sum in 16 bits is off by several units."""
    weight, _, _ = make(dtype)
    upstream = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    ids = torch.zeros(500, dtype=torch.int64)
    truth = upstream.float().sum(0)
    running = torch.zeros(WIDTH, dtype=dtype)
    for row in upstream:
        running += row
    embedding(ids, weight).backward(upstream)
    error = (weight.grad[0].float() - truth).abs().max()
    assert error <= truth.abs().max() * torch.finfo(dtype).eps
    assert error < (running.float() - truth).abs().max() / 4


def tied_loss(weight, ids, targets, *, lean, chunk_bytes=1 << 20):
    if lean:
        hidden = embedding(ids, weight, destination="final").tanh()
        return linear_cross_entropy(hidden, weight, targets, destination="in_place", chunk_bytes=chunk_bytes)
    hidden = torch.nn.functional.embedding(ids, weight).tanh()
    return linear_cross_entropy(hidden, weight, targets, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_tied_matrix_gets_the_gradient_of_both_uses(dtype, micro_batches):
    gradients, calls = [], []
    for lean in (False, True):
        weight, ids, _ = make(dtype, (micro_batches, 40))
        weight.register_post_accumulate_grad_hook(lambda _, lean=lean: calls.append(lean))
        for part in ids:
            tied_loss(weight, part, part.roll(1), lean=lean, chunk_bytes=1 << 16).backward()
        gradients.append(weight.grad)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)
    assert calls == [False] * micro_batches + [True] * micro_batches


@pytest.mark.parametrize(("lean", "buffers"), [(False, (2, 3)), (True, (1, 1))])
def test_how_many_gradients_of_the_matrix_exist(lean, buffers):
    """Peak over the held matrix, in matrices, for the first micro-batch and for the second."""
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        weight = nn.Parameter(torch.zeros(4096, 256))
        matrix = 4096 * 256 * 4
        ids = torch.arange(16)
        for expected in buffers:
            gpu.reset_peak()
            tied_loss(weight, ids, ids, lean=lean, chunk_bytes=1 << 16).backward()
            assert (gpu.usage().peak_allocated_bytes - matrix) // matrix == expected


def test_a_head_of_its_own_adds_into_its_buffer():
    hidden, targets = torch.randn(6, WIDTH), torch.arange(6)
    weights = [make()[0] for _ in range(2)]
    for _ in range(3):
        linear_cross_entropy(hidden, weights[0], targets).backward()
        linear_cross_entropy(hidden, weights[1], targets, destination="final").backward()
    torch.testing.assert_close(weights[1].grad, weights[0].grad)


def test_a_computed_matrix_is_refused():
    weight, ids, _ = make()
    for function in (
        lambda: embedding(ids, weight * 2, destination="final"),
        lambda: linear_cross_entropy(torch.randn(3, WIDTH), weight * 2, torch.arange(3), destination="in_place"),
    ):
        with pytest.raises(ValueError, match="computed tensor"):
            function()
