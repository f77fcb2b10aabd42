"""The model that oomless builds is the model that transformers loads, and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import build, save, twin
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer

IDS = torch.arange(1, 21)[None] * 17 % 512


def built(folder, dtype=torch.float32):
    spec = resolve(str(folder))
    model = build.build(spec, device=Device(), dtype=dtype)
    build.load_weights(model, spec, device=Device())
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "qwen2", "qwen3"])
def test_same_logits_as_transformers(make_checkpoint, architecture, tied):
    folder = make_checkpoint(architecture, tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    torch.testing.assert_close(built(folder)(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied(make_checkpoint, tied):
    model = built(make_checkpoint("llama", tied=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_saved_in_shards_and_loaded_by_transformers(make_checkpoint, tmp_path, monkeypatch):
    model = built(make_checkpoint("qwen2", tied=True))
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    save.save_model(model, tmp_path, save.model_tensors(model, Device()), Device())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(built(tmp_path)(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_mixture_of_experts_round_trip(make_checkpoint, tmp_path, tokenizer_folder):
    """transformers holds experts in one tensor and stores them one by one; so do we."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mixtral",
        **dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
        **dict(num_key_value_heads=1, num_local_experts=4),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "a")
    model = built(tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    (tmp_path / "b").mkdir()
    save.save_model(model, tmp_path / "b", save.model_tensors(model, Device()), Device())
    ours, original = (load_file(tmp_path / name / "model.safetensors") for name in "ba")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)


def test_what_earlier_versions_stored_although_it_is_computed_is_no_stranger(make_checkpoint, tmp_path):
    source = make_checkpoint("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(built(tmp_path)(IDS).logits, built(source)(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["sharded", "one", "before 2020"])
def test_pickled_weights_are_read_where_they_lie(form, make_checkpoint, tmp_path):
    source = make_checkpoint("llama", tied=True)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # pickles hold tied ones twice
    if form == "sharded":
        parts = {f"pytorch_model-0000{part}-of-00002.bin": list(tensors)[part - 1 :: 2] for part in (1, 2)}
        for file, names in parts.items():
            torch.save({name: tensors[name] for name in names}, tmp_path / file)
        weight_map = {name: file for file, names in parts.items() for name in names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "one")
    torch.testing.assert_close(built(tmp_path)(IDS).logits, built(source)(IDS).logits, rtol=0, atol=0)


def test_names_of_the_base_model_alone(make_checkpoint, tmp_path):
    """GPT-2's files name no head and no prefix."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    } | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(built(tmp_path)(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_sixteen_bit(make_checkpoint):
    model = built(make_checkpoint("llama"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class TestBadInput:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(ModelError, match="no model folder"):
            resolve(str(tmp_path / "nothing" / "here" / "at-all"))

    def test_no_config(self, tmp_path):
        with pytest.raises(ModelError, match=r"config\.json"):
            resolve(str(tmp_path))

    def test_config_is_not_json(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ModelError, match="cannot be read as JSON"):
            resolve(str(tmp_path))

    def test_unknown_architecture_names_the_nearest(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
        with pytest.raises(ModelError, match="Did you mean 'llama'"):
            resolve(str(tmp_path))

    def test_truncated_weights(self, make_checkpoint, tmp_path):
        source = make_checkpoint("llama")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        weights = (source / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            built(tmp_path)

    @pytest.mark.parametrize("what", ["missing", "shape", "unknown"])
    def test_weights_that_do_not_belong(self, make_checkpoint, tmp_path, what):
        source = make_checkpoint("llama")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        if what == "missing":
            del tensors["model.norm.weight"]
        elif what == "shape":
            tensors["model.norm.weight"] = torch.ones(3)
        else:
            tensors["model.norm.weight_of_another"] = torch.ones(64)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"model\.norm\.weight"):
            built(tmp_path)

    def test_tied_by_the_config_but_two_in_the_files(self, make_checkpoint, tmp_path):
        source = make_checkpoint("llama", tied=True)
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        built(tmp_path)
        tensors["lm_head.weight"][3] += 1
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
            built(tmp_path)

    def test_nothing_but_tensors_is_read_from_a_pickle(self, make_checkpoint, tmp_path):
        (tmp_path / "config.json").write_bytes((make_checkpoint("llama") / "config.json").read_bytes())
        for contents in (Path("x"), {"model.norm.weight": Path("x")}):
            torch.save(contents, tmp_path / "pytorch_model.bin")
            with pytest.raises(ModelError, match="weights alone, and nothing else is read from a pickle"):
                built(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelError, match="no whole file"):
            built(tmp_path)

    def test_no_weights(self, make_checkpoint, tmp_path):
        (tmp_path / "config.json").write_bytes((make_checkpoint("llama") / "config.json").read_bytes())
        with pytest.raises(ModelError, match=r"no model\.safetensors and no pytorch_model\.bin"):
            built(tmp_path)

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(str(tmp_path))


def test_a_buffer_that_a_module_above_computes_is_computed(tmp_path):
    """Falcon-H1's body fills buffers of its layers: left out, they are whatever lay in memory."""
    config = AutoConfig.for_model("falcon_h1", ssm_multipliers=[0.5, 0.25, 0.5, 0.25, 0.5], vocab_size=512)
    torch.manual_seed(1)
    with twin.on_the_host():
        model = twin.twin(config, "eager")
    model.save_pretrained(tmp_path)
    ours = built(tmp_path)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(name)), name
