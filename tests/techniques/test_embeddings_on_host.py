"""Frozen tables on the host: the device holds none of their bytes, the same is trained, and the same is saved."""

import pytest
import torch
from safetensors.torch import load_file
from tests.blank import blank_batch

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.make import without_memory
from oomless.models.spec import resolve, resolve_for_plan
from oomless.planning.plan import target_for
from oomless.planning.trial import Setting, measure_parts
from oomless.techniques.embeddings_on_host import tables
from oomless.training import loop
from oomless.training.assemble import assemble

PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=1024, vocab_size=1024)
MODELS = {
    "embed_tokens": ("qwen2", dict(vocab_size=1024), 1024 * 64),
    "embed_tokens that are scaled": ("gemma", dict(vocab_size=1024), 1024 * 64),
    "of each layer, beside a tied matrix": ("gemma4", PER_LAYER | {"tied": True}, 1024 * 2 * 8),
}


def configure(folder, corpus="none", out="none", **settings):
    defaults = {"trainable": "lora", "lora_r": 4, "max_seq_length": 32, "embeddings_on_host": True, "dtype": "fp32"}
    return TrainConfig(
        model=str(folder), data=(DataSource(path=str(corpus)),), output_dir=str(out), **{**defaults, **settings}
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_device_holds_no_table_and_updates_as_if_it_did(make_checkpoint, model):
    architecture, shape, numbers = MODELS[model]
    folder = make_checkpoint(architecture, **shape)
    found = {}
    for on_host in (False, True):
        torch.manual_seed(0)
        device = VirtualGPU(1 << 30)
        with device.active():
            parts = assemble(resolve(str(folder)), configure(folder, embeddings_on_host=on_host), device, fill=True)
            held = device.usage().allocated_bytes
            generator = torch.Generator().manual_seed(3)
            batch = blank_batch(1, (32,), device)
            batch.input_ids.copy_(torch.randint(1, 500, batch.input_ids.shape, generator=generator))
            losses = [float(parts.step.run([batch]).loss) for _ in range(3)]
            weights = [p.detach().clone() for p in parts.model.parameters() if p.requires_grad]
        found[on_host] = losses, weights, held
    assert found[True][0] == found[False][0]
    assert len(set(found[True][0])) == 3
    assert all(torch.equal(left, right) for left, right in zip(found[True][1], found[False][1], strict=True))
    assert found[False][2] - found[True][2] == 4 * numbers + (0 if model == "embed_tokens" else 512)  # its scale too
    assert device.host_allocated_bytes >= 4 * numbers
    setting = Setting(spec=resolve(str(folder)), target=target_for("virtual:1GiB"), base={})
    known = {
        "model": str(folder),
        "trainable": "lora",
        "dtype": "fp32",
        "max_seq_length": 32,
        "output_dir": "x",
        "data": "x",
    }
    parts = measure_parts(setting, known)
    assert parts.refused is None
    assert parts.movable["embeddings_on_host"] == 4 * numbers


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_adapters_of_packed_layers_are_in_the_models_dtype(make_checkpoint, quantization):
    """Nothing floating stands before them then."""
    device = VirtualGPU(1 << 30)
    more = {"dtype": "fp16", "quantization": quantization, "weight_precision": "master"}
    with device.active():
        parts = assemble(resolve(str(make_checkpoint("qwen2"))), configure("-", **more), device, fill=True)
    assert {p.dtype for p in parts.model.parameters() if p.requires_grad} == {torch.float16}
    assert parts.step.loss_scale.scale > 1


def test_saves_the_tables_of_the_files_and_resumes(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("gemma4", **PER_LAYER)
    more = {"gpu": "virtual:64MiB", "eval_fraction": 0.0, "max_steps": 4, "save_steps": 2, "quantization": "nf4"}
    result = loop.train(configure(folder, corpus, tmp_path, **more))
    saved, original = load_file(result.model_dir / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    tables = [name for name in saved if "embed_tokens" in name]
    assert len(tables) == 2
    assert all(torch.equal(saved[name], original[name]) for name in tables)
    assert any(not torch.equal(saved[name], original[name]) for name in saved)
    for name in ("checkpoint-4", "model"):
        (tmp_path / name).rename(tmp_path / f"was-{name}")
    again = loop.train(configure(folder, corpus, tmp_path, resume=True, **more))
    again = load_file(again.model_dir / "model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (True, {}),
        (False, {"trainable": "lora+embed_tokens"}),
        (True, {"trainable": "lora+lm_head", "tied_weights": "untied"}),
    ],
    ids=str,
)
def test_no_effect_where_the_device_needs_the_table(make_checkpoint, tied, settings):
    folder = make_checkpoint("llama", tied=tied)
    device = VirtualGPU(1 << 30)
    with device.active(), pytest.raises(ConfigError, match="embeddings_on_host has no effect"):
        assemble(resolve(str(folder)), configure(folder, **settings), device, fill=True)


@pytest.mark.parametrize(
    ("model", "saved_bytes"),
    [("google/gemma-3n-E4B", 262_144 * 35 * 256 * 2), ("meta-llama/Llama-3.1-8B", 128_256 * 4096 * 2)],
)
def test_what_it_saves_of_known_models(model, saved_bytes):
    plain = without_memory(resolve_for_plan(model).config)
    assert sum(table.weight.nbytes for _, table in tables(plain.bfloat16(), [])) == saved_bytes


def test_no_effect_on_a_cpu_nor_where_all_trains(make_checkpoint):
    folder = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="no effect on a CPU"):
        assemble(resolve(str(folder)), configure(folder), Device(), fill=True)
    with pytest.raises(ConfigError, match="freezes none"):
        configure(folder, trainable="full", lora_r=None)
