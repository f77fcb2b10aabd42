"""fp32 sums around fp16 products: finite where fp16 overflows, and no weight in fp32."""

import dataclasses
import math

import pytest
import torch
from tests.blank import blank_batch
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.training.assemble import assemble
from oomless.training.loss import hidden_states

LENGTH = 32


def make_step(folder, device, **settings):
    config = TrainConfig(
        model=str(folder), data=(DataSource(path="x"),), output_dir="x", max_seq_length=LENGTH, **settings
    )
    return assemble(resolve(str(folder)), config, device, fill=True)


def tokens(device):
    batch = blank_batch(1, (LENGTH,), device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (1, LENGTH + 1), generator=generator)
    return dataclasses.replace(batch, input_ids=ids[:, :-1], labels=ids[:, 1:], position_ids=torch.arange(LENGTH)[None])


def loss_and_gradients(folder, **settings):
    device = VirtualGPU(1 << 30)
    with device.active():
        parts = make_step(folder, device, **settings)
        parts.loss_scale.scale.fill_(64.0 if parts.loss_scale.dynamic else 1.0)
        loss = float(parts.step.accumulate([tokens(device)], LENGTH))
        return loss, [parameter.grad.float() / parts.loss_scale.scale for parameter in parts.model.parameters()]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "qwen3"])
def test_at_least_as_near_to_fp32_as_without(make_checkpoint, architecture, checkpointing, dtype):
    folder = make_checkpoint(architecture, tied=True)
    truth, plain, ours = (
        loss_and_gradients(folder, gradient_checkpointing=checkpointing, **settings)
        for settings in ({"dtype": "fp32"}, *({"dtype": dtype, "fp32_residual": on} for on in (False, True)))
    )
    tolerance = 1e-3 if dtype == "fp16" else 8e-3
    assert ours[0] == pytest.approx(truth[0], rel=tolerance)
    for our, naive, true in zip(ours[1], plain[1], truth[1], strict=True):
        assert (our - true).norm() <= 1.2 * (naive - true).norm() + tolerance * true.norm()


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_finite_where_fp16_is_not(make_checkpoint, tmp_path, architecture):
    """Every layer's own output fits fp16; their sum does not."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(architecture, tied=False))
    ids = tokens(Device()).input_ids
    with torch.no_grad():
        embedding = model.model.embed_tokens
        scale = float(getattr(embedding, "embed_scale", 1.0))
        embedding.weight.copy_(embedding.weight.sign() * 6e4 / scale)
        for layer in model.model.layers:
            largest = []
            layer.mlp.up_proj.weight.mul_(1000)
            handle = layer.mlp.register_forward_hook(
                lambda m, given, out, to=largest: to.append(float(out.abs().max()))
            )
            model(ids)
            handle.remove()
            layer.mlp.down_proj.weight.mul_(2e4 / largest[0])
    model.save_pretrained(tmp_path)
    truth, plain, ours = (
        loss_and_gradients(tmp_path, **settings)[0]
        for settings in ({"dtype": "fp32"}, *({"dtype": "fp16", "fp32_residual": on} for on in (False, True)))
    )
    assert not math.isfinite(plain)
    assert ours == pytest.approx(truth, rel=1e-2)


def test_default_is_by_architecture_and_dtype(make_checkpoint):
    for architecture, dtype, on in [("gemma", "fp16", True), ("gemma", "bf16", False), ("llama", "fp16", False)]:
        parts = make_step(make_checkpoint(architecture), VirtualGPU(1 << 30), dtype=dtype)
        ids = torch.arange(5)[None]
        assert (
            parts.model.model.layers[0](parts.model.model.embed_tokens(ids), **inputs(parts.model, ids)).dtype
            == torch.float32
        ) == on


def inputs(model, ids):
    embedded = model.model.embed_tokens(ids)
    return {"position_embeddings": model.model.rotary_emb(embedded, torch.arange(5)[None]), "attention_mask": None}


def test_bytes(make_checkpoint):
    """No weight is copied; with checkpointing the stream costs 2 more bytes for each number of each layer's input."""
    folder = make_checkpoint("llama", tied=True)
    kept = {}
    for on in (False, True):
        device = VirtualGPU(1 << 30, record_history=True)
        with device.active():
            parts = make_step(folder, device, dtype="fp16", fp32_residual=on, gradient_checkpointing=True)
            weights = sum(p.nbytes for p in parts.model.parameters())
            assert weights == 2 * sum(p.numel() for p in parts.model.parameters())
            batch = tokens(device)
            put = [device.put(t) for t in (batch.input_ids, batch.position_ids)]
            start = device.usage().allocated_bytes
            hidden = hidden_states(parts.model.train(), *put, None)
            kept[on] = device.usage().allocated_bytes - start
            assert hidden.dtype == torch.float16
            del hidden
    assert kept[True] - kept[False] == 3 * LENGTH * 64 * 2  # the inputs of two layers and of the last norm


def test_refused_where_it_has_no_effect(make_checkpoint):
    with pytest.raises(ConfigError, match="no effect on fp32"):
        make_step(make_checkpoint("llama"), VirtualGPU(1 << 30), dtype="fp32", fp32_residual=True)
