"""What stands on the screen of a terminal: live lines that are renewed in place, at 80 columns and at 40."""

import json
import re

import pytest

from tests.cli.emulator import Terminal
from tests.cli.test_cli import ENVIRONMENT, oomless


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))


def live(terminal, pattern):
    """The live line that ``pattern`` finds, of every screen; there is never more than one, and nothing is left of it."""
    found = [[line for line in frame if re.search(pattern, line)] for frame in terminal.frames]
    assert max(map(len, found)) == 1
    assert not found[-1]
    drawn = [lines[0] for lines in found if lines]
    assert not any("\x1b" in line or "[K" in line or "[2K" in line for line in drawn)
    return drawn


BOTH = [80, pytest.param(40, marks=pytest.mark.slow)]


@pytest.mark.parametrize("columns", BOTH)
def test_plan(make_checkpoint, columns):
    arguments = ("--model", make_checkpoint("llama"), "--gpu", "virtual:24MiB", "--max-seq-length", 64)
    arguments += ("--tokens", "10k", "--why")
    with Terminal("plan", *arguments, columns=columns) as terminal:
        assert terminal.run() == 0
        drawn = live(terminal, r"━.* \d+ s  \S")
        assert len(set(drawn)) > 3
        assert all(line.startswith("━" * min(20, columns // 4) + " ") for line in drawn)
        assert "virtual:24MiB: full, AdamW" in terminal.text()
        assert "► best quality" in terminal.text()
        assert any(line.startswith("cached but unused ") for line in terminal.lines())


@pytest.mark.parametrize("columns", BOTH)
def test_train(make_checkpoint, corpus, tmp_path, columns):
    arguments = ("--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path / "run")
    settings = ("--gpu", "virtual:64MiB", "--max-seq-length", 64, "--max-steps", 12, "--as-given")
    with Terminal("train", *arguments, *settings, columns=columns) as terminal:
        assert terminal.run() == 0
        steps = live(terminal, r"step \d+/12 ")
        assert len(set(steps)) >= 8
        for part in (r"loss \d\.\d{4}", r"\d:\d\d:\d\d left$", *([r"of 64\.00 MiB"] if columns == 80 else [])):
            assert all(re.search(part, line) for line in steps), part
        assert "12 steps of 1 block x 64 tokens" in terminal.text()


@pytest.mark.parametrize("columns", BOTH)
def test_train_in_stages(make_checkpoint, corpus, tmp_path, columns):
    stages = [{"name": "short", "max_seq_length": 32}, {"name": "long", "max_seq_length": 64}]
    around = {"model": str(make_checkpoint("llama")), "data": str(corpus), "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(json.dumps({**around, "gpu": "virtual:64MiB", "max_steps": 6, "stages": stages}))
    with Terminal("train", "--config", tmp_path / "run.yaml", "--as-given", columns=columns) as terminal:
        assert terminal.run() == 0
        assert len(set(live(terminal, r"step \d/6 "))) >= 5
        # The line of the first stage is gone when the second begins.
        assert not [
            frame for frame in terminal.frames if "stage 2 (long) of 2" in frame[-2:] and "step 6/6" in frame[-1]
        ]
        assert terminal.text().count("6 steps of 1 block") == 2


def test_studio(tmp_path):
    """Nothing of it is renewed in place; what it says stands, and Ctrl-C ends it with nothing more."""
    with Terminal("studio", tmp_path, "--no-open") as terminal:
        terminal.run(until=lambda line: line.startswith("Only who has this address"))
        said = terminal.lines()
        assert said[0].startswith("the studio is at http://127.0.0.1:")
        terminal.press_ctrl_c()
        assert terminal.run() == 0
        assert terminal.lines() == said


def stopped(terminal):
    """What Ctrl-C leaves on the screen."""
    terminal.press_ctrl_c()
    assert terminal.run() == 130
    return terminal.lines()


def test_ctrl_c_in_a_search_is_one_line(tmp_path):
    """Before anything was found, which with a model of this size takes seconds where no trial is kept from before."""
    with Terminal("plan", "--model", "meta-llama/Llama-3.2-1B", "--gpu", "T4", XDG_CACHE_HOME=tmp_path) as terminal:
        terminal.run(until=lambda line: line.startswith("━"))
        assert stopped(terminal) == ["interrupted"]


@pytest.mark.slow
def test_ctrl_c_in_the_demo_says_what_is_there(tmp_path):
    with Terminal("demo", "--output-dir", tmp_path / "demo") as terminal:
        terminal.run(until=lambda line: "step " in line)
        assert stopped(terminal)[-1] == "interrupted"
        assert "Traceback" not in terminal.text()


@pytest.mark.parametrize(
    "columns", [pytest.param(80, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.full_length)]
)
def test_what_was_trained_is_exported_shown_and_heard(make_checkpoint, corpus, tmp_path, columns):
    run = tmp_path / "run"
    arguments = ("--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", run)
    trained = oomless("train", *arguments, "--gpu", "cpu", "--max-seq-length", 32, "--max-steps", 1)
    assert trained.returncode == 0, trained.stderr
    for command, pattern, written in (
        (("export", run, "--to", "gguf"), r"━.* \d+ s  \S", run / "export" / "gguf"),
        (("report", run), None, run / "report.html"),
        (("generate", run, "--prompt", "def main(", "--max-new-tokens", 8, "--gpu", "cpu"), None, None),
        (("compare", run, "--prompt", "def main(", "--max-new-tokens", 8, "--gpu", "cpu"), r"━.* \d+ s  \S", None),
    ):
        with Terminal(*command, columns=columns) as terminal:
            assert terminal.run() == 0, terminal.text()
            assert pattern is None or live(terminal, pattern)
            assert not any("\x1b" in line or "[K" in line or "Traceback" in line for line in terminal.lines())
            assert written is None or written.exists()
            shown = terminal.text().replace(" ", "")
            assert (str(written) if written is not None else "defmain(") in shown


def test_explain(make_checkpoint):
    arguments = ("--model", make_checkpoint("llama"), "--gpu", "virtual:3MiB", "--max-seq-length", 512)
    with Terminal("explain", *arguments) as terminal:
        assert terminal.run() == 0
        drawn = live(terminal, r"^ +\d+ s  (the run|cure: )")
        assert len(set(drawn)) >= 3
        assert "What cures it" in terminal.text()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_rehearse(tmp_path, columns):
    """What the script prints is its own; the answer stands below it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(1024, 1024).cuda()\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "for step in range(9):\n"
        "    model(torch.randn(64, 1024, device='cuda')).square().mean().backward()\n"
        "    optimizer.step()\n"
        "    print('[bold] step', step)\n"
    )
    with Terminal("rehearse", script, "--gpu", "T4", columns=columns) as terminal:
        assert terminal.run() == 0, terminal.text()
        assert "[bold] step 1" in terminal.text()
        assert "script.py on T4: fits. It needs" in terminal.text()
        assert not any("\x1b" in line or "[K" in line for line in terminal.lines())
        assert all(len(line) <= columns for line in terminal.lines())


def test_what_is_piped_holds_no_control_code_and_json_nothing_else(make_checkpoint, tmp_path):
    arguments = (
        "--model",
        make_checkpoint("llama"),
        "--gpu",
        "virtual:24MiB",
        "--max-seq-length",
        64,
        "--tokens",
        "10k",
    )
    result = oomless("plan", *arguments, "--json", "--write", tmp_path / "pick.yaml")
    assert json.loads(result.stdout)["plan"]["fits"]
    assert f"written to {tmp_path / 'pick.yaml'}" in result.stderr
    assert not set(result.stdout + result.stderr) & set("\x1b\r")


def test_text_of_the_user_is_no_markup(make_checkpoint, tmp_path):
    data = tmp_path / "[x] [bold]text[INST]"
    data.mkdir()
    (data / "[INST].jsonl").write_text('{"text": "a"}\n{"[INST]": "[/INST] [/x]"}\n')
    arguments = ("--model", make_checkpoint("llama"), "--output-dir", tmp_path / "[/run]", "--gpu", "cpu")
    result = oomless("train", *arguments, "--data", data)
    assert result.returncode == 2
    assert f"{data}/[INST].jsonl" in result.stderr
    assert "Traceback" not in result.stderr
    (data / "[INST].jsonl").write_text(json.dumps({"text": "[INST] hello [/INST] " * 40}) + "\n")
    settings = ("--max-seq-length", 32, "--max-steps", 1, "--eval-fraction", 0)
    result = oomless("train", *arguments, "--data", data, *settings)
    assert result.returncode == 0, result.stderr
    assert f"model: {tmp_path / '[/run]' / 'model'}" in result.stdout
    assert f"{data.name}: 1 document" in result.stdout
