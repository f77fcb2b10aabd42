"""Runs that real processes train, watched, stopped and resumed from a studio that did not begin them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from starlette.testclient import TestClient
from tests.cli.test_cli import ENVIRONMENT

from oomless.report.run import Reader
from oomless.studio.runs import Runs
from oomless.studio.safety import TOKEN
from oomless.studio.server import application
from oomless.training.run_files import LOCK, Process, ask_to_stop, writer


class Studio:
    def __init__(self, folder):
        headers = {TOKEN: "t"}
        self.client = TestClient(application([folder], "t"), base_url="http://localhost", headers=headers)

    def row(self, name):
        return next(row for row in self.client.get("/api/runs").json()["runs"] if row["name"] == name)

    def show(self, *names):
        return self.client.post("/api/runs/show", json={"names": names}).json()["html"]

    def do(self, what, name):
        return self.client.post(f"/api/runs/{what}", json={"name": name})

    def until(self, name, state, *, step=0):
        deadline = time.monotonic() + 120
        while True:
            row = self.row(name)
            if row["state"] == state and int(row["step"].split()[0].replace(",", "")) >= step:
                return row
            assert time.monotonic() < deadline, row
            time.sleep(0.1)


def begin(model, corpus, run, *settings):
    where = (
        "--model",
        model,
        "--data",
        corpus,
        "--output-dir",
        run,
        "--gpu",
        "virtual:256MiB",
        "--max-seq-length",
        "32",
    )
    how = ("--max-steps", "100000", "--dtype", "fp32", "--as-given", "--eval-fraction", "0", *settings)
    command = [sys.executable, "-m", "oomless", "train", *map(str, where + how)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)


def test_a_run_that_another_process_began(make_checkpoint, corpus, tmp_path, monkeypatch):
    """Live from its first steps; stopped as Ctrl-C does; resumed in a process that is not the studio's to end."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    top = tmp_path / "runs"
    run = top / "far" / "down"
    begun = begin(make_checkpoint("llama"), corpus, run)
    top.mkdir()
    studio = Studio(top)
    name = "far/down"
    try:
        deadline = time.monotonic() + 120
        while not studio.client.get("/api/runs").json()["runs"]:
            assert time.monotonic() < deadline
            assert begun.poll() is None, begun.stderr.read()
            time.sleep(0.1)
        row = studio.until(name, "trains", step=3)
        assert row["step"].endswith("of 100,000")
        assert 0 < row["share"] < 0.1
        shown = studio.show(name)
        assert re.search(r"predicted peak.*the GPU has", shown)
        assert studio.do("resume", name).status_code == 422
        studio.until(name, "trains", step=int(row["step"].split()[0]) + 3)
        assert studio.show(name) != shown
        assert writer(run).pid == begun.pid

        assert studio.do("stop", name).status_code == 200
        assert begun.wait(60) == 130
        assert b"Traceback" not in begun.stderr.read()
    finally:
        begun.kill()
        begun.communicate()
    stopped = studio.until(name, "stopped")
    assert studio.do("stop", name).status_code == 422
    at = int(stopped["step"].split()[0].replace(",", ""))

    assert studio.do("resume", name).status_code == 200
    assert studio.do("resume", name).status_code == 422
    studio.until(name, "trains", step=at + 2)
    process = writer(run)
    try:
        assert os.getsid(process.pid) == process.pid  # a signal to the studio's terminal is none to it
        assert f"resumed from checkpoint-{at}" in studio.show(name)
        os.kill(process.pid, signal.SIGKILL)
        studio.until(name, "stopped")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_of_two_processes_is_begun_stopped_and_resumed_as_two(make_checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(corpus, tmp_path / "library.jsonl")
    studio, runs = Studio(tmp_path), Runs([tmp_path])
    studio.row = lambda name: next(row for row in runs.listed() if row["name"] == name)
    settings = {"model": str(make_checkpoint("llama")), "gpu": "cpu", "max_seq_length": 32, "eval_fraction": 0}
    runs.begin("two", settings, {"data": "library.jsonl", "max_steps": "100000"}, 2)
    try:
        studio.until("two", "trains", step=2)
        runs.stop("two")
        at = int(studio.until("two", "stopped")["step"].split()[0].replace(",", ""))
        runs.resume("two")
        studio.until("two", "trains", step=at + 2)
        assert f"resumed from checkpoint-{at}" in runs.parts(["two"])
        runs.stop("two")
        at = int(studio.until("two", "stopped")["step"].split()[0].replace(",", ""))
        state = json.loads((tmp_path / "two" / f"checkpoint-{at}" / "trainer" / "state.json").read_text())
        assert state["gpus"] == 2
    finally:
        for begun in runs._begun.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(begun.pid, signal.SIGKILL)


def test_a_process_is_known_by_more_than_its_number(tmp_path):
    """A number that was given to another process since, or on another machine, is not signalled."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        true = Process.find(other.pid)
        for named in (Process(true.pid, true.started - 1, true.boot), Process(true.pid, true.started, "another boot")):
            (tmp_path / LOCK).write_text(named.to_json())
            assert writer(tmp_path) is None
            assert not ask_to_stop(tmp_path)
        for text in ("", "{", "[]", '{"pid": -1, "started": 0, "boot": ""}', '{"pid": "x"}'):
            (tmp_path / LOCK).write_text(text)
            assert writer(tmp_path) is None
        assert other.poll() is None
        (tmp_path / LOCK).write_text(true.to_json())
        assert ask_to_stop(tmp_path)
        assert other.wait(10) == -signal.SIGINT or other.returncode == 1
        assert writer(tmp_path) is None
    finally:
        other.kill()
        other.communicate()


def test_what_came_since_is_read_and_no_more(tmp_path):
    """A line is taken when it is whole; a run that went back to a checkpoint, whose file is a new one, is read anew."""
    metrics, reader = tmp_path / "metrics.jsonl", Reader(tmp_path)
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert (reader.read().values["loss"], reader.read().cut) == ([(1, 3.0)], True)
    with metrics.open("a") as file:
        file.write('ss": 2.0}\n')
    logged = reader.read()
    assert (logged.values["loss"], logged.cut, logged.unread) == ([(1, 3.0), (2, 2.0)], False, 0)
    new = tmp_path / "new"
    new.write_text('{"step": 1, "loss": 5.0}\n' * 3)
    new.replace(metrics)
    assert reader.read().values["loss"] == [(1, 5.0)] * 3


def test_the_list_reads_the_end_of_a_long_run(tmp_path):
    run = tmp_path / "long"
    run.mkdir()
    lines = [json.dumps({"step": n, "loss": 1 / n, "peak_memory_bytes": 1 << 30}) for n in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "length.json").write_text('{"total_steps": 40000}')
    row = Studio(tmp_path).row("long")
    assert (row["step"], row["share"], row["memory"]) == ("20,000 of 40,000", 0.5, "1.00 GiB")
    assert row["state"] == "ended without a checkpoint"


def test_several_runs_are_drawn_over_each_other(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    shown = Studio(tmp_path).show("one", "two")
    assert shown.count("<path ") == 2
    assert "one: training" in shown
    assert "two: training" in shown


def test_too_many_folders_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr("oomless.studio.offers.MOST_FOLDERS", 3)
    for name in "abcd":
        (tmp_path / name).mkdir()
    answer = Studio(tmp_path).client.get("/api/runs")
    assert answer.status_code == 422
    assert "more than 3 folders" in answer.json()["error"]


@pytest.mark.parametrize(("arguments", "message"), [(["nowhere"], "nowhere is none"), (["--port", "99999"], "--port")])
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    command = [sys.executable, "-m", "oomless", "studio", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=240)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
