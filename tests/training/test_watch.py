"""Leaks of device and host memory are noticed from their trend, and the host's end before its killer comes."""

import mmap
import multiprocessing
import os
import re
import signal

import pytest
import torch

from oomless.config import DataSource, TrainConfig
from oomless.training import loop, watch
from oomless.training.checkpoint import damage, list_checkpoints
from oomless.training.watch import READINGS, HostMemory, Trend, read_host_memory
from oomless.units import KiB, MiB


def make_config(model, corpus, out, **settings):
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        **{
            **dict(gpu="virtual:64MiB", max_seq_length=16, max_steps=400, trainable="lm_head", eval_fraction=0.0),
            **settings,
        },
    )


class Leaks(loop.Listener):
    """Holds a tensor more after every ``every`` steps, and interrupts the run when a leak is noticed."""

    def __init__(self, every):
        self.every, self.held, self.heard, self.step = every, [], [], 0

    def stepped(self, metrics):
        self.step = metrics["step"]
        if self.every and self.step % self.every == 0:
            self.held.append(torch.zeros(64 * KiB))

    def said(self, message):
        self.heard.append((self.step, message))
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("every", [1, 7])
def test_a_leak_on_the_device(make_checkpoint, corpus, tmp_path, every):
    """256 KiB each time; the step at which nothing is left is told to within a window."""
    ear = Leaks(every)
    config = make_config(make_checkpoint("llama"), corpus, tmp_path, max_steps=400 * every)
    result = loop.train(config, ear)
    assert result.interrupted
    ((step, message),) = ear.heard
    assert step <= 3 * READINGS
    leak = float(re.search(r"the device holds ([\d.]+) KiB more than after the one before", message)[1])
    assert leak == (256 if every == 1 else pytest.approx(256 / 7, rel=0.1))
    room = 64 * MiB - result.peak_memory_bytes
    told = int(message.split("about step ")[1].split()[0])
    assert told == pytest.approx(step + room / (256 * KiB) * every, rel=0.12)


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_nothing_is_said_where_nothing_leaks(make_checkpoint, corpus, tmp_path, packing):
    ear = Leaks(0)
    config = make_config(
        make_checkpoint("llama"), corpus, tmp_path, max_steps=50, packing=packing, trainable="full", optimizer="adamw"
    )
    assert not loop.train(config, ear).interrupted
    assert ear.heard == []


def test_a_trend_is_steady():
    def grows(values):
        trend = Trend()
        return [trend.add(step, value) for step, value in enumerate(values)][-1]

    assert grows(100 * step for step in range(READINGS)) == 100
    assert grows(100 * step for step in range(READINGS - 1)) == 0
    assert grows([0] * 15 + [10**9] * 15) == 0
    assert grows([step % 7 for step in range(READINGS)]) == 0
    assert grows([step // 7 * 70 for step in range(READINGS)]) == pytest.approx(10, rel=0.1)
    assert grows([-step for step in range(READINGS)]) == 0


# The host


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A /proc with 1000 MiB, of which 600 are available."""
    proc = tmp_path / "proc"
    write(proc, meminfo=f"MemTotal:  {1000 << 10} kB\nMemFree: 5 kB\nMemAvailable:  {600 << 10} kB\n")
    write(proc / "self", status="VmRSS: 9 kB\nRssAnon:\t   1024 kB\nRssFile: 7 kB\nRssShmem:\t 1024 kB\n", cgroup="")
    return proc, tmp_path / "groups"


def test_host_memory_of_a_machine(machine):
    assert read_host_memory(*machine) == HostMemory(
        held_bytes=2 * MiB, available_bytes=600 * MiB, limit_bytes=1000 * MiB
    )


def test_host_memory_of_control_groups(machine):
    """The tightest counts, be it a parent; file cache that can be dropped is available."""
    proc, groups = machine
    stat = f"anon 5\ninactive_file {50 * MiB}\n"
    group = dict(memory__current=f"{200 * MiB}\n", memory__stat=stat)
    write(groups / "jobs" / "one", memory__max="max\n", **group)
    write(groups / "jobs", memory__max=f"{300 * MiB}\n", **group)
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/\n0::/jobs/one\n")
    found = read_host_memory(proc, groups)
    assert (found.limit_bytes, found.available_bytes) == (300 * MiB, 150 * MiB)

    old = dict(memory__limit_in_bytes=f"{100 * MiB}\n", memory__usage_in_bytes=f"{90 * MiB}\n")
    write(groups / "memory" / "old", **old, memory__stat=f"total_inactive_file {20 * MiB}\n")
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/elsewhere\n")
    found = read_host_memory(proc, groups)
    assert (found.limit_bytes, found.available_bytes) == (100 * MiB, 30 * MiB)


def test_host_memory_of_this_machine():
    found = read_host_memory()
    before = found.held_bytes
    held = mmap.mmap(-1, 64 * MiB)  # not from the heap, where room may be left
    held.write(os.urandom(64 * MiB))
    assert read_host_memory().held_bytes >= before + 60 * MiB
    assert 0 <= found.available_bytes <= found.limit_bytes
    assert len(held) == 64 * MiB


SMALL_MACHINE_BYTES = 400 * MiB


def leak_host_memory(config, log, trend):
    """In a process of its own, on a machine that has 400 MiB more than the process holds: leak 4 MiB at every step."""
    torch.set_num_threads(1)
    watch.SECONDS_BETWEEN_HOST_READINGS = 0.0
    watch.SECONDS_BETWEEN_TREND_READINGS = 0.0 if trend else 1e9
    start = read_host_memory().held_bytes

    def small_machine():
        held = read_host_memory().held_bytes
        return HostMemory(
            held_bytes=held, available_bytes=max(0, SMALL_MACHINE_BYTES - held + start), limit_bytes=SMALL_MACHINE_BYTES
        )

    watch.read_host_memory = small_machine
    heard, held = [], []

    class LeaksHost(loop.Listener):
        def said(self, message):
            heard.append(message)

        def stepped(self, metrics):
            held.append(os.urandom(4 * MiB))

    try:
        loop.train(config, LeaksHost())
        heard.append("done")
    except Exception as error:
        heard.append(f"{type(error).__name__}: {error}")
    log.write_text("\n".join(heard))


@pytest.mark.parametrize("trend", [False, True])
def test_host_memory_that_leaks(make_checkpoint, corpus, tmp_path, trend):
    """The run stops by itself, with a checkpoint, before the machine has nothing left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oomless.training.loop", "transformers.models.auto.modeling_auto", "peft"])
    config = make_config(
        make_checkpoint("llama"), corpus, tmp_path / "run", gpu="cpu", host_reserve_bytes=100 * MiB, max_steps=1000
    )
    process = context.Process(target=leak_host_memory, args=(config, tmp_path / "log", trend))
    process.start()
    process.join()
    *warnings, end = (tmp_path / "log").read_text().splitlines()
    assert end.startswith("HostMemoryError: after step"), end
    assert "less than its reserve of 100.00 MiB" in end
    assert "A checkpoint was written: make room and go on with --resume" in end
    assert any("below 100.00 MiB the run writes a checkpoint and stops" in message for message in warnings)
    assert any("memory leaks: at the end of each step the host holds" in message for message in warnings) == trend
    (found,) = list_checkpoints(tmp_path / "run")
    assert damage(found) is None
    assert 20 < found.step < 100
