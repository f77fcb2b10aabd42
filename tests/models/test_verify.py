"""A saved model is loaded by plain transformers and compared with the live one; what lies beside it stays as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from oomless.config import TrainConfig
from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import build, save, verify
from oomless.models.spec import resolve
from oomless.training.loop import train


@pytest.fixture
def saved(make_checkpoint, tmp_path):
    spec = resolve(str(make_checkpoint("llama")))
    model = build.build(spec, device=Device(), dtype=torch.float32)
    build.load_weights(model, spec, device=Device())
    save.save_model(model, tmp_path, save.model_tensors(model, Device()), Device(), spec.folder)
    return model.eval(), tmp_path


def change(folder, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_was_saved_is_right(saved):
    model, folder = saved
    verify.check_saved(folder, model, Device(), {})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), "up_proj"),
        (lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0, :1].add_(1), "up_proj.weight differs"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "norm"),
    ],
)
def test_a_fault_in_the_files_is_seen(saved, monkeypatch, whole, function, word):
    model, folder = saved
    if not whole:
        monkeypatch.setattr(verify, "available_host_bytes", lambda: 0)
    change(folder, function)
    with pytest.raises(ModelError, match=word):
        verify.check_saved(folder, model, Device(), {})


@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_behind_those_that_are_loaded_is_asked_for(make_checkpoint, tmp_path, monkeypatch, whole):
    """DeepSeek's experts begin behind its first layers; one that is missing is no reason to load random ones."""
    spec = resolve(str(make_checkpoint("deepseek_v2", num_hidden_layers=3, first_k_dense_replace=2)))
    model = build.build(spec, device=Device(), dtype=torch.float32)
    build.load_weights(model, spec, device=Device())
    save.save_model(model, tmp_path, save.model_tensors(model, Device()), Device(), spec.folder)
    if not whole:
        monkeypatch.setattr(verify, "available_host_bytes", lambda: 0)
    verify.check_saved(tmp_path, model.eval(), Device(), {})
    change(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.experts.1.up_proj.weight"))
    with pytest.raises(ModelError, match="does not load"):
        verify.check_saved(tmp_path, model, Device(), {})
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.2.mlp.experts." in name])
    with pytest.raises(ModelError, match="experts"):
        verify.check_saved(tmp_path, model, Device(), {})


@pytest.mark.parametrize("whole", [True, False])
def test_a_tensor_that_nothing_takes_is_seen(saved, monkeypatch, whole):
    model, folder = saved
    if not whole:
        monkeypatch.setattr(verify, "available_host_bytes", lambda: 0)
    change(folder, lambda tensors: tensors.update({"model.layers.0.experts.base_layer.up": torch.ones(3)}))
    with pytest.raises(ModelError, match="base_layer"):
        verify.check_saved(folder, model, Device(), {})


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_what_lies_beside_the_weights_stays(make_checkpoint, corpus, tmp_path, trainable):
    base = tmp_path / "base"
    shutil.copytree(make_checkpoint("llama"), base)
    generation = '{"eos_token_id": [0, 5, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.95}'
    (base / "generation_config.json").write_text(generation)
    (base / "preprocessor_config.json").write_text('{"image_size": 3}')
    (base / "tokenizer.model").write_bytes(b"sentences")
    config = TrainConfig(
        model=str(base),
        data=str(corpus),
        output_dir=str(tmp_path / "run"),
        trainable=trainable,
        max_seq_length=32,
        max_steps=1,
        dtype="fp32",
        gpu="cpu",
        eval_fraction=0.0,
    )
    model = train(config).model_dir
    assert (model / "generation_config.json").read_text() == generation
    assert (model / "preprocessor_config.json").exists()
    assert (model / "tokenizer.model").read_bytes() == b"sentences"
    assert json.loads((model / "config.json").read_text())["use_cache"] is True
    if trainable == "lora":
        adapter = json.loads((tmp_path / "run" / "checkpoint-1" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(base)
