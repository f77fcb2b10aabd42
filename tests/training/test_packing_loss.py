"""A document's loss is the same alone and packed among others."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oomless.config import DataSource
from oomless.data.encode import Encoder
from oomless.data.loader import collate
from oomless.data.pack import PackedBlocks
from oomless.data.store import open_store
from oomless.memory.device import Device
from oomless.models import build
from oomless.models.attention import use_packed_attention
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.training.loss import causal_lm_loss


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "qwen2", "qwen3"])
def test_alone_and_packed(make_checkpoint, corpus, tmp_path, architecture, packing):
    folder = make_checkpoint(architecture, max_position_embeddings=8192)
    store = open_store(DataSource(path=str(corpus)), Encoder(load_tokenizer(str(folder))), tmp_path)
    short = np.argsort(np.diff(store.starts), kind="stable")[:6]
    short.sort()
    longest = int(np.diff(store.starts)[short].max())
    model = build.build(resolve(str(folder)), device=Device(), dtype=torch.float32)
    build.load_weights(model, resolve(str(folder)), device=Device())
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    # One block holds them all, so that no document is cut.
    blocks = list(PackedBlocks(store, store.spans[short], 6 * longest, packing))
    assert len(blocks) == 1
    batch = collate(blocks)
    lengths = batch.document_lengths[0]
    assert len(lengths) == len(short) + 1
    start = 0
    for length in lengths[:-1]:
        ids = batch.input_ids[:, start : start + length]
        labels = torch.full_like(batch.labels, -100)
        labels[:, start : start + length] = batch.labels[:, start : start + length]
        packed = causal_lm_loss(
            model.eval(),
            batch.input_ids,
            labels,
            position_ids=batch.position_ids,
            document_lengths=batch.document_lengths,
            scale=1 / length,
        )
        alone = torch.nn.functional.cross_entropy(plain(ids).logits[0], labels[0, start : start + length])
        assert packed.item() == pytest.approx(alone.item(), abs=1e-5)
        start += length


def test_concatenated_documents_do_see_each_other(make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
    use_packed_attention(model)
    ids = torch.arange(3, 43)[None]
    apart = causal_lm_loss(model, ids, ids, document_lengths=((20, 20),))
    together = causal_lm_loss(model, ids, ids, document_lengths=((40,),))
    assert abs(apart.item() - together.item()) > 1e-4
