"""What ends runs besides a GPU that is full: kills, preemption, full disks, damaged files, a second run, changed data."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import reduction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oomless import cli
from oomless.config import DataSource, TrainConfig
from oomless.errors import CheckpointError, DataError
from oomless.models import save
from oomless.training import checkpoint, loop
from oomless.training.checkpoint import Checkpoint, damage, list_checkpoints, newest_good
from oomless.training.step import TrainingStep

DISK = Path(__file__).with_name("full_disk.py")


class Ear(loop.Listener):
    """Remembers what a run says."""

    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def make_config(model, corpus, out, **settings):
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        **{
            **dict(
                gpu="cpu",
                max_seq_length=32,
                per_device_train_batch_size=2,
                max_steps=4,
                save_steps=2,
                learning_rate=1e-2,
            ),
            **dict(eval_fraction=0, lora_dropout=0.1, trainable="lora+lm_head"),
            **settings,
        },
    )


def again(config, **changes):
    return TrainConfig.from_mapping(config.to_dict() | {"resume": True} | changes)


def same_result(left, right, step):
    """The last checkpoints of two run folders, bit for bit, and their losses."""
    for name in ("adapter_model.safetensors", "trainer/optimizer.safetensors"):
        ours, theirs = (load_file(out / f"checkpoint-{step}" / name) for out in (left, right))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    assert losses_of(left) == losses_of(right)


def lines_of(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_folder):
    return [(line["step"], line["loss"]) for line in lines_of(run_folder) if "loss" in line]


def run(config, log, file_limit=None, ear=None):
    """In a process of its own: train with one thread and leave the outcome or the error in ``log``."""
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    ear = ear or Ear()
    try:
        result = loop.train(config, ear)
        outcome = f"interrupted {result.steps}" if result.interrupted else "done"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write_text("\n".join([*ear.heard, outcome]))


def finish(processes, config, log, target=run, *arguments):
    process = processes.Process(target=target, args=(config, log, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    return log.read_text()


# SIGKILL


def steps_written(run_folder):
    path = run_folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(make_checkpoint, corpus, tmp_path, processes, full_length, record_property):
    """A checkpoint at every step, so that most kills hit a write; one in five comes while the run still starts."""
    kills = 200 if full_length else 10
    chance = random.Random(kills)
    settings = dict(max_steps=6 * kills, save_steps=1)
    model = make_checkpoint("llama")
    broken = make_config(model, corpus, tmp_path / "broken", resume=True, **settings)
    newest, half_written = -1, 0
    for _ in range(kills):
        victim = processes.Process(target=run, args=(broken, tmp_path / "log"))
        before = steps_written(tmp_path / "broken")
        victim.start()
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 0.4))
        else:
            while steps_written(tmp_path / "broken") <= before and victim.is_alive():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.08))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL, "killed too late to show anything"
        half_written += bool(list((tmp_path / "broken").glob(".checkpoint-*.tmp")))
        found = list_checkpoints(tmp_path / "broken")
        assert [damage(one) for one in found] == [None] * len(found)
        assert not found or found[-1].step >= newest
        newest = found[-1].step if found else newest
    assert kills < 100 or half_written >= kills // 10
    record_property("kills", kills)
    record_property("kills in the middle of a write", half_written)
    assert finish(processes, broken, tmp_path / "log").endswith("done")
    straight = make_config(model, corpus, tmp_path / "straight", **settings)
    assert finish(processes, straight, tmp_path / "log").endswith("done")
    same_result(tmp_path / "straight", tmp_path / "broken", 6 * kills)
    assert not list((tmp_path / "broken").glob(".checkpoint*"))


class Misfortune(Ear):
    """Lets allocations to come fail, and takes memory away and gives it back, at random."""

    def __init__(self, seed):
        super().__init__()
        self.chance = random.Random(seed)

    def prepared(self, facts):
        self.device, self.whole_bytes = facts.device, facts.device.capacity_bytes

    def stepped(self, metrics):
        device = self.device
        device.set_capacity(self.whole_bytes)
        fate = self.chance.random()
        if fate < 0.15:
            device.fail_at(device.allocation_count + self.chance.randrange(1500))
        elif fate < 0.2:
            device.empty_cache()
            device.set_capacity(device.usage().reserved_bytes + (2 << 20))


def run_unlucky(config, log, file_limit=None, seed=None):
    """As ``run``; every 17th or so micro-batch has no finite loss, and with a ``seed`` memory is short at random."""
    original = TrainingStep._loss

    def sometimes_bad(self, batch, *arguments, **more):
        loss = original(self, batch, *arguments, **more)
        return loss * float("nan") if int(batch.input_ids.sum()) % 17 == 0 and self.model.training else loss

    TrainingStep._loss = sometimes_bad
    run(config, log, file_limit, Ear() if seed is None else Misfortune(seed))


@pytest.mark.slow
def test_soak(make_checkpoint, corpus, tmp_path, processes, full_length, record_property):
    """Through kills, preemptions, full disks, damaged checkpoints, bad losses, lacks of memory and a neighbour that takes it."""
    chance = random.Random(7)
    steps, rounds = (2000, 60) if full_length else (36, 3)
    settings = dict(max_steps=steps, save_steps=5, save_total_limit=3, gpu="virtual:48MiB", on_bad_loss="skip")
    # With these the rungs are the same to the last bit: nothing is left to cut but what is kept for backward.
    settings |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, loss_chunk_bytes=1 << 20)
    model = make_checkpoint("llama")
    broken = make_config(model, corpus, tmp_path / "broken", resume=True, **settings)
    said = []
    for number in range(rounds):
        found = list_checkpoints(tmp_path / "broken")
        if len(found) > 2 and chance.random() < 0.3:
            victim = chance.choice([p for p in found[-1].folder.rglob("*") if p.is_file() and p.stat().st_size])
            os.truncate(victim, chance.randrange(victim.stat().st_size))
        target = steps_written(tmp_path / "broken") + chance.randrange(1, 2 * steps // rounds)
        limit = chance.choice([None, None, 100_000])
        process = processes.Process(target=run_unlucky, args=(broken, tmp_path / "log", limit, number))
        process.start()
        while steps_written(tmp_path / "broken") < target and process.is_alive():
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGTERM)  # the last while it starts
        if (tmp_path / "log").exists():
            said += (tmp_path / "log").read_text().splitlines()
            (tmp_path / "log").unlink()
    assert finish(processes, broken, tmp_path / "log", run_unlucky, None, rounds).endswith("done")
    said += (tmp_path / "log").read_text().splitlines()
    straight = make_config(model, corpus, tmp_path / "straight", **settings)
    assert finish(processes, straight, tmp_path / "log", run_unlucky).endswith("done")
    same_result(tmp_path / "straight", tmp_path / "broken", steps)
    assert not [line for line in said if line.startswith("OutOfMemoryError")]
    held = [
        [line["memory_bytes"] for line in lines_of(tmp_path / name) if "memory_bytes" in line]
        for name in ("straight", "broken")
    ]
    assert len(held[1]) > steps // 2
    assert len({*held[0], *held[1]}) == 1, "memory is not flat"
    bad = sum("bad_step" in line for line in lines_of(tmp_path / "broken"))
    assert bad > 0
    record_property("steps", steps)
    record_property("processes", rounds + 1)
    record_property("bad steps", bad)
    for name in ("out of memory", "trying the one before it", "could not be written", "resumed from"):
        record_property(f"said: {name}", sum(name in line for line in said))


# SIGTERM


def terminated_twice(config, log):
    """SIGTERM after step 3, and again in the middle of each file of weights that the save then writes."""
    original = save.write_safetensors

    class Preempted(loop.Listener):
        def stepped(self, metrics):
            if metrics["step"] == 3:
                save.write_safetensors = in_the_middle
                os.kill(os.getpid(), signal.SIGTERM)

    def in_the_middle(path, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        original(path, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    result = loop.train(config, Preempted())
    log.write_text(f"interrupted {result.interrupted} after {result.steps}")


def test_second_sigterm_does_not_spoil_the_save(make_checkpoint, corpus, tmp_path, processes):
    model = make_checkpoint("llama")
    config = make_config(model, corpus, tmp_path / "broken", max_steps=6)
    assert finish(processes, config, tmp_path / "log", terminated_twice) == "interrupted True after 3"
    assert damage(Checkpoint(folder=tmp_path / "broken" / "checkpoint-3", step=3)) is None
    assert finish(processes, again(config), tmp_path / "log") == "resumed from checkpoint-3\ndone"
    straight = make_config(model, corpus, tmp_path / "straight", max_steps=6)
    assert finish(processes, straight, tmp_path / "log") == "done"
    same_result(tmp_path / "straight", tmp_path / "broken", 6)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("grace_s", "steps"), [(1e-6, 2), (1e6, 3)], ids=["abandoned", "finished"])
def test_preemption_within_its_grace(make_checkpoint, corpus, tmp_path, monkeypatch, grace_s, steps, in_backward):
    """SIGTERM in the second of the four micro-batches of step 3, after a save that was measured."""
    model = make_checkpoint("llama")
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=5, save_steps=1)
    settings |= dict(optimizer_in_backward=in_backward, preemption_grace_s=grace_s)
    original, calls = TrainingStep._loss, []

    def terminated(self, *arguments, **more):
        calls.append(None)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **more)

    monkeypatch.setattr(TrainingStep, "_loss", terminated)
    broken = make_config(model, corpus, tmp_path / "broken", **settings)
    ear = Ear()
    result = loop.train(broken, ear)
    assert (result.interrupted, result.steps) == (True, steps)
    assert any("step 3 was abandoned" in message for message in ear.heard) == (steps == 2)
    assert len(calls) == (10 if steps == 2 else 12)
    loop.train(again(broken))
    loop.train(make_config(model, corpus, tmp_path / "straight", **settings))
    same_result(tmp_path / "straight", tmp_path / "broken", 5)


def test_a_terminal_that_goes_away(make_checkpoint, corpus, tmp_path, processes):
    """The reader of the output leaves: the run goes on. Then the terminal hangs up: a checkpoint is written."""
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", max_steps=5000, save_steps=None)
    (tmp_path / "run").mkdir()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    reading, writing = os.pipe()
    process = processes.Process(target=main_in_a_pipe, args=(path, reduction.DupFd(writing)))
    process.start()
    os.close(writing)
    assert os.read(reading, 1)
    os.close(reading)
    wait_for_steps(tmp_path / "run", 30)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 130
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.step == losses_of(tmp_path / "run")[-1][0] >= 30


def main_in_a_pipe(config, pipe):
    """``oomless train`` with its output in ``pipe``."""
    torch.set_num_threads(1)
    os.dup2(pipe.detach(), 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.argv = ["oomless", "train", "--config", str(config)]
    cli.main()


def wait_for_steps(run_folder, steps):
    while steps_written(run_folder) < steps:
        time.sleep(0.05)


def test_a_run_under_nohup_goes_on(make_checkpoint, corpus, tmp_path, processes):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run")
    assert finish(processes, config, tmp_path / "log", hung_up_with_nohup) == "done"


def hung_up_with_nohup(config, log):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    class HangsUp(Ear):
        def stepped(self, metrics):
            os.kill(os.getpid(), signal.SIGHUP)

    run(config, log, ear=HangsUp())


@pytest.mark.parametrize(
    ("settings", "saved"),
    [({}, [4]), (dict(save_minutes=1e-9), [3, 4]), (dict(save_minutes=1e-9, save_steps=4), [3, 4])],
)
def test_a_checkpoint_by_time(make_checkpoint, corpus, tmp_path, settings, saved):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path, **({"save_steps": None} | settings))
    loop.train(config)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == saved
    assert config.save_minutes == settings.get("save_minutes", 15)
    assert make_config("m", corpus, tmp_path).save_minutes == 0, "steps alone where they are given"


def test_sigterm_in_an_evaluation_does_not_wait_for_its_end(make_checkpoint, corpus, tmp_path):
    class Preempted(Ear):
        def evaluated(self, step, losses):
            self.heard.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    ear = Preempted()
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", eval_fraction=0.2, max_steps=3)
    result = loop.train(config, ear)
    assert (result.interrupted, result.steps, ear.heard) == (True, 0, [0])
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [0]


# A full disk


@pytest.fixture
def stopped_run(make_checkpoint, corpus, tmp_path):
    """The config and folder of a run of 4 steps as a kill after its checkpoint of step 2 would have left it."""
    return stop_a_run(make_checkpoint("llama"), corpus, tmp_path / "run")


def stop_a_run(model, corpus, run_folder):
    config = make_config(model, corpus, run_folder)
    loop.train(config)
    shutil.copytree(run_folder, run_folder.with_name("finished"))
    shutil.rmtree(run_folder / "checkpoint-4")
    shutil.rmtree(run_folder / "model")
    return config, run_folder


def test_every_file_may_be_the_one_that_does_not_fit(stopped_run, tmp_path, processes):
    """The kernel refuses to let any file grow beyond a size, from nothing to the largest file of the checkpoint."""
    config, run_folder = stopped_run
    sizes = sorted({p.stat().st_size for p in run_folder.rglob("*") if p.is_file()})
    failures = 0
    for limit in sorted({0, *(size - 1 for size in sizes[::2])}):
        said = finish(processes, again(config), tmp_path / "log", run, limit).splitlines()
        failures += said[-1] != "done"
        assert said[-1] == "done" or said[-1].startswith("CheckpointError"), said[-1]
        assert damage(Checkpoint(folder=run_folder / "checkpoint-2", step=2)) is None
        assert not [p for p in run_folder.glob(".*") if p.name != ".lock"]
    assert failures >= 4
    assert finish(processes, again(config), tmp_path / "log").endswith("done")
    same_result(tmp_path / "finished", run_folder, 4)


def test_disk_full_at_every_page_and_every_file(make_checkpoint, corpus, tmp_path, full_length, record_property):
    """On a small file system of its own, made full after each page (or each 60th), and out of inodes after each file."""
    stride = 1 if full_length else 60
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = ["unshare", "-rm", sys.executable, DISK, make_checkpoint("llama"), corpus, tmp_path, stride]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages, files, complaint = json.loads(done.stdout.splitlines()[-1])
    assert pages >= 200 // stride
    assert files >= 10
    assert "it takes" in complaint
    assert "the disk has" in complaint
    record_property("full disks", pages // stride + files)


def test_a_periodic_save_may_fail_once(stopped_run, monkeypatch):
    """As when another job fills the disk and then makes room."""
    config, run_folder = stopped_run
    config = again(config, save_steps=1)
    original, room = checkpoint.write_folder, [False]

    def full(target, fill):
        if not room.pop(0):
            raise OSError(28, "No space left on device", str(target))
        original(target, fill)

    monkeypatch.setattr(checkpoint, "write_folder", full)
    room[:] = [False, True, True]
    ear = Ear()
    assert loop.train(config, ear).model_dir is not None
    assert any("No space left on device" in message and "The run goes on" in message for message in ear.heard)


def test_two_failed_saves_end_the_run(stopped_run, monkeypatch):
    config, run_folder = stopped_run
    shutil.rmtree(run_folder / "checkpoint-2")
    config = TrainConfig.from_mapping(config.to_dict() | {"save_steps": 1})

    def full(target, fill):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(checkpoint, "write_folder", full)
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 could not be written: No space left"):
        loop.train(config)


def test_metrics_wait_for_room(stopped_run):
    """They go to a device that is always full, and then to a file."""
    config, run_folder = stopped_run
    path = run_folder / "metrics.jsonl"
    path.unlink()
    path.symlink_to("/dev/full")

    class MakesRoom(Ear):
        def stepped(self, metrics):
            if metrics["step"] == 3:
                path.unlink()

    ear = MakesRoom()
    loop.train(again(config), ear)
    assert [step for step, _ in losses_of(run_folder)] == [3, 4]
    assert sum("metrics are kept" in message for message in ear.heard) == 1


# Damaged checkpoints


def test_every_flip_and_cut_is_noticed(stopped_run, full_length, record_property):
    """Random ones in all files, and one in every byte of the checksums themselves."""
    folder = stopped_run[1] / "checkpoint-2"
    one = Checkpoint(folder=folder, step=2)
    chance = random.Random(0)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = folder / "trainer" / "checksums.json"
    hits = [(chance.choice(paths), None) for _ in range(400 if full_length else 80)]
    hits += [(checksums, place) for place in range(0, checksums.stat().st_size, 1 if full_length else 5)]
    record_property("flips and cuts", len(hits))
    for path, place in hits:
        data = path.read_bytes()
        if place is None and chance.random() < 0.5:
            changed = data[: chance.randrange(len(data))]
        else:
            place = chance.randrange(len(data)) if place is None else place
            changed = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        path.write_bytes(changed)
        assert damage(one) is not None, (path, place)
        path.write_bytes(data)
    assert damage(one) is None


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def add_weights(folder):
    shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")


def hide(folder):
    for name in ("state.json", "optimizer.safetensors"):
        (folder / "trainer" / name).unlink()
        (folder / "trainer" / name).mkdir()


def flip(name, place):
    def act(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 16
        (folder / name).write_bytes(data)

    return act


@pytest.mark.parametrize(
    "harm",
    [
        replace_by_a_file,
        add_weights,
        hide,
        lambda folder: shutil.rmtree(folder / "trainer"),
        lambda folder: (folder / "trainer" / "checksums.json").write_text("[]"),
        lambda folder: (folder / "trainer" / "checksums.json").write_text("[" * 100_000),
        lambda folder: (folder / "trainer" / "checksums.json").write_bytes(b"\xff"),
        lambda folder: (folder.with_name("checkpoint-2")).rename(folder.with_name("checkpoint-6")),
        *(flip("trainer/checksums.json", place) for place in (0.0, 0.3, 1.0)),
        *(flip("trainer/state.json", place) for place in (0.0, 0.5)),
        *(flip("trainer/optimizer.safetensors", place) for place in (0.0, 0.01, 1.0)),
        *(flip("adapter_model.safetensors", place) for place in (0.0, 0.5)),
    ],
)
def test_runs_go_on_from_the_one_before(make_checkpoint, corpus, tmp_path, harm):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", save_steps=1, save_total_limit=3)
    loop.train(config)
    harm(tmp_path / "run" / "checkpoint-4")
    ear = Ear()
    assert loop.train(again(config, save_total_limit=1), ear).steps == 4
    assert any("trying the one before it" in message for message in ear.heard), ear.heard
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert newest.step == 4
    assert damage(newest) is None


def test_the_newest_is_told_by_its_step_not_by_a_clock(make_checkpoint, corpus, tmp_path, monkeypatch):
    """The clock runs backwards all the time, and the times of the files with it."""
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", save_steps=1, save_total_limit=3)
    result = loop.train(config)
    assert result.tokens_per_second > 0
    for found in list_checkpoints(tmp_path / "run"):
        for path in (found.folder, *found.folder.rglob("*")):
            os.utime(path, (10**9 - found.step, 10**9 - found.step))
    assert newest_good(tmp_path / "run", print).step == 4


# A second run, other data


def test_two_processes_in_one_folder(make_checkpoint, corpus, tmp_path, processes):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", max_steps=10**6, save_steps=None)
    first = processes.Process(target=run, args=(config, tmp_path / "first"))
    first.start()
    while not steps_written(tmp_path / "run"):
        time.sleep(0.01)
        assert first.is_alive()
    second = finish(processes, again(config), tmp_path / "second")
    assert second.startswith("CheckpointError: another run is writing to")
    os.kill(first.pid, signal.SIGTERM)
    first.join()
    assert (tmp_path / "first").read_text().startswith("interrupted")
    assert len(list_checkpoints(tmp_path / "run")) == 1


class AtStep3(Ear):
    """Does something after step 3."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def stepped(self, metrics):
        if metrics["step"] == 3:
            self.act()


@pytest.mark.parametrize("evaluation", [{}, dict(eval_steps=3, eval_fraction=0.1)], ids=["step", "evaluation"])
def test_tokens_that_change_under_a_run(make_checkpoint, corpus, tmp_path, evaluation):
    """Cut short under a memory map they would be a SIGBUS; the run saves, stops, and goes on from tokens made again."""
    cache_dir = tmp_path / "cache"
    settings = dict(max_steps=6, save_steps=None, cache_dir=str(cache_dir), **evaluation)
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", **settings)
    (tmp_path / "run").mkdir()

    def cut():
        (tokens,) = cache_dir.glob("*/tokens.bin")
        os.truncate(tokens, 10)

    with pytest.raises(DataError, match="was changed while the run used it: remove its folder"):
        loop.train(config, AtStep3(cut))
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [3]
    if evaluation:  # which finds it, and the rest is the same
        return
    with pytest.raises(DataError, match="is damaged"):
        loop.train(again(config))
    shutil.rmtree(cache_dir)
    loop.train(again(config))
    loop.train(make_config(make_checkpoint("llama"), corpus, tmp_path / "straight", max_steps=6))
    same_result(tmp_path / "straight", tmp_path / "run", 6)


def test_data_that_vanishes_under_a_run(make_checkpoint, corpus, tmp_path):
    """Text and tokens are removed; the run has what it needs."""
    text = shutil.copy(corpus, tmp_path / "text.jsonl")

    def vanish():
        text.unlink()
        shutil.rmtree(tmp_path / "cache")

    config = make_config(
        make_checkpoint("llama"), text, tmp_path / "run", max_steps=6, cache_dir=str(tmp_path / "cache")
    )
    assert loop.train(config, AtStep3(vanish)).steps == 6
    with pytest.raises(DataError, match="is none"):
        loop.train(again(config))


def test_text_that_vanishes_while_it_is_tokenised(make_checkpoint, corpus, tmp_path):
    text = shutil.copy(corpus, tmp_path / "text.jsonl")

    class Removes(Ear):
        def tokenising(self, done_bytes, total_bytes):
            text.unlink(missing_ok=True)

    config = make_config(make_checkpoint("llama"), text, tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="changed while they were read"):
        loop.train(config, Removes())
