"""Plans asked of the studio: searched by real processes, seen by several, ended when nobody looks."""

import os
import re
import subprocess
import time
from html.parser import HTMLParser

import pytest
import yaml
from starlette.testclient import TestClient
from tests.cli.test_cli import oomless
from transformers import AutoTokenizer

from oomless.studio import searches
from oomless.studio.safety import TOKEN
from oomless.studio.server import application

PINNED = {"max_seq_length": "64", "tokens": "1M", "trainable": "full", "optimizer": "adamw", "dtype": "fp32"}


def look(studio, question, viewer="one"):
    return studio.post("/api/look", json={"question": question, "viewer": viewer}).json()


def until(studio, question, wanted, viewer="one"):
    deadline = time.monotonic() + 240
    while not wanted(said := look(studio, question, viewer)):
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    return said


def markup_of(html):
    """The names of the tags of ``html``, and of their attributes."""
    tags, attributes = set(), set()

    class Reading(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            attributes.update(name for name, _ in attrs)

    Reading().feed(html)
    return tags, attributes


def processes():
    """The processes that search for this one."""
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    return listed.count("oomless.studio.worker")


def copy_of(model, folder):
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.mark.slow
def test_a_plan_is_what_the_command_finds_and_its_command_trains(studio, make_checkpoint, corpus, tmp_path):
    """From the question to the YAML of the answer, which ``oomless train`` takes; a hostile name of a model is text.

    New tokens, whose number is taken as given in the plan, are learnt from the run's own text.
    """
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    copy_of(make_checkpoint("llama"), folder)
    question = {"model": folder.name, "gpu": "virtual:256MiB", **PINNED, "extend_tokenizer": "20"}
    first = look(studio, question)
    assert (first["html"], first["error"]) == (None, None)
    html = until(studio, question, lambda said: said["html"] or said["error"])["html"]
    tags, attributes = markup_of(html)
    assert tags
    assert not tags & {"img", "script"}
    assert not [name for name in attributes if name == "style" or name.startswith("on")]
    for part in ("What fits", "Memory at the peak", "To train it", "What the figures rest on"):
        assert f"<h2>{part}</h2>" in html, part
    written = re.search(r'aria-label="YAML" tabindex="0">(.*?)</pre>', html, re.DOTALL)[1]
    picked = yaml.safe_load(written.replace("&lt;", "<").replace("&gt;", ">"))
    assert (picked["model"], picked["extend_tokenizer"]) == (str(folder), 20)
    assert "20 tokens are taken as given" in html
    assert "Learning rate" in html
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(picked))
    trained = oomless(
        *("train", "--config", tmp_path / "run.yaml", "--data", corpus, "--output-dir", tmp_path / "run"),
        *("--max-steps", 1, "--learning-rate", "1e-3", "--eval-fraction", 0),
    )
    assert trained.returncode == 0, trained.stderr
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")) == 532


def test_what_cannot_be_is_said_and_the_next_question_is_answered(studio):
    """By the same process, which has imported everything."""
    for question, message in (
        ({"model": "no-such-model-anywhere", "gpu": "T4"}, "no-such-model-anywhere"),
        ({"model": "gpt2", "gpu": "T5"}, "T5"),
        ({"model": "gpt2", "gpu": "T4", "max_seq_length": "long"}, "max_seq_length"),
        ({"gpu": "T4"}, "model"),
        ({"model": "gpt2", "gpu": "T4", "host_memory": "32"}, "write 32GiB"),
    ):
        said = until(studio, question, lambda said: said["html"] or said["error"])
        assert message in said["error"]
        assert processes() == 1


def test_a_search_that_nobody_looks_at_ends(studio, monkeypatch):
    """Two tabs share one; it goes on for the second when the first leaves, and ends with the last, or with one that is not heard of."""
    question = {"model": "meta-llama/Llama-3.1-8B", "gpu": "T4"}
    for viewer in ("one", "two"):
        assert look(studio, question, viewer)["error"] is None
    # The first bar does not wait for a rehearsal: 8,030,261,248 weights of 2 bytes.
    assert (
        "the weights alone, in 16 bits: 14.96 GiB" in until(studio, question, lambda said: said["partial"])["partial"]
    )
    assert processes() == 1
    studio.post("/api/leave", json={"question": question, "viewer": "one"})
    assert processes() == 1
    until(studio, question, lambda said: said["words"] not in ("beginning", "waiting for another search to end"), "two")
    studio.post("/api/leave", json={"question": question, "viewer": "two"})
    assert processes() == 0
    look(studio, question)
    assert processes() == 1
    monkeypatch.setattr(searches, "LEFT_S", 0.0)
    deadline = time.monotonic() + 120
    while processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_ten_tabs_share_a_search_further_ones_wait_and_nothing_else_does(studio, monkeypatch):
    monkeypatch.setattr(searches, "MOST_AT_ONCE", 1)
    first, second = ({"model": "meta-llama/Llama-3.1-8B", "gpu": gpu} for gpu in ("T4", "L4"))
    tabs = [f"tab {number}" for number in range(10)]
    for tab in tabs:
        assert look(studio, first, tab)["error"] is None
        assert studio.get("/api/runs").status_code == 200
    assert processes() == 1
    assert look(studio, second)["words"].startswith("waiting")
    for tab in tabs:
        assert look(studio, second)["words"].startswith("waiting")
        studio.post("/api/leave", json={"question": first, "viewer": tab})
    until(studio, second, lambda said: not said["words"].startswith("waiting"))


@pytest.mark.slow
def test_a_process_that_dies_is_an_answer(studio, monkeypatch):
    question = {"model": "meta-llama/Llama-3.1-8B", "gpu": "T4"}
    look(studio, question)
    listed = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "oomless.studio.worker"], capture_output=True, text=True
    )
    os.kill(int(listed.stdout.split()[0]), 9)
    assert "signal 9" in until(studio, question, lambda said: said["error"])["error"]


@pytest.mark.parametrize("model", ["/etc", "../secret", "~", "linked", "inside"])
def test_no_model_outside_the_folders_is_read(tmp_path, model):
    top, secret = tmp_path / "top", tmp_path / "secret"
    for folder in (top / "inside", secret):
        folder.mkdir(parents=True)
    (secret / "config.json").write_text('{"model_type": "hunter2"}')
    (top / "linked").symlink_to(secret)
    (top / "inside" / "config.json").symlink_to(secret / "config.json")
    with TestClient(application([top], "t"), base_url="http://localhost", headers={TOKEN: "t"}) as client:
        answer = client.post("/api/look", json={"question": {"model": model, "gpu": "T4"}, "viewer": "v"})
        assert answer.status_code == 422
        assert "lies outside" in answer.json()["error"]
        assert processes() == 0
        offered = client.get("/api/plan/offers").json()
        assert not [name for name in offered["model"] if name.startswith("/")]
    assert offered["gpu"]["T4"] == "14.56 GiB"
    assert offered["model"]["Qwen/Qwen2.5-0.5B"] == "494M"


@pytest.mark.parametrize(
    "question", [None, [], {"model": 1}, {"data": "x"}, {"trust_remote_code": "true"}, {"output_dir": "/x"}]
)
def test_what_is_no_question_of_a_plan_is_refused(studio, question):
    answer = studio.post("/api/look", json={"question": question, "viewer": "v"})
    assert answer.status_code == 400
    assert processes() == 0
