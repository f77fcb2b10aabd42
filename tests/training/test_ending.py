"""A run that ends for lack of memory: what was trained until then is saved, and evaluations keep what fitted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from oomless.config import TrainConfig
from oomless.diagnosis.cures import own_settings
from oomless.diagnosis.explain import explain_error
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.training import loop
from oomless.training.guard import OutOfMemory

FILES = ("model.safetensors", "trainer/optimizer.safetensors")


def settings(folder, corpus, out, **changes):
    given = dict(
        model=str(folder),
        data=str(corpus),
        cache_dir=str(out.parent / "cache"),
        output_dir=str(out),
        max_seq_length=32,
        max_steps=5,
        logging_steps=1,
        per_device_train_batch_size=2,
        dtype="fp32",
        gpu="virtual:64MiB",
    )
    return TrainConfig.from_mapping(given | changes)


class Shrinks(loop.Listener):
    """Takes almost all of the GPU away after a step."""

    def __init__(self, device, after):
        self.device, self.after, self.heard = device, after, []

    def stepped(self, metrics):
        if metrics["step"] == self.after:
            self.device.set_capacity(1 << 20)
            self.device.empty_cache()  # else what is cached suffices

    def said(self, message):
        self.heard.append(message)


class Fills(loop.Listener):
    """Takes all of the GPU that a run does not hold, after its last step."""

    def __init__(self, device, last):
        self.device, self.last, self.heard = device, last, []

    def stepped(self, metrics):
        if metrics["step"] == self.last:
            self.device.empty_cache()
            self.device.set_capacity(self.device.usage().reserved_bytes)

    def said(self, message):
        self.heard.append(message)


def test_the_final_model_needs_no_more_than_the_steps(make_checkpoint, corpus, tmp_path, monkeypatch):
    """Adapters, of experts too, are merged on the host; where there is no room to compare logits, that is said."""
    folder = make_checkpoint("mixtral", hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    given = dict(trainable="lora", eval_fraction=0.0, max_steps=2, max_seq_length=16)
    device = VirtualGPU(64 << 20)
    ear = Fills(device, 2)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "open_device", lambda name: device)
        result = loop.train(settings(folder, corpus, tmp_path / "run", **given), ear)
    assert any("no room to compare logits" in message for message in ear.heard), ear.heard
    alone = loop.train(settings(folder, corpus, tmp_path / "alone", **given))
    found, expected = (load_file(run.model_dir / "model.safetensors") for run in (result, alone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("where", ["in a step", "in an evaluation"])
def test_what_was_trained_is_saved(make_checkpoint, corpus, tmp_path, monkeypatch, where):
    changes = dict(attention_dropout=0.2) if where == "in a step" else {}
    folder = make_checkpoint("llama", vocab_size=4096, num_hidden_layers=1, **changes)
    evaluates = dict(eval_steps=3) if where == "in an evaluation" else dict(eval_fraction=0.0)
    evaluates |= dict(optimizer="sgd", momentum=0.0, learning_rate=0.1)  # no state that makes room by going to the host
    device = VirtualGPU(64 << 20)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "open_device", lambda name: device)
        with pytest.raises(OutOfMemory) as ended:
            loop.train(settings(folder, corpus, tmp_path / "run", **evaluates), Shrinks(device, 3))
    if where == "in a step":  # what was tried last is what is explained
        tried = ended.value.config
        assert tried.per_device_train_batch_size == 1
        assert tried.gradient_accumulation_steps == 2
        assert tried.gradient_checkpointing
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    resumed = loop.train(settings(folder, corpus, tmp_path / "run", resume=True, **evaluates))
    straight = loop.train(settings(folder, corpus, tmp_path / "straight", **evaluates))
    assert resumed.steps == straight.steps == 5
    for name in FILES:
        one, other = (load_file(tmp_path / run / "checkpoint-5" / name) for run in ("run", "straight"))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_resumed_run_does_not_evaluate_a_step_twice(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("llama")
    first = loop.train(
        settings(folder, corpus, tmp_path / "run", eval_steps=2, save_steps=2, save_total_limit=3, max_steps=5)
    )
    for step in (5, 4):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"aside-{step}")
    resumed = settings(folder, corpus, tmp_path / "run", eval_steps=2, save_steps=2, save_total_limit=3, resume=True)
    again = loop.train(resumed)
    finished = loop.train(resumed)  # which only makes its final model again
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval_loss/library.jsonl"] for line in lines if "eval_loss/library.jsonl" in line}
    assert list(measured) == [0, 2, 4, 5]
    assert sum("eval_loss/library.jsonl" in line for line in lines) == 4
    assert again.eval_before == {"library.jsonl": measured[2]}
    assert again.eval_after == finished.eval_after == first.eval_after


@pytest.mark.slow
def test_what_is_explained_is_the_run_itself(make_checkpoint, corpus, tmp_path):
    config = settings(
        make_checkpoint("llama", vocab_size=4096),
        corpus,
        tmp_path / "run",
        gpu="virtual:6MiB",
        eval_fraction=0.0,
        trainable="lora+lm_head",
    )
    with pytest.raises(torch.OutOfMemoryError) as ended:
        loop.train(config)
    found = explain_error(ended.value, config)
    given = {
        "cache_dir",
        "model",
        "gpu",
        "max_seq_length",
        "per_device_train_batch_size",
        "dtype",
        "trainable",
        "eval_fraction",
    }
    assert {name for name, source in found.run.sources.items() if source != "default"} == given
    assert found.missing == (), "nothing about it is unknown"
    assert found.cures is not None
    for cure in found.cures.fitting:
        own = own_settings(cure.config)
        assert own["data"] == config.to_dict()["data"]
        assert own["output_dir"] == config.output_dir
        assert own["max_steps"] == 5
        assert own["gpu"] == "virtual:6MiB"
    assert found.cures.fitting


class Hears(loop.Listener):
    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def test_an_evaluation_keeps_what_fitted_the_one_before(make_checkpoint, corpus, tmp_path):
    """Batches of 64 do not fit, nor do those of 32; each is found out once and not again by the next evaluation."""
    ear = Hears()
    config = settings(
        make_checkpoint("llama", vocab_size=4096),
        corpus,
        tmp_path / "run",
        per_device_eval_batch_size=64,
        eval_fraction=0.1,
        eval_steps=1,
        gpu="virtual:16MiB",
    )
    loop.train(config, ear)
    failed = [message for message in ear.heard if "the evaluation is run again" in message]
    assert 1 < len(failed) < 8, ear.heard
    evaluations = [n for n, message in enumerate(ear.heard) if "the evaluation" in message]
    assert evaluations == [*range(evaluations[0], evaluations[0] + len(failed))]
