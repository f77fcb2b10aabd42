"""Quantised frozen layers: what is quantised, how much memory loading takes, training, saving."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError, ModelError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.ops.frozen_linear import packed_shapes
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.techniques.frozen_layers import frozen_layers
from oomless.techniques.kinds import is_linear
from oomless.techniques.quantization import QuantizedLinear
from oomless.training import loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import list_checkpoints

PARTS = {
    "lm_head": {"trainable": "lm_head"},
    "lora": {"trainable": "lora", "lora_r": 4},
    "all": {"trainable": "lora+lm_head+embed_tokens", "lora_r": 4},
    "layer": {"trainable": "model.layers.1.*"},
}


def make_config(folder, corpus="none", out="none", **settings):
    defaults = {
        "quantization": "nf4",
        "max_seq_length": 64,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "eval_fraction": 0.1,
    }
    return TrainConfig(
        model=str(folder), data=(DataSource(path=str(corpus)),), output_dir=str(out), **{**defaults, **settings}
    )


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
def test_only_frozen_layers_of_the_body_are_quantised(make_checkpoint, architecture, parts):
    folder = make_checkpoint(architecture)
    device = VirtualGPU(1 << 30)
    with device.active():
        model = assemble(
            resolve(str(folder)), make_config(folder, dtype="bf16", **PARTS[parts]), device, fill=True
        ).model
    names = {name for name, _ in frozen_layers(model)}
    layers = {0} if parts == "layer" else {0, 1}
    assert len(names) == 7 * len(layers)
    assert all(name.startswith(tuple(f"model.layers.{n}." for n in layers)) for name in names)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, layer in frozen_layers(model):
        original = plain.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert (layer.unpack(torch.float32) - original.weight).norm() < 0.11 * original.weight.float().norm()
        assert (layer.bias is None) == (original.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, original.bias)


def test_a_linear_layer_is_known_by_what_it_computes():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
    from transformers.models.falcon.modeling_falcon import FalconLinear

    for bias in (True, False):
        assert is_linear(FalconLinear(7, 9, bias=bias))
        assert is_linear(torch.nn.Linear(7, 9, bias=bias, device="meta"))
    assert not is_linear(DeepseekV4GroupedLinear(8, 16, 4))

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.01

    assert not is_linear(Scaled(7, 9))


def test_a_matrix_that_lies_transposed(make_checkpoint):
    """GPT-2's layers are ``Conv1D``, whose weight is [in, out]."""
    folder, device = make_checkpoint("gpt2"), VirtualGPU(1 << 30)
    with device.active():
        model = assemble(
            resolve(str(folder)), make_config(folder, dtype="fp32", **PARTS["lora"]), device, fill=True
        ).model
    plain = AutoModelForCausalLM.from_pretrained(folder)
    layers = dict(frozen_layers(model))
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        original = plain.get_submodule(name)
        assert (layer.unpack(torch.float32).t() - original.weight).norm() < 0.11 * original.weight.norm()
        x = torch.randn(3, layer.in_features)
        exact = torch.addmm(original.bias, x, layer.unpack(torch.float32).t())
        torch.testing.assert_close(layer(x), exact)


class CountsHost(VirtualGPU):
    """A virtual GPU whose books hold what lies on the host as well."""

    @contextmanager
    def host(self):
        yield


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("books", [VirtualGPU, CountsHost], ids=["device", "device and host"])
def test_loading_holds_the_quantised_model_and_one_weight(make_checkpoint, kind, books):
    folder = make_checkpoint("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    device = books(1 << 30, record_history=True)
    settings = make_config(folder, trainable="lm_head", quantization=kind, dtype="bf16", optimizer="sgd", momentum=0.0)
    with device.active():
        model = assemble(resolve(str(folder)), settings, device, fill=True).model
    rounded = lambda count: -(-count // 512) * 512  # noqa: E731
    quantised = sum(
        rounded(torch.Size(shape).numel() * dtype.itemsize)
        for _, layer in frozen_layers(model)
        for shape, dtype in packed_shapes(layer.shape, kind).values()
    )
    others = sum(rounded(p.nbytes) for p in {id(p): p for p in model.parameters()}.values())
    largest = 2 * 512 * 256
    head = 512 * 256  # its fp32 master copy and gradients come after the load
    copies = {VirtualGPU: 1, CountsHost: 3}[books]  # on the host as the file has it (fp32), then on the device
    load = device.profile().phases["load"].allocated_bytes
    slack = 64 * 1024
    assert quantised + others < load <= quantised + others + copies * largest + largest + 4 * head + slack
    whole = sum(2 * layer.in_features * layer.out_features for _, layer in frozen_layers(model))
    assert load < quantised + others + whole // 2


@pytest.mark.parametrize("parts", ["lm_head", "all"])
def test_trains_saves_the_original_weights_and_loads_in_transformers(make_checkpoint, corpus, tmp_path, parts):
    folder = make_checkpoint("llama", dtype=torch.bfloat16)
    result = loop.train(make_config(folder, corpus, tmp_path, dtype="bf16", **PARTS[parts]))
    saved, original = load_file(result.model_dir / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        trained = name == "lm_head.weight" or (parts == "all" and ("_proj" in name or "embed" in name))
        assert torch.equal(saved[name], tensor) != trained, name
    AutoModelForCausalLM.from_pretrained(result.model_dir)
    kept = {path.name for path in list_checkpoints(tmp_path)[-1].folder.iterdir()}
    assert ("adapter_model.safetensors" in kept, "trained.safetensors" in kept) == (parts == "all", parts != "all")
    assert result.eval_after["library.jsonl"] < result.eval_before["library.jsonl"]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_saved_model_is_the_live_one_but_for_the_rounding(make_checkpoint, corpus, tmp_path, monkeypatch, architecture):
    folder = make_checkpoint(architecture)
    runs = []
    original = loop.Run.__init__
    monkeypatch.setattr(loop.Run, "__init__", lambda run, *given: (original(run, *given), runs.append(run))[0])
    result = loop.train(make_config(folder, corpus, tmp_path, quantization="int8", **PARTS["all"]))
    ids = torch.arange(1, 21)[None]
    live = runs[0].assembly.model.eval()(ids, use_cache=False).logits
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()(ids).logits
    untouched = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert (loaded - live).norm() < 0.02 * live.norm()
    assert (untouched - live).norm() > 0.1 * live.norm()


def test_from_a_config_alone(make_checkpoint):
    found = rehearse(
        resolve(str(make_checkpoint("llama"))), make_config("x", dtype="bf16", trainable="lm_head"), virtual_device()
    )
    plain = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
    assert found.parameters == sum(p.numel() for p in plain.parameters())
    assert found.trainable_parameters == 512 * 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "full"}, "full freezes none"),
        ({"trainable": "lora", "use_dora": True}, "use_dora needs"),
        ({"trainable": "lora", "quantization": "nf5"}, "Did you mean 'nf4'"),
    ],
    ids=str,
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_mapping({"model": "x", "data": ["x"], "output_dir": "x", "quantization": "nf4", **settings})


def test_nothing_frozen(make_checkpoint):
    folder = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="no frozen nn.Linear"):
        assemble(resolve(str(folder)), make_config(folder, trainable="model"), VirtualGPU(1 << 30), fill=True)


def test_where_most_would_stay_as_it_is_the_largest_are_named(make_checkpoint):
    """Mamba's fused kernels read all but one of its linear layers' weights by themselves, and this one has a large state."""
    folder = make_checkpoint("mamba", state_size=128)
    config = make_config(folder, trainable="lora", packing="concatenate")
    with pytest.raises(ConfigError, match=r"above all layers\.\*\.mixer\.x_proj\.weight, .* no other module reads"):
        rehearse(resolve(str(folder)), config, virtual_device())


def test_tables_that_are_looked_up_stay_as_they_are(make_checkpoint):
    """No product reads them, so they may be larger than all that is stored in few bits, as in Gemma 4 E2B."""
    folder = make_checkpoint("gemma4", hidden_size_per_layer_input=64, vocab_size_per_layer_input=4096)
    config = make_config(folder, trainable="lora", quantization="nf4")
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        model = assemble(resolve(str(folder)), config, gpu, fill=True).model
    few_bits = sum(math.prod(layer.shape) for _, layer in frozen_layers(model))
    (table,) = (m.weight for name, m in model.named_modules() if name.endswith("embed_tokens_per_layer"))
    assert 0 < few_bits < table.numel()
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(table, stored["model.embed_tokens_per_layer.weight"].to(table.dtype))


def test_such_a_model_trains_and_is_saved_whole(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("gemma4", hidden_size_per_layer_input=64, vocab_size_per_layer_input=4096)
    result = loop.train(
        make_config(folder, corpus, tmp_path / "run", trainable="lora", max_steps=2, gpu="virtual:64MiB")
    )
    saved, before = load_file(result.model_dir / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == before.keys()
    name = "model.embed_tokens_per_layer.weight"
    assert torch.equal(saved[name], before[name].to(saved[name].dtype))


def test_missing_weight(make_checkpoint, tmp_path):
    from safetensors.torch import save_file

    folder = make_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    device = VirtualGPU(1 << 30)
    with device.active(), pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj.weight"):
        assemble(resolve(str(tmp_path)), make_config(tmp_path, trainable="lora"), device, fill=True)


WITHOUT = """
import json, sys
sys.modules["bitsandbytes"] = None  # as where it is not installed
sys.path.insert(0, {root!r})
from tests.techniques.test_quantization import rehearsed_dict
print(json.dumps(rehearsed_dict({folder!r}, {kind!r})))
"""


def rehearsed_dict(folder, kind):
    found = rehearse(resolve(folder), make_config(folder, quantization=kind, **PARTS["all"]), virtual_device())
    return json.loads(json.dumps({"profile": found.profile.to_dict(), "work": asdict(found.work)}))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_plan_does_not_depend_on_what_is_installed(make_checkpoint, kind):
    """Without bitsandbytes every request of memory and all work are as with it; training says what it needs."""
    folder, root = str(make_checkpoint("llama")), str(Path(__file__).parents[2])
    script = WITHOUT.format(root=root, folder=folder, kind=kind)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{root}/src"}
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == rehearsed_dict(folder, kind)


def test_training_without_bitsandbytes_says_the_one_command(make_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder, device = make_checkpoint("llama"), VirtualGPU(1 << 30)
    with device.active(), pytest.raises(ConfigError, match="pip install 'bitsandbytes"):
        assemble(resolve(str(folder)), make_config(folder, **PARTS["lora"]), device, fill=True)
