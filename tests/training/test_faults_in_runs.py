"""Running out of memory anywhere in a whole run, from the build to the final model, with the settings as they are by default."""

import gc
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.techniques.test_pairs import PAIRS, TECHNIQUES, together
from tests.training.test_guard import OPTIMIZERS

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.training import guard, loop

STORIES = ("loop.py", "script.py", "steps.py", "evaluation.py", "saving.py", "resuming.py")
FILES = ("model.safetensors", "trainer/optimizer.safetensors")
MODES = OPTIMIZERS | {
    "offload_optimizer": dict(offload_optimizer=True),
    "in_backward": dict(optimizer_in_backward=True, save_steps=2),
    "in_backward_unsaved": dict(optimizer_in_backward=True, dtype="fp16", gradient_accumulation_steps=1),
    "adafactor_in_backward": dict(optimizer="adafactor", optimizer_in_backward=True, save_steps=1),
    "lora": dict(trainable="lora+lm_head", lora_dropout=0.3),
    "cheap_recompute": dict(cheap_recompute=True),
    "tiles": dict(mlp_tiles=2),
    "offload_activations": dict(gradient_checkpointing=True, offload_activations=True),
    "nf4": dict(trainable="lora", quantization="nf4"),
    "stream_frozen": dict(trainable="lora", stream_frozen=True),
    "rows": dict(trainable="lm_head+embed_tokens", trainable_rows="0-99"),
}


RARER = {"tiles", "offload_activations", "nf4", "stream_frozen", "rows"}


pytestmark = pytest.mark.usefixtures("frozen_garbage")


class Ear(loop.Listener):
    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)

    def stepped(self, metrics):
        self.heard.append(metrics)


class Runs:
    """One run, made again and again with a fault at another allocation."""

    def __init__(self, folder, corpus, tmp_path, monkeypatch, settings):
        self.tmp_path, self.monkeypatch, self.number = tmp_path, monkeypatch, 0
        self.settings = dict(
            model=str(folder),
            data=(DataSource(path=str(corpus)),),
            cache_dir=str(tmp_path / "cache"),
            **{
                **dict(max_seq_length=32, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3),
                **dict(
                    eval_fraction=0.02,
                    per_device_eval_batch_size=64,
                    dtype="fp32",
                    learning_rate=1e-3,
                    loss_chunk_bytes=1 << 20,
                ),
                **settings,
            },
        )

    def run(self, fault=None, places=None):
        """Return the final weights, the losses, what was said, what the device holds and how much it was asked for.

        ``places`` gets the allocations by the lines of the loop that asked for them.
        """
        self.number += 1
        out = self.tmp_path / f"run-{self.number}"
        device = VirtualGPU(256 << 20)
        if fault is not None:
            device.fail_at(fault)
        if places is not None:
            allocate = device._ledger.allocate

            def noted(*asked):
                frames = traceback.walk_stack(sys._getframe())
                lines = tuple(line for frame, line in frames if Path(frame.f_code.co_filename).name in STORIES)
                places.setdefault(lines, []).append(device.allocation_count)
                return allocate(*asked)

            device._ledger.allocate = noted
        self.monkeypatch.setattr(loop, "open_device", lambda name: device)
        ear = Ear()
        result = loop.train(TrainConfig(output_dir=str(out), **self.settings), ear)
        gc.collect()
        weights = load_file(result.model_dir / "model.safetensors")
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses = [{k: v for k, v in line.items() if "loss" in k or k == "step"} for line in lines]
        heard = [message for message in ear.heard if isinstance(message, str)]
        return weights, losses, heard, device.usage().allocated_bytes, device.allocation_count


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode in RARER else ()) for mode in MODES]
)
def test_no_mode_ends_the_run(make_checkpoint, corpus, tmp_path, monkeypatch, mode, full_length, record_property):
    layers = 2 if mode == "offload_activations" else 1
    width = 1024 if mode == "offload_optimizer" else 96
    folder = make_checkpoint("llama", num_hidden_layers=layers, intermediate_size=width)
    runs = Runs(folder, corpus, tmp_path, monkeypatch, MODES[mode])

    def moments(count):
        # Each mode at another one: from the build over rehearsal, steps and saves to the last evaluation.
        moment = list(MODES).index(mode) * (count - 1) // (len(MODES) - 1)
        return random.Random(mode).sample(range(count), 20) if full_length else [moment]

    record_property("faults", len(assert_no_fault_ends_the_run(runs, moments)))


def assert_no_fault_ends_the_run(runs, moments):
    """Return the allocations of the run, each of ``moments`` of which failed once; what it leaves is the same to the bit."""
    expected, losses, heard, held, count = runs.run()
    assert not heard
    assert held == 0
    faults = moments(count)
    for index in faults:
        weights, found_losses, heard, held, _ = runs.run(index)
        assert any("out of memory" in message for message in heard), index
        assert same(weights, expected), index
        assert found_losses == losses, index
        assert held == 0, index
    return faults


@pytest.mark.full_length
@pytest.mark.parametrize("first", TECHNIQUES)
def test_no_two_techniques_end_the_run(make_checkpoint, corpus, tmp_path, monkeypatch, first, record_property):
    chance, faults = random.Random(first), 0
    for pair in PAIRS:
        if pair[0] != first:
            continue
        width = 1024 if "offloaded optimizer" in pair else 96
        folder = make_checkpoint("llama", num_hidden_layers=3, vocab_size=1024, intermediate_size=width)
        settings = together(pair) | {"learning_rate": 1e-3}
        runs = Runs(folder, corpus, tmp_path / pair[1], monkeypatch, settings)
        faults += len(assert_no_fault_ends_the_run(runs, lambda count: [chance.randrange(count)]))
        shutil.rmtree(tmp_path / pair[1])
    record_property("faults", faults)


def test_no_place_in_the_loop_ends_the_run(make_checkpoint, corpus, tmp_path, monkeypatch):
    runs = Runs(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path, monkeypatch, {"save_steps": 2})
    places = {}
    expected, losses, heard, held, _ = runs.run(places=places)
    assert not heard
    assert len(places) > 10
    chance = random.Random(0)
    for lines, indices in places.items():
        weights, found_losses, heard, held, _ = runs.run(chance.choice(indices))
        assert any("out of memory" in message for message in heard), lines
        assert same(weights, expected), lines
        assert found_losses == losses, lines
        assert held == 0, lines


@pytest.mark.parametrize("save_steps", [2, None], ids=["checkpoint", "no_checkpoint"])
def test_going_back(make_checkpoint, corpus, tmp_path, monkeypatch, save_steps):
    """The last allocations of step 4 fail, twice, when most weights have changed: the second time at a lower rung."""
    devices, ends, runs = [], [], []
    monkeypatch.setattr(loop, "open_device", lambda name: devices[-1])

    class Kept(loop.Run):
        def execute(self):
            runs.append(self)
            return super().execute()

    monkeypatch.setattr(loop, "Run", Kept)

    class Unlucky(Ear):
        def __init__(self, faults):
            super().__init__()
            self.faults = faults

        def stepped(self, metrics):
            super().stepped(metrics)
            device = devices[-1]
            ends.append(device.allocation_count)
            if metrics["step"] == 3 and self.faults:
                self.faults -= 1
                device.fail_at(device.allocation_count + ends[2] - ends[1] - 9)

    results = []
    for faults in (0, 1, 2):
        devices.append(VirtualGPU(256 << 20))
        runs.clear()
        config = TrainConfig(
            model=str(make_checkpoint("llama", num_hidden_layers=1)),
            data=(DataSource(path=str(corpus)),),
            cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / f"{faults}"),
            max_seq_length=32,
            optimizer="sgd",
            learning_rate=1e-2,
            optimizer_in_backward=True,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            dtype="fp32",
            max_steps=6,
            save_steps=save_steps,
            eval_fraction=0.0,
            loss_chunk_bytes=1 << 20,
        )
        ear = Unlucky(faults)
        result = loop.train(config, ear)
        said = [message for message in ear.heard if isinstance(message, str)]
        assert sum("after weights had changed" in message for message in said) == faults
        assert sum("the run begins again at step 1" in message for message in said) == (0 if save_steps else faults)
        assert not any("the step is run again" in message for message in said)
        assert len({id(run.guard.standing) for run in runs}) == 1, "a run that begins again has forgotten something"
        assert sum(message == "back to checkpoint-2" for message in said) == (faults if save_steps else 0)
        lines = [json.loads(line) for line in (tmp_path / f"{faults}" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(line["tokens_per_second"] > 0 for line in lines)
        assert lines[-1].get("oom_recoveries", 0) == faults
        assert lines[-1].get("recovery_rung", 0) == max(0, faults - 1)
        results.append(load_file(result.model_dir / "model.safetensors"))
    assert same(results[1], results[0])
    assert same(results[2], results[0])


def test_a_climb_costs_no_run(make_checkpoint, corpus, tmp_path, monkeypatch):
    """Updates in backward, no checkpoint, and a first rung that never fits: it is tried again, and weights never change."""
    monkeypatch.setattr(guard, "STEPS_BEFORE_CLIMBING", 2)
    model = make_checkpoint("llama", num_hidden_layers=1)
    held = {}

    def run(name, capacity_bytes):
        monkeypatch.setattr(loop, "open_device", lambda gpu: VirtualGPU(capacity_bytes))
        config = TrainConfig(
            model=str(model),
            data=(DataSource(path=str(corpus)),),
            cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / name),
            max_seq_length=256,
            per_device_train_batch_size=8,
            loss_chunk_bytes=1 << 20,
            optimizer="sgd",
            optimizer_in_backward=True,
            dtype="fp32",
            max_steps=8,
            eval_fraction=0.0,
        )
        ear = Ear()
        held[name] = load_file(loop.train(config, ear).model_dir / "model.safetensors")
        return [line for line in ear.heard if not isinstance(line, str)], [s for s in ear.heard if isinstance(s, str)]

    lines, _ = run("alone", 1 << 30)
    line = lines[-1]
    lines, said = run("crowded", (line["memory_bytes"] + line["peak_memory_bytes"]) // 2)
    assert sum(message.startswith("trying") for message in said) == 2, "after 2 good steps, and 4 more"
    assert not any("weights had changed" in message for message in said)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for name, weight in held["alone"].items():
        assert float((held["crowded"][name] - weight).norm()) <= 1e-5 * float(weight.norm())


def test_asked_to_end_in_a_step_that_begins_again(make_checkpoint, corpus, tmp_path, monkeypatch):
    device = VirtualGPU(256 << 20)
    monkeypatch.setattr(loop, "open_device", lambda name: device)

    class Terminated(Ear):
        def stepped(self, metrics):
            super().stepped(metrics)
            if metrics["step"] == 1:
                self.ended = device.allocation_count
            elif metrics["step"] == 2:
                device.fail_at(2 * device.allocation_count - self.ended - 9)

        def said(self, message):
            super().said(message)
            if "begins again" in message:
                os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(
        model=str(make_checkpoint("llama", num_hidden_layers=1)),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(tmp_path),
        max_seq_length=32,
        optimizer_in_backward=True,
        dtype="fp32",
        max_steps=6,
        eval_fraction=0.0,
        loss_chunk_bytes=1 << 20,
    )
    ear = Terminated()
    result = loop.train(config, ear)
    assert (result.interrupted, result.steps) == (True, 0)
    assert any("begins again" in message for message in ear.heard if isinstance(message, str))


def test_the_heaviest_batch_comes_first(make_checkpoint, texts, tmp_path, monkeypatch):
    """Where attention keeps scores long documents need more; they come last, and what they need shows before step 1."""
    lines = ["def a(b):\n    return b + 1\n" * 2] * 60 + [text[:3000] for text in texts[-3:]]
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")

    class Apart(Ear):
        """Has the peak of each step by itself."""

        def stepped(self, metrics):
            super().stepped(metrics)
            device.reset_peak()

    def run(name, capacity_bytes):
        nonlocal device
        device = VirtualGPU(capacity_bytes)
        monkeypatch.setattr(loop, "open_device", lambda gpu: device)
        config = TrainConfig(
            model=str(make_checkpoint("gemma2", sliding_window=512, num_hidden_layers=1)),
            data=(DataSource(path=str(corpus)),),
            cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / name),
            max_seq_length=256,
            per_device_train_batch_size=4,
            shuffle=False,
            eval_fraction=0.0,
            dtype="fp32",
            loss_chunk_bytes=1 << 20,
        )
        ear = Apart()
        loop.train(config, ear)
        return ear.heard

    device = None
    alone = run("alone", 1 << 30)
    assert all(not isinstance(said, str) for said in alone)
    peaks = [line["peak_memory_bytes"] for line in alone]
    assert peaks[0] == max(peaks), "the heaviest came before the first step"
    light, heavy = peaks[1], max(peaks[1:])
    assert heavy > 1.5 * light
    crowded = run("crowded", (light + heavy) // 2)
    assert "out of memory" in crowded[0]
    first_step = next(place for place, said in enumerate(crowded) if not isinstance(said, str))
    assert not [said for said in crowded[first_step:] if isinstance(said, str)], "a step ran out of memory as well"
    assert [line["loss"] for line in crowded[first_step:]] == pytest.approx([line["loss"] for line in alone], rel=1e-5)


def test_a_leaner_optimizer_is_resumed(make_checkpoint, corpus, tmp_path):
    """What its moments have come to is in the checkpoint, whose settings still say adamw."""
    config = TrainConfig(
        model=str(make_checkpoint("llama", intermediate_size=1024)),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(tmp_path / "run"),
        gpu="virtual:64MiB",
        dtype="fp32",
        max_seq_length=32,
        max_steps=4,
        save_steps=2,
        eval_fraction=0.0,
        loss_chunk_bytes=1 << 20,
        allow_leaner_optimizer=True,
    )
    device = VirtualGPU(64 << 20)
    with device.active():
        (tmp_path / "run").mkdir()
        run = loop.Run(config, tmp_path / "run", device, Ear())
        run.guard.standing.level = len(run.guard.rungs) - 1
        run.execute()
    assert run.guard.rungs[run.guard.standing.level].leaner_optimizer
    weights, state = (load_file(tmp_path / "run" / "checkpoint-4" / name) for name in FILES)
    assert torch.int8 in {tensor.dtype for tensor in state.values()}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "model")
    loop.train(TrainConfig.from_mapping(config.to_dict() | {"resume": True}))
    assert same(load_file(tmp_path / "run" / "checkpoint-4" / FILES[0]), weights)
    assert same(load_file(tmp_path / "run" / "checkpoint-4" / FILES[1]), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(gpu="cpu"), "allow_leaner_optimizer has no effect on a CPU"),
        (dict(gpu="virtual:64MiB", optimizer="sgd"), "only AdamW's moments of 32 bits"),
        (dict(gpu="virtual:64MiB", recover_from_oom=False), "has no effect without recover_from_oom"),
    ],
)
def test_a_leaner_optimizer_without_effect(make_checkpoint, corpus, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        loop.train(
            TrainConfig(
                model=str(make_checkpoint("llama")),
                data=(DataSource(path=str(corpus)),),
                output_dir=str(tmp_path),
                max_seq_length=32,
                allow_leaner_optimizer=True,
                **settings,
            )
        )
