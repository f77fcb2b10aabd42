"""Layers that a class ties to each other: Zamba's block, which is run at several depths and in the files once."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError, ModelError
from oomless.export.merged import Merged
from oomless.export.source import find
from oomless.memory.device import Device
from oomless.models.save import model_tensors, original_weights
from oomless.models.spec import resolve
from oomless.training import loop
from oomless.training.assemble import assemble

ZAMBA = dict(
    **dict(model_type="zamba", num_hidden_layers=3, layers_block_type=["hybrid", "linear_attention", "hybrid"]),
    **dict(mamba_d_state=4, mamba_dt_rank=4, n_mamba_heads=2, attention_head_dim=32, hidden_size=32),
    **dict(attention_hidden_size=64, num_attention_heads=2, num_key_value_heads=2),
)
FIRST, SECOND = "model.layers.0.shared_transf.", "model.layers.2.shared_transf."
IDS = torch.arange(1, 21)[None]


@pytest.fixture(scope="module")
def zamba(make_checkpoint):
    return make_checkpoint("llama", tied=True, **ZAMBA)


def make_config(zamba, corpus, out, **settings):
    settings = {"trainable": "lora", "lora_r": 4, "gpu": "cpu", "packing": "concatenate", "dtype": "fp32", **settings}
    steps = {
        "max_seq_length": 16,
        "max_steps": 3,
        "learning_rate": 0.1,
        "eval_fraction": 0.0,
        "seed": 1,
        "save_steps": 2,
    }
    return TrainConfig(model=str(zamba), data=(DataSource(path=str(corpus)),), output_dir=str(out), **steps, **settings)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantization": "nf4"}, {"stream_frozen": True, "gpu": "virtual:64MiB"}],
    ids=["lora", "nf4", "streamed"],
)
def test_one_adapter_is_at_every_place_and_is_merged_once(zamba, corpus, tmp_path, settings):
    config = make_config(zamba, corpus, tmp_path / "run", **settings)
    result = loop.train(config)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved.keys() == load_file(zamba / "model.safetensors").keys()  # what is tied once, in its class' own form
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir)
    last = tmp_path / "run" / "checkpoint-3"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(zamba), last)
    trained = adapted.get_base_model()
    assert trained.get_submodule(f"{SECOND}feed_forward.up_proj").lora_B["default"].weight.any()
    assert (logits(merged) - logits(trained)).norm() < 1e-3 * logits(trained).norm()
    untouched = AutoModelForCausalLM.from_pretrained(zamba)
    assert (logits(untouched) - logits(trained)).norm() > 0.1 * logits(trained).norm()
    exported = {name: late.make() for name, late in Merged(find(last)).in_files().items()}
    assert exported.keys() == saved.keys()
    assert all(torch.allclose(exported[name], saved[name], atol=1e-6) for name in saved)

    (last / "adapter_model.safetensors").unlink()  # so that it goes on after the second step
    again = make_config(zamba, corpus, tmp_path / "run", **settings, resume=True)
    loop.train(again)
    resumed = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)


def test_a_layer_in_few_bits_is_there_once(zamba, corpus):
    assembly = assemble(
        resolve(str(zamba)), make_config(zamba, corpus, "none", quantization="nf4"), Device(), fill=True
    )
    model, name = assembly.model, "feed_forward.up_proj"
    assert model.get_submodule(FIRST + name) is model.get_submodule(SECOND + name)
    late = original_weights(model, zamba, Device())
    assert f"{FIRST}{name}.weight" in late
    assert f"{SECOND}{name}.weight" not in late
    untied = make_config(zamba, corpus, "none", quantization="nf4", tied_weights="untied", trainable="lora+lm_head")
    model = assemble(resolve(str(zamba)), untied, Device(), fill=True).model
    late = original_weights(model, zamba, Device())  # of a config whose class ties nothing
    assert torch.equal(late[f"{FIRST}{name}.weight"].make(), late[f"{SECOND}{name}.weight"].make())
    assert {f"{FIRST}{name}.weight", f"{SECOND}{name}.weight"} <= model_tensors(model, Device(), late).keys()


def test_files_that_hold_both_are_read_where_they_agree(zamba, corpus, tmp_path):
    tensors = load_file(zamba / "model.safetensors")
    both = tensors | {name.replace(FIRST, SECOND): t.clone() for name, t in tensors.items() if FIRST in name}
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((zamba / name).read_bytes())
    config = make_config(folder, corpus, "none", quantization="nf4")
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    assemble(resolve(str(folder)), config, Device(), fill=True)
    both[f"{SECOND}self_attn.q_proj.weight"] += 1
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="two that differ"):
        assemble(resolve(str(folder)), config, Device(), fill=True)


def test_two_adapters_of_one_matrix_are_refused(zamba, corpus, tmp_path):
    """As other trainers make them, which put an adapter of its own at each place: the sum of none of them is the model."""
    loop.train(make_config(zamba, corpus, tmp_path / "run"))
    last = tmp_path / "run" / "checkpoint-3"
    tensors = load_file(last / "adapter_model.safetensors")
    tensors[f"base_model.model.{SECOND}self_attn.q_proj.lora_B.weight"] += 1
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((last / "adapter_config.json").read_bytes())
    with pytest.raises(ModelError, match=r"layers.*otherwise than.*layers.*one matrix"):
        Merged(find(folder))
    with pytest.raises(ConfigError, match="two different parts"):
        loop.train(make_config(folder, corpus, tmp_path / "on"))
