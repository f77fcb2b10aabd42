"""Two machines made of processes on this one, with one run folder for both and with one each: the losses of one process, nothing lost."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_several_gpus import again, assert_same_losses, make_config, together, train

from oomless.training import checkpoint, distributed, exchange, loop, machines
from oomless.training.checkpoint import damage, list_checkpoints


def on_machines(function, config, places, each=1, *arguments):
    """Be one of ``each`` processes on a machine that has the folder ``places[machine]``."""
    machine, local_rank = divmod(int(os.environ["RANK"]), each)
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(each), "GROUP_WORLD_SIZE": str(len(places))}
    os.chdir(places[machine])
    return function(config, *arguments)


@pytest.fixture
def places(tmp_path):
    """A working directory for each machine."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture(scope="module")
def straight(make_checkpoint, corpus, tmp_path_factory):
    """A run of one process that nothing happened to, whose effective batch is that of two with the same settings."""
    out = tmp_path_factory.mktemp("straight")
    loop.train(settings(make_checkpoint, corpus, out, gradient_accumulation_steps=2))
    return out


def settings(make_checkpoint, corpus, out="run", **more):
    """Return the settings of a run whose weights are those of one process as exactly as its losses are."""
    return make_config(make_checkpoint("llama"), corpus, out, **{**dict(dtype="fp32", optimizer="sgd"), **more})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_in(run):
    return [(one.step, damage(one)) for one in list_checkpoints(run)]


def assert_same_runs(straight, other):
    assert_same_losses(straight, other)
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (straight, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-5, rtol=1e-5) for name, tensor in ours.items())


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.full_length)])
def test_machines_that_see_one_folder(make_checkpoint, corpus, tmp_path, processes, straight, places, each):
    (places[0] / "run").mkdir()
    (places[1] / "run").symlink_to(places[0] / "run")
    config = settings(make_checkpoint, corpus, per_device_train_batch_size=2 // each)
    assert (
        together(processes, tmp_path / "out", on_machines, train, config, places, each, count=2 * each)
        == [6] * 2 * each
    )
    assert_same_runs(straight, places[0] / "run")
    assert steps_in(places[0] / "run") == [(3, None), (6, None)]
    assert not list((places[0] / "run").glob(".machine*"))


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.full_length)])
def test_each_machine_has_the_whole_run(make_checkpoint, corpus, tmp_path, processes, straight, places, each):
    """Also one that has lost its folder, of which another brings the newest checkpoint that is whole somewhere."""
    config = settings(make_checkpoint, corpus, save_steps=2, per_device_train_batch_size=2 // each)
    count, runs = 2 * each, [place / "run" for place in places]
    assert together(processes, tmp_path / "out", on_machines, train, config, places, each, count=count) == [6] * count
    assert files_of(runs[0] / "checkpoint-6") == files_of(runs[1] / "checkpoint-6")
    assert all(steps_in(run) == [(2, None), (4, None), (6, None)] for run in runs)
    for run in runs:
        assert_same_runs(straight, run)
    shutil.rmtree(runs[0])
    shutil.rmtree(runs[1] / "checkpoint-6")
    with (runs[1] / "checkpoint-4/model.safetensors").open("r+b") as file:
        file.write(b"\0")
    rest = again(config)
    assert together(processes, tmp_path / "out", on_machines, train, rest, places, each, count=count) == [6] * count
    assert steps_in(runs[0]) == [(2, None), (4, None), (6, None)]
    for run in runs:
        assert_same_runs(straight, run)


@pytest.mark.full_length
def test_what_two_machines_saved_serves_two_processes_and_one(make_checkpoint, corpus, tmp_path, processes, straight):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    config = settings(make_checkpoint, corpus, save_steps=2)
    assert together(processes, tmp_path / "out", on_machines, train, config, places) == [6, 6]
    run = places[1] / "run"
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert together(processes, tmp_path / "out", train, again(config, output_dir=str(run))) == [6, 6]
    shutil.rmtree(run / "checkpoint-6")
    loop.train(again(config, output_dir=str(run), gradient_accumulation_steps=2))
    assert_same_runs(straight, run)


def differing(config, name, values):
    return train(again(config, resume=False, **{name: values[int(os.environ["RANK"])]}))


@pytest.mark.parametrize("what", [pytest.param("max_steps", marks=pytest.mark.full_length), "text"])
def test_machines_that_train_something_else(make_checkpoint, corpus, tmp_path, processes, places, what):
    config = settings(make_checkpoint, corpus)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(corpus.read_text().splitlines(keepends=True)[1:]))
    name, values = {"max_steps": ("max_steps", (6, 5)), "text": ("data", (str(corpus), str(other)))}[what]
    ends = together(processes, tmp_path / "out", on_machines, differing, config, places, 1, name, values)
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"ConfigError: every machine must have the same {what}: ")
    assert ("(6 and 5)" in ends[0]) == (what == "max_steps")


def full_in_one(config):
    """Train, but the second machine finds no room for what comes from the first."""
    if os.environ["RANK"] == "1":

        def refuse(folder, *arguments):
            raise OSError(28, "No space left on device", str(folder))

        exchange._write = refuse
    return train(config)


def test_a_disk_that_is_full_on_one_machine(make_checkpoint, corpus, tmp_path, processes, places):
    config = settings(make_checkpoint, corpus, save_steps=2, eval_fraction=0)
    ends = together(processes, tmp_path / "out", on_machines, full_in_one, config, places)
    assert ends[1].startswith("CheckpointError: the checkpoint of step 4 could not be written: No space left on device")
    assert "process 1: [Errno 28] No space left on device" in ends[0]
    assert not [path for place in places for path in (place / "run").glob("*checkpoint*")]


def brings_a_folder(config):
    """Bring a folder that the first machine has to the second."""
    with distributed.joined("cpu") as ranks:
        ranks = machines.settled(ranks, Path("run"), print)
        if ranks.rank == 0:
            Path("run/model/deep").mkdir(parents=True)
            for name, size in (("model/large", (5 << 24) + 3), ("model/deep/small", 5), ("model/empty", 0)):
                Path("run", name).write_bytes(random.Random(size).randbytes(size))
        ranks.any(False)
        machines.on_all(ranks, Path("run/model"), print)


@pytest.mark.full_length
def test_a_folder_comes_over_whole(make_checkpoint, corpus, tmp_path, processes, places):
    config = settings(make_checkpoint, corpus)
    together(processes, tmp_path / "out", on_machines, brings_a_folder, config, places)
    ours, theirs = (files_of(place / "run/model") for place in places)
    assert ours == theirs
    assert {name: len(text) for name, text in ours.items()} == {"large": (5 << 24) + 3, "deep/small": 5, "empty": 0}


AGENT = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]


def start_agent(config, place, rank, port):
    """Start torchrun on the machine ``rank`` of two, in the folder ``place``."""
    node = ["--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two"]
    train = ["-m", "oomless", "train", "--config", str(config)]
    with (place / "said").open("w") as said:
        return subprocess.Popen([*AGENT, *node, *train], cwd=place, stdout=said, stderr=said)


def children_of(agent):
    """Return the processes that ``agent`` has started."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.exists() and path.read_text(errors="replace").rpartition(")")[2].split()[1] == str(agent.pid)
    ]


def kill_machine(agent):
    """Kill torchrun and what it has started at once, as where a machine goes."""
    for one in [*children_of(agent), agent.pid]:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    agent.wait()


@pytest.mark.full_length
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seen", ["one folder", "one each"])
def test_machines_under_torchrun_killed_at_random_moments(
    make_checkpoint, corpus, tmp_path, places, seen, record_property
):
    """Whichever goes, the other ends within a minute, and what was saved is whole."""
    chance, kills, longest_s = random.Random(5), 15, 0.0
    if seen == "one folder":
        (places[0] / "run").mkdir()
        (places[1] / "run").symlink_to(places[0] / "run")
    more = dict(resume=True, save_steps=1, save_total_limit=2, eval_fraction=0, max_steps=12 * kills)
    config = settings(make_checkpoint, corpus, **more)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    runs = [place / "run" for place in places]

    def newest():
        return max((one.step for run in runs for one in list_checkpoints(run)), default=0)

    def start():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [start_agent(tmp_path / "run.yaml", place, rank, port) for rank, place in enumerate(places)]

    for _ in range(kills):
        before, agents = newest(), start()
        while newest() <= before and all(agent.poll() is None for agent in agents):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        victim = chance.randrange(2)
        kill_machine(agents[victim])
        began = time.monotonic()
        assert agents[1 - victim].wait(60) == 1
        longest_s = max(longest_s, time.monotonic() - began)
        said = " ".join((places[1 - victim] / "said").read_text().split())
        # Where torchrun's store went with the machine, torchrun may end here before the process that it started has spoken.
        assert "--resume, on every machine" in said or "RendezvousConnectionError" in said
        assert all(problem is None for run in runs for _, problem in steps_in(run))
        assert newest() > before
    assert [agent.wait() for agent in start()] == [0, 0]
    one = settings(
        make_checkpoint, corpus, tmp_path / "one", **more | dict(resume=False), gradient_accumulation_steps=2
    )
    loop.train(one)
    for run in runs:
        assert_same_runs(tmp_path / "one", run)
    record_property("kills", kills)
    record_property("longest_ms_until_the_other_ended", round(1000 * longest_s))


def killed_between(config, step):
    """Train, but the second machine goes when the first has put its checkpoint of ``step`` in place, and before its own is."""
    put = checkpoint.put_in_place

    def go(target):
        if target.name == f"checkpoint-{step}" and os.environ["RANK"] == "1":
            while not (Path("../a/run") / target.name).exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        put(target)

    checkpoint.put_in_place = go
    return train(config)


def test_a_machine_goes_before_its_checkpoint_is_in_place(
    make_checkpoint, corpus, tmp_path, processes, straight, places
):
    """Where one checkpoint is kept, the other machine has the newer and still the older; it goes on from the newer."""
    config = settings(make_checkpoint, corpus, save_steps=2, save_total_limit=1)
    ends = together(processes, tmp_path / "out", on_machines, killed_between, config, places, 1, 4)
    assert ends[1] is None
    assert "go on with --resume, on every machine" in ends[0]
    runs = [place / "run" for place in places]
    assert [steps_in(run) for run in runs] == [[(2, None), (4, None)], [(2, None)]]
    assert together(processes, tmp_path / "out", on_machines, train, again(config), places) == [6, 6]
    for run in runs:
        assert_same_runs(straight, run)
        assert steps_in(run) == [(6, None)]
