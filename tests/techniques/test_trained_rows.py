"""Training some rows of the embeddings: only they move, as they would in plain torch, and they are saved in the matrix."""

import dataclasses
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.blank import blank_batch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.models.spec import resolve
from oomless.techniques.trained_rows import parse
from oomless.training import loop
from oomless.training.assemble import assemble

ROWS = "5,17-19,60-120"
IDS = parse(ROWS, 512)
TOKENS = torch.arange(1, 41)[None] * 17 % 512
PARTS = [
    ("llama", False, {"trainable": "lm_head+embed_tokens"}),
    ("llama", True, {"trainable": "lm_head+embed_tokens"}),
    ("gemma", True, {"trainable": "full"}),
    ("qwen2", False, {"trainable": "lm_head"}),
    ("qwen2", False, {"trainable": "embed_tokens"}),
]


def configure(folder, corpus="none", out="none", **settings):
    defaults = {"max_seq_length": 32, "trainable_rows": ROWS, "learning_rate": 0.1, "dtype": "fp32"}
    return TrainConfig(
        model=str(folder), data=(DataSource(path=str(corpus)),), output_dir=str(out), **{**defaults, **settings}
    )


@pytest.mark.parametrize(("architecture", "tied", "parts"), PARTS, ids=str)
def test_gradients_are_those_of_the_whole_matrix(make_checkpoint, architecture, tied, parts):
    folder = make_checkpoint(architecture, tied=tied)
    model = assemble(resolve(str(folder)), configure(folder, **parts), Device(), fill=True)
    tokens = torch.randint(512, (1, 33), generator=torch.Generator().manual_seed(0))
    tokens[0, ::4] = torch.tensor([5, 17, 100])[torch.arange(9) % 3]
    batch = dataclasses.replace(
        blank_batch(1, (32,), Device()),
        input_ids=tokens[:, :-1],
        labels=tokens[:, 1:],
        position_ids=torch.arange(32)[None],
    )
    model.step.accumulate([batch], 32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    logits = plain(batch.input_ids).logits
    functional.cross_entropy(logits[0], batch.labels[0]).backward()
    found = dict(model.model.named_parameters())
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.trained_rows" in found:
            expected = plain.get_submodule(name).weight.grad[IDS]
            torch.testing.assert_close(found[f"{name}.trained_rows"].grad, expected, atol=1e-6, rtol=1e-4)
            assert found[f"{name}.trained_rows"].grad.abs().sum() > 0
            assert f"{name}.weight" not in found or found[f"{name}.weight"].grad is None


@pytest.mark.parametrize(("architecture", "tied", "parts"), PARTS[:2] + PARTS[3:4], ids=str)
def test_only_they_move_and_they_are_saved(make_checkpoint, corpus, tmp_path, architecture, tied, parts):
    folder = make_checkpoint(architecture, tied=tied)
    result = loop.train(configure(folder, corpus, tmp_path, max_steps=3, eval_fraction=0.0, **parts))
    trained = {"lm_head": ["lm_head.weight"]}.get(
        parts["trainable"], ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    )
    assert moved_rows(folder, result.model_dir) == dict.fromkeys(trained, IDS)
    plain = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert plain.config.tie_word_embeddings == tied


def test_they_are_saved_under_the_name_that_the_files_have(make_checkpoint, corpus, tmp_path):
    """GPT-NeoX's head is ``lm_head`` in the model and ``embed_out`` in its files, of which transformers would load the old one."""
    folder = make_checkpoint("gpt_neox")
    result = loop.train(configure(folder, corpus, tmp_path, trainable="lm_head", max_steps=3, eval_fraction=0.0))
    assert moved_rows(folder, result.model_dir) == {"embed_out.weight": IDS}
    trained = load_file(result.model_dir / "model.safetensors")["embed_out.weight"]
    plain = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert torch.equal(plain.get_output_embeddings().weight, trained)


def test_what_an_untied_head_still_shares_is_saved_under_each_name(make_checkpoint, corpus, tmp_path):
    """BERT's head has its bias under two names, which transformers ties only where it ties the matrices."""
    folder = make_checkpoint("bert", tied=True)
    settings = {"trainable": "lm_head", "tied_weights": "untied", "max_steps": 3, "eval_fraction": 0.0}
    result = loop.train(configure(folder, corpus, tmp_path, packing="concatenate", **settings))
    _, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
    assert not report["missing_keys"]


def moved_rows(before, after):
    """Return for each tensor that changed the rows of it that did, of those that were asked for; no others may."""
    before, after = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert before.keys() == after.keys()
    found = {}
    for name in before:
        rows = (before[name] != after[name]).view(len(before[name]), -1).any(dim=1).nonzero()[:, 0].tolist()
        if rows:
            assert set(rows) <= set(IDS)
            found[name] = IDS
    return found


BESIDE = {
    "lora": {"trainable": "lora+lm_head+embed_tokens", "lora_r": 4},
    "nf4 and lora": {"trainable": "lora+lm_head+embed_tokens", "lora_r": 4, "quantization": "nf4"},
    "int8": {"trainable": "lm_head", "quantization": "int8"},
    "streamed": {"trainable": "lm_head+embed_tokens", "stream_frozen": True, "gpu": "virtual:64MiB"},
}
FILES = {"lora": "adapter_model", "nf4 and lora": "adapter_model"}


@pytest.mark.parametrize(
    ("beside", "tied"),
    [("lora", True), ("lora", False), ("nf4 and lora", True), ("int8", False), ("int8", True), ("streamed", True)],
)
def test_beside_what_is_stored_otherwise(make_checkpoint, corpus, tmp_path, beside, tied, monkeypatch):
    """They train, are all that a checkpoint holds of the embeddings, resume exactly, and end in the matrix."""
    folder = make_checkpoint("llama", tied=tied)
    both = "embed_tokens" in BESIDE[beside]["trainable"]
    settings = BESIDE[beside] | ({"tied_weights": "shared"} if tied and not both else {})
    common = settings | {"max_steps": 4, "save_steps": 2, "eval_fraction": 0.0}
    runs = []
    original = loop.Run.__init__
    monkeypatch.setattr(loop.Run, "__init__", lambda run, *given: (original(run, *given), runs.append(run))[0])
    result = loop.train(configure(folder, corpus, tmp_path, **common))
    live = runs[0].assembly.model.eval()(TOKENS, use_cache=False).logits

    kept = load_file(tmp_path / "checkpoint-4" / f"{FILES.get(beside, 'trained')}.safetensors")
    owners = 1 if tied or not both else 2
    assert [tuple(rows.shape) for name, rows in kept.items() if "lora_" not in name] == [(len(IDS), 64)] * owners
    if "lora" not in beside:
        matrices = ["lm_head.weight"] * (not tied) + ["model.embed_tokens.weight"] * (tied or both)
        assert sorted(moved_rows(folder, result.model_dir)) == matrices
    if beside == "lora":
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "checkpoint-4")
        torch.testing.assert_close(adapted.eval()(TOKENS).logits, live, atol=1e-4, rtol=1e-3)
        merged = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
        torch.testing.assert_close(merged(TOKENS).logits, live, atol=1e-4, rtol=1e-3)

    for name in ("checkpoint-4", "model"):
        (tmp_path / name).rename(tmp_path / f"was-{name}")
    again = loop.train(configure(folder, corpus, tmp_path, resume=True, **common))
    left, right = (load_file(made / "model.safetensors") for made in (tmp_path / "was-model", again.model_dir))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_resumes(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("llama", tied=True)
    common = {"trainable": "lm_head+embed_tokens", "max_steps": 4, "save_steps": 2, "eval_fraction": 0.0}
    straight = loop.train(configure(folder, corpus, tmp_path / "a", **common))
    loop.train(configure(folder, corpus, tmp_path / "b", **common))
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    shutil.rmtree(tmp_path / "b" / "model")
    again = loop.train(configure(folder, corpus, tmp_path / "b", resume=True, **common))
    left, right = (load_file(result.model_dir / "model.safetensors") for result in (straight, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("wanted", ["", "a", "3-", "-3", "7-5", "1,,2", "1.5"])
def test_what_is_no_list_of_rows(wanted):
    with pytest.raises(ConfigError, match="ids and ranges"):
        parse(wanted, 512)


def test_ids_are_once_and_in_order():
    assert parse("7, 3-5,4", 8) == [3, 4, 5, 7]
    with pytest.raises(ConfigError, match="the last is 7"):
        parse("8", 8)


def test_peft_has_one_set_of_rows_for_a_tied_matrix(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    apart = configure(folder, trainable="lora+lm_head+embed_tokens", tied_weights="untied")
    with pytest.raises(ConfigError, match="one set of rows"):
        assemble(resolve(str(folder)), apart, Device(), fill=True)
    assemble(resolve(str(folder)), dataclasses.replace(apart, trainable="lora+lm_head"), Device(), fill=True)


def test_no_effect(make_checkpoint):
    folder = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="neither embed_tokens nor lm_head trains"):
        assemble(resolve(str(folder)), configure(folder, trainable="model.layers.1.*"), Device(), fill=True)
