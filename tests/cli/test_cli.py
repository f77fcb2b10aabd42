"""The command line as a user meets it: real processes, exit codes, what is printed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oomless.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", "NO_COLOR": "1"}


def oomless(*arguments, **options):
    command = [sys.executable, "-m", "oomless", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_lists_every_setting():
    result = oomless("train", "--help-all")
    assert result.returncode == 0
    shown = set(re.findall(r"--([a-z0-9-]+)", plain(result.stdout)))
    expected = {name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}
    assert expected <= shown
    assert shown <= expected | {"config", "help", "help-all", "as-given", "host-memory", "no-shuffle", "prefer"}


def test_import_is_light():
    code = "import sys, oomless; print('torch' in sys.modules, oomless.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.stdout.startswith("False 0.")


def test_train_and_resume_through_the_command_line(make_checkpoint, corpus, tmp_path):
    settings = ["--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path / "run", "--gpu", "cpu"]
    settings += ["--max_seq_length", 64, "--max-steps", 3, "--learning-rate", "1e-3", "--eval-fraction", 0.1]
    result = oomless("train", *settings)
    assert result.returncode == 0, result.stderr
    for part in ("Parameters", "validation loss after step 0", "step 3/3", "perplexity", "tokens/s", "model:"):
        assert part in result.stdout, part
    assert oomless("train", *settings).returncode == 2
    again = oomless("train", "--config", tmp_path / "run" / "config.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed from checkpoint-3" in again.stdout
    assert "in 3 steps, no step was left, peak memory" in again.stdout


def test_accumulation_through_the_command_line(make_checkpoint, corpus, tmp_path):
    losses = []
    for batch, accumulation in ((1, 8), (2, 4), (8, 1)):
        out = tmp_path / str(batch)
        result = oomless(
            *("train", "--model", make_checkpoint("qwen2", tied=True), "--data", corpus, "--output-dir", out),
            *("--per-device-train-batch-size", batch, "--gradient-accumulation-steps", accumulation, "--gpu", "cpu"),
            *("--max-seq-length", 32, "--max-steps", 3, "--learning-rate", "1e-3", "--eval-fraction", "0.1"),
        )
        assert result.returncode == 0, result.stderr
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    assert losses[2] == pytest.approx(losses[0], abs=2e-6)


def test_interrupt_saves_and_says_how_to_resume(make_checkpoint, corpus, tmp_path):
    command = [sys.executable, "-m", "oomless", "train", "--model", make_checkpoint("llama"), "--data", corpus]
    command += ["--output-dir", tmp_path / "run", "--max-seq-length", "64", "--max-steps", "100000", "--gpu", "cpu"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"loss"') > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.search(
        r"interrupted and saved after step \d+; go on with: oomless train --config .*config.yaml --resume", output
    )
    assert "Traceback" not in errors
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_an_interrupt_in_code_made_of_a_string_ends_with_130_too(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        "from oomless import cli\nfrom oomless.cli import app\n"
        "app.run = lambda: exec('raise KeyboardInterrupt')\ncli.main()\n"
    )
    command = [sys.executable, "-m", script.stem]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin-rate", "1"], "--learning-rate"),
        (["--learning-rate", "fast"], "learning_rate must be a number; got 'fast'"),
        (["--data", "{tmp}/nowhere"], "is none"),
        (["--data", "{tmp}/empty.txt"], "holds no text"),
        (["--data", "{tmp}/latin.txt"], "latin.txt is not UTF-8 at byte 4"),
        (["--data", "{tmp}/bad.jsonl"], "line 2 is not JSON"),
        (["--model", "{tmp}"], "config.json"),
        (["--max-seq-length", "100000"], "max_position_embeddings, 512"),
        (["--trainable", "lm_haed"], "nor a pattern"),
        (["--gpu", "cuda:7"], "no GPU answers"),
        (["--config", "{tmp}/none.yaml"], "cannot be read"),
        (["--output-dir", "/proc/oomless"], "/proc/oomless"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(make_checkpoint, corpus, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xc3\xa9"[:3] + b"\xe9 cr\xe8me"[:0] + b"e\xe9x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    given = [a.format(tmp=tmp_path) for a in arguments]
    settings = {"--model": make_checkpoint("llama"), "--data": corpus, "--output-dir": tmp_path / "out", "--gpu": "cpu"}
    settings |= {"--max-seq-length": 64, "--max-steps": 1, "--eval-fraction": 0}
    settings |= dict(zip(given[::2], given[1::2], strict=True))
    result = oomless("train", *(part for pair in settings.items() for part in pair))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert message in " ".join(plain(result.stderr).split())
