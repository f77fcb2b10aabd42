"""Twenty steps are ten, a SIGKILL and ten more: bit for bit, whatever trains and whatever updates it."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from oomless.config import DataSource, TrainConfig
from oomless.errors import CheckpointError, ConfigError
from oomless.training import loop
from oomless.training.checkpoint import list_checkpoints

MODES = [
    dict(trainable="full"),
    dict(trainable="full", optimizer="sgd", dtype="bf16"),
    dict(trainable="full", dtype="fp16", packing="best_fit"),
    dict(trainable="lm_head", tied_weights="untied"),
    dict(trainable="lm_head", tied_weights="shared", optimizer="sgd"),
    dict(trainable="embed_tokens", tied_weights="untied", dtype="bf16"),
    dict(trainable="full", optimizer="adamw_8bit", dtype="bf16", weight_precision="correction"),
    dict(trainable="full", optimizer="adafactor", dtype="bf16", weight_precision="stochastic"),
    dict(trainable="full", optimizer="adamw_8bit", dtype="fp16", optimizer_in_backward=True),
    dict(trainable="full", optimizer="apollo", gradient_accumulation_steps=2),
    dict(trainable="full", optimizer="apollo_mini", dtype="bf16", weight_precision="plain"),
    dict(trainable="full", optimizer="galore"),
    dict(trainable="full", optimizer="muon"),
    dict(trainable="lora+lm_head+embed_tokens", lora_dropout=0.1, packing="concatenate"),
    dict(trainable="lora", use_dora=True, dtype="fp16", optimizer="sgd"),
    dict(trainable="lora+lm_head+embed_tokens", quantization="nf4", dtype="bf16", weight_precision="correction"),
    dict(trainable="lm_head", quantization="int8"),
    dict(trainable="model.layers.1.*+lm_head", tied_weights="untied", gradient_checkpointing=True),
    dict(gradient_checkpointing=True, checkpointed_layers=1, cheap_recompute=True, mlp_tiles=2),
]


def make_config(model, corpus, out, **settings):
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        gpu="cpu",
        eval_fraction=0.1,
        **{
            **dict(max_seq_length=48, per_device_train_batch_size=2, max_steps=20, save_steps=10, learning_rate=1e-2),
            **settings,
        },
    )


def run(config, log):
    """In a process of its own: train with one thread and leave the outcome or the error in ``log``."""
    torch.set_num_threads(1)
    try:
        loop.train(config)
        log.write_text("done")
    except Exception as error:
        log.write_text(f"{type(error).__name__}: {error}")


def finish(processes, config, log):
    process = processes.Process(target=run, args=(config, log))
    process.start()
    process.join()
    assert log.read_text() == "done"


def same_files(left, right):
    """The final models and the optimizer states of two run folders, bit for bit."""
    for name in ("model/model.safetensors", "checkpoint-20/trainer/optimizer.safetensors"):
        ours, theirs = load_file(left / name), load_file(right / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


def losses_of(run_folder):
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_killed_and_resumed_is_undisturbed(make_checkpoint, corpus, tmp_path, processes, settings):
    model = make_checkpoint("llama", tied="tied_weights" in settings)
    straight, broken = (make_config(model, corpus, tmp_path / name, **settings) for name in ("straight", "broken"))
    finish(processes, straight, tmp_path / "log")
    victim = processes.Process(target=run, args=(broken, tmp_path / "log"))
    victim.start()
    while not (tmp_path / "broken" / "checkpoint-10").is_dir():
        time.sleep(0.002)
        assert victim.is_alive()
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "broken" / "model").exists(), "killed too late to show anything"
    finish(processes, make_config(model, corpus, tmp_path / "broken", resume=True, **settings), tmp_path / "log")
    same_files(tmp_path / "straight", tmp_path / "broken")
    assert losses_of(tmp_path / "straight") == losses_of(tmp_path / "broken")


@pytest.fixture
def stopped_run(make_checkpoint, corpus, tmp_path):
    """A finished run of 4 steps with checkpoints at 2 and 4, and its config."""
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", max_steps=4, save_steps=2)
    loop.train(config)
    return config, tmp_path / "run"


def again(config, **changes):
    return TrainConfig.from_mapping(config.to_dict() | {"resume": True} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "must keep learning_rate: it began with 0.01, now it is 0.5"),
        ({"max_seq_length": 64}, "must keep max_seq_length"),
        ({"per_device_train_batch_size": 4}, "at 2; got 4"),
    ],
)
def test_what_would_change_the_result_is_refused(stopped_run, changes, message):
    with pytest.raises(ConfigError, match=message):
        loop.train(again(stopped_run[0], **changes))


def test_what_trained_beside_another_model_is_not_gone_on_with(make_checkpoint, corpus, tmp_path):
    """Of a run with LoRA the model was changed meanwhile; where it was only written anew, in bf16, the run goes on."""
    shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    config = make_config(tmp_path / "model", corpus, tmp_path / "run", trainable="lora", max_steps=2, save_steps=2)
    loop.train(config)
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    loop.train(again(config, max_steps=3))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="changes another model than the one in"):
        loop.train(again(config, max_steps=4))


def test_micro_batch_may_change(make_checkpoint, corpus, tmp_path):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path, max_steps=3, save_steps=1)
    loop.train(config)
    for checkpoint in list_checkpoints(tmp_path)[1:]:
        for path in sorted(checkpoint.folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        checkpoint.folder.rmdir()
    result = loop.train(again(config, per_device_train_batch_size=1, gradient_accumulation_steps=2))
    assert result.steps == 3


@pytest.mark.parametrize(
    "victim", ["model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json", "config.json"]
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_passed_over(stopped_run, victim, how):
    config, run_folder = stopped_run
    path = list_checkpoints(run_folder)[-1].folder / victim
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])

    class Ear(loop.Listener):
        heard: list[str] = []

        def said(self, message):
            self.heard.append(message)

    result = loop.train(again(config), Ear())
    assert result.steps == 4
    assert any(victim in message and "trying the one before it" in message for message in Ear.heard)
    assert any("resumed from checkpoint-2" in message for message in Ear.heard)


def test_every_checkpoint_damaged(stopped_run):
    config, run_folder = stopped_run
    for checkpoint in list_checkpoints(run_folder):
        (checkpoint.folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        loop.train(again(config))


def test_other_data_is_refused(stopped_run, corpus):
    config, _ = stopped_run
    text = corpus.read_text()
    changed = corpus.with_name("changed.jsonl")
    changed.write_text(text.replace("import", "export"))
    renamed = corpus.with_name("library-before.jsonl")
    corpus.rename(renamed)
    changed.rename(corpus)
    try:
        with pytest.raises(CheckpointError, match="the data or how it is packed differs"):
            loop.train(again(config))
    finally:
        renamed.rename(corpus)


def test_disk_full_keeps_what_was_saved(stopped_run, monkeypatch):
    """A real full disk is a later issue's; here the file system refuses a write in the middle of a save."""
    import errno

    from oomless.models import save

    config, run_folder = stopped_run
    original = save.write_safetensors

    def full(path, *arguments):
        original(path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for checkpoint in list_checkpoints(run_folder)[-1:]:
        (checkpoint.folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(save, "write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left on device.*--resume"):
        loop.train(again(config))
    monkeypatch.undo()
    assert not list(run_folder.glob(".checkpoint*"))
    assert loop.train(again(config)).steps == 4
