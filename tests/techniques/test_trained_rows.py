"""Training some rows of the embeddings: only they move, as they would in plain torch, and they are saved in the matrix."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.models.spec import resolve
from oomless.planning.rehearse import blank_batch
from oomless.techniques.trained_rows import parse
from oomless.training import loop
from oomless.training.assemble import assemble

ROWS = "5,17-19,60-120"
IDS = parse(ROWS, 512)
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
    result = loop.train(configure(folder, corpus, tmp_path, max_steps=3, eval_fraction=0.1, **parts))
    before, after = load_file(folder / "model.safetensors"), load_file(result.model_dir / "model.safetensors")
    assert before.keys() == after.keys()
    trained = {"lm_head": ["lm_head.weight"]}.get(
        parts["trainable"], ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    )
    for name in before:
        moved = (before[name] != after[name]).view(len(before[name]), -1).any(dim=1).nonzero()[:, 0].tolist()
        assert set(moved) <= set(IDS if name in trained else []), name
        assert bool(moved) == (name in trained), name
    plain = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert plain.config.tie_word_embeddings == tied


def test_resumes(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("llama", tied=True)
    common = {"trainable": "lm_head+embed_tokens", "max_steps": 4, "save_steps": 2, "eval_fraction": 0.1}
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "lora+lm_head"}, "cannot be joined"),
        ({"trainable": "lm_head", "quantization": "nf4"}, "cannot be"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        configure("x", **settings)


def test_no_effect(make_checkpoint):
    folder = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="neither embed_tokens nor lm_head trains"):
        assemble(resolve(str(folder)), configure(folder, trainable="model.layers.1.*"), Device(), fill=True)
