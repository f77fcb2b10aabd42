"""Attention as a model is given it: which batches are heaviest, and whether its launch for all documents works here."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import attention
from oomless.ops import documents
from oomless.ops.attention import attention_kernel, packed_attention

CPU = torch.device("cpu")
BATCHES = [((512, 512),), ((1000, 24),), ((512, 500, 12),), ((16,) * 64,), ((17,) * 60 + (4,),), ((5,) * 200 + (24,),)]


@pytest.fixture
def model():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    found = SimpleNamespace(config=config, dtype=torch.bfloat16)
    attention.attend_in_one_launch(found, True)
    return found


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("one_launch", [True, False])
def test_what_weighs_most_keeps_most(model, kernel, one_launch, monkeypatch):
    monkeypatch.setattr(documents, "SCRATCH_BYTES", 1 << 21)
    attention.attend_in_one_launch(model, one_launch)
    kept, weights = [], []
    for batch in BATCHES:
        gpu = VirtualGPU(1 << 30, fake=True)
        with gpu.active(), attention_kernel(kernel):
            states = [torch.ones(1, 1024, 4, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
            states = [state.requires_grad_() for state in states]
            told, held = attention.packed(model, batch, gpu), gpu.usage().allocated_bytes
            output = packed_attention(*states, scale=0.25, **told)
            random = 0 if one_launch else 2 * 512 * len(batch[0])  # the state of random numbers of each call
            kept.append(gpu.usage().allocated_bytes - held - output.nbytes - random)
            weights.append(attention.weigh(model, torch.bfloat16, CPU, batch))
    assert kept == weights


def test_a_kernel_that_is_wrong_here_is_said(model, monkeypatch):
    documents.fault.cache_clear()
    with attention_kernel("flash"):
        attention.try_one_launch(model, CPU)
        documents.fault.cache_clear()
        monkeypatch.setattr(documents, "_attention", documents.attention_of_documents)  # which is for CUDA
        with pytest.raises(RuntimeError, match="_flash_attention_forward"):
            attention.try_one_launch(model, CPU)
    documents.fault.cache_clear()


def test_starts_are_made_where_a_kernel_can_use_them(model):
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        assert list(attention.packed(model, ((3, 4),), gpu)) == ["document_lengths"]  # a CPU's kernel
        with attention_kernel("efficient"):
            before = gpu.usage().allocated_bytes
            told = attention.packed(model, ((3, 4), (2, 5)), gpu)
            assert told["document_starts"].tolist() == [0, 3, 7, 9, 14]
            assert gpu.usage().allocated_bytes == before + 512
            assert "document_starts" not in attention.packed(model, ((7,), (7,)), gpu)
            attention.attend_in_one_launch(model, False)
            assert "document_starts" not in attention.packed(model, ((3, 4),), gpu)
