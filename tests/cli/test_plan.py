"""``oomless plan``: answers offline, for names, folders and config files."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import ENVIRONMENT, ROOT, oomless, plain

EIGHT_GIGABYTES = ("--gpu", "8GiB", "--max-seq-length", "128")


def test_seed_case_and_why():
    result = oomless("plan", "--model", "meta-llama/Llama-3.2-1B", "--gpu", "T4", "--max-seq-length", "2048")
    assert result.returncode == 0, result.stderr
    text = " ".join(plain(result.stdout).split())
    for part in ("does not fit", "optimizer state 13.81 GiB", "No batch size and no sequence length can help"):
        assert part in text, part


def test_json_folder_and_file_agree(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama", tied=True)
    answers = []
    for name in (folder, folder / "config.json"):
        result = oomless("plan", "--model", name, *EIGHT_GIGABYTES, "--json")
        assert result.returncode == 0, result.stderr
        answers.append(json.loads(result.stdout))
    assert answers[0]["fits"] is True
    assert answers[0]["profile"] == answers[1]["profile"]
    assert (
        sum(answers[0]["profile"]["peak_bytes_by_category"].values()) == answers[0]["profile"]["peak_allocated_bytes"]
    )


def test_timeline_and_snapshot(make_checkpoint, tmp_path):
    out = [tmp_path / name for name in ("t.html", "t.png", "s.pickle")]
    for timeline in out[:2]:
        result = oomless(
            "plan", "--model", make_checkpoint("llama"), *EIGHT_GIGABYTES, "--timeline", timeline, "--snapshot", out[2]
        )
        assert result.returncode == 0, result.stderr
    assert "weights" in out[0].read_text()
    assert out[1].read_bytes().startswith(b"\x89PNG")
    from torch.cuda._memory_viz import trace_plot

    recorded = pickle.loads(out[2].read_bytes())
    assert {"alloc", "free_completed", "segment_alloc"} <= {entry["action"] for entry in recorded["device_traces"][0]}
    assert trace_plot(recorded).startswith("\n<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "meta-llama/Llama-3.2-1C", "--gpu", "T4"], "Did you mean"),
        (["--model", "gemma-7b", "--gpu", "RTX4009"], "Did you mean"),
        (["--model", "gemma-7b", "--gpu", "2xT4"], "one GPU so far"),
        (["--model", "gemma-7b", "--gpu", "cpu"], "name one"),
        (["--model", "gemma-7b", "--gpu", "T4", "--max-seq-length", "0"], "at least 2"),
        (["--model", "gemma-7b", "--gpu", "T4", "--max-seq-length", "9000"], "max_position_embeddings, 8192"),
        (["--model", "gemma-7b", "--gpu", "T4", "--dtype", "bf16"], "compute capability 8.0"),
        (["--model", "gemma-7b", "--gpu", "T4", "--timeline", "x.gif"], ".html or .png"),
        (["--model", "{tmp}", "--gpu", "T4"], "config.json"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    result = oomless("plan", *(a.format(tmp=tmp_path) for a in arguments))
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stderr
    assert message in " ".join(plain(result.stderr).split())


def test_train_prints_predicted_and_measured(make_checkpoint, corpus, tmp_path):
    result = oomless(
        *("train", "--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path / "run"),
        *("--gpu", "virtual:64MiB", "--max-seq-length", 64, "--max-steps", 2, "--eval-fraction", 0),
        *("--packing", "concatenate"),
    )
    assert result.returncode == 0, result.stderr
    assert "on virtual:64MiB: fits" in plain(result.stdout)
    error = re.search(r"peak allocated: predicted .* measured .* \(([+-]\d+\.\d+)%\)", plain(result.stdout))
    assert abs(float(error[1])) < 1


def test_the_gpu_benchmark_runs_here_in_its_tiny_form():
    script = Path(ROOT) / "bench" / "predicted_vs_measured.py"
    result = subprocess.run([sys.executable, script, "--tiny"], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "allocated median 0.00%, worst 0.00%" in result.stdout
