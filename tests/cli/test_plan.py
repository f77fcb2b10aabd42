"""``oomless plan``: answers offline, for names, folders and config files."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oomless.planning.choice import SCHEMA
from tests.cli.test_cli import ENVIRONMENT, ROOT, oomless, plain
from tests.report.test_run_page import Outline
from tests.settings import commands

EIGHT_GIGABYTES = ("--gpu", "8GiB", "--max-seq-length", "128", "--as-given")


def test_seed_case_and_why():
    result = oomless(
        "plan", "--model", "meta-llama/Llama-3.2-1B", "--gpu", "T4", "--max-seq-length", "2048", "--as-given"
    )
    assert result.returncode == 1, result.stderr
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
            "plan",
            "--model",
            make_checkpoint("llama"),
            *EIGHT_GIGABYTES,
            "--timeline",
            timeline,
            "--snapshot",
            out[2],
            *("--html", tmp_path / "plan.html"),
        )
        assert result.returncode == 0, result.stderr
    pages = [Outline(path.read_text()) for path in (out[0], tmp_path / "plan.html")]
    assert [page.seen.count("svg") for page in pages] == [1, 2]
    assert all({"weights", "reserved by the allocator"} <= set(page.text) for page in pages)
    assert out[1].read_bytes().startswith(b"\x89PNG")
    from torch.cuda._memory_viz import trace_plot

    recorded = pickle.loads(out[2].read_bytes())
    assert {"alloc", "free_completed", "segment_alloc"} <= {entry["action"] for entry in recorded["device_traces"][0]}
    assert trace_plot(recorded).startswith("\n<!DOCTYPE html>")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_answer_is_ten_lines_and_why_is_more(make_checkpoint):
    """At 80 columns, the most that a preference can name apart."""
    arguments = (
        "plan",
        "--model",
        make_checkpoint("llama"),
        "--gpu",
        "T4",
        "--max-seq-length",
        64,
        "--tokens",
        "10k",
        "--hours",
        1,
    )
    short, long = oomless(*arguments), oomless(*arguments, "--why")
    assert short.returncode == long.returncode == 0, short.stderr
    lines = plain(short.stdout).splitlines()
    assert len(lines) <= 17
    assert "10k tokens take" in lines[0] + lines[1]
    assert "► best quality" in plain(short.stdout)
    assert "peak:" not in plain(short.stdout)
    for part in ("peak:", "are predicted, not measured", "10,000 tokens of text: given"):
        assert part in " ".join(plain(long.stdout).split()), part


def test_what_is_left_open_is_chosen_and_trains_unchanged(make_checkpoint, corpus, tmp_path):
    """The pick is written as YAML, trains as it is on the GPU that it is for, and is as large as was said."""
    folder, picked = make_checkpoint("llama", tied=True), tmp_path / "pick.yaml"
    arguments = ("--model", folder, "--gpu", "virtual:24MiB", "--max-seq-length", 64, "--packing", "concatenate")
    result = oomless(
        *("plan", *arguments, "--data", corpus, "--output-dir", tmp_path / "run", "--write", picked),
        *("--optimizer", "adamw", "--max-steps", 2, "--eval-fraction", 0, "--html", tmp_path / "plan.html"),
    )
    assert result.returncode == 0, result.stderr
    page = Outline((tmp_path / "plan.html").read_text())
    assert {"What fits", "To train it", "Memory at the peak", "Phases", "What the figures rest on"} <= set(page.text)
    assert page.seen.count("svg") == 2  # no speed is known of a virtual GPU
    assert "script" not in page.seen
    assert "optimizer: adamw" in " ".join(page.text)
    text = plain(result.stdout)
    assert "►" in text
    assert "full, AdamW" in text
    trained = oomless("train", "--config", picked, "--as-given")
    assert trained.returncode == 0, trained.stderr
    error = re.search(r"peak allocated: predicted .* measured .* \(([+-]\d+\.\d+)%\)", plain(trained.stdout))
    assert abs(float(error[1])) < 1


def test_the_same_search_again_rehearses_nothing(make_checkpoint, tmp_path):
    arguments = (
        "plan",
        "--model",
        make_checkpoint("llama"),
        "--gpu",
        "virtual:24MiB",
        "--max-seq-length",
        64,
        *("--tokens", "10k", "--json"),
    )
    first, second = (json.loads(oomless(*arguments).stdout) for _ in range(2))
    assert first.pop("trials") > 0
    assert second.pop("trials") == 0
    assert first["strategies"] == second["strategies"]
    assert first["schema"] == SCHEMA
    fitting = [row for row in first["strategies"] if row["fits"]]
    assert {name for row in fitting for name in row["named"]} == {"quality", "balanced", "fast"}
    assert all(0 < row["share"] <= 1 for row in fitting)
    assert first["plan"]["profile"] == second["plan"]["profile"]


def test_several_machines_are_planned_and_started(make_checkpoint, tmp_path, monkeypatch):
    """With the network that is given or assumed, and the command for each machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, picked = make_checkpoint("llama"), tmp_path / "pick.yaml"
    arguments = ("--model", model, "--gpu", "2x4xT4", "--max-seq-length", 64, "--tokens", "10k", "--optimizer", "adamw")
    said = commands.oomless("plan", *arguments, "--why", "--write", picked)
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert "on 2 machines of 4 T4:" in words
    assert "network of each machine: 10 Gbit/s, assumed: one port" in words
    start = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id mine --nproc-per-node 4 -m oomless train"
    assert f"on each machine, of which HOST is one: {start} --config {picked}" in words
    answer = commands.oomless("plan", *arguments, "--network", "100Gbit", "--json").json
    facts = {"gpus": 8, "machines": 2, "network_bytes_per_s": 12.5e9}
    assert {name: answer[name] for name in facts} == facts == {name: answer["plan"][name] for name in facts}
    assert answer["trials"] == 0  # the same memory and work, read again
    documented = Path(ROOT, "docs", "planner.md").read_text()
    assert all(f"`{name}`" in documented for name in answer)


@pytest.mark.slow
def test_nothing_fits_and_what_would(make_checkpoint):
    result = oomless(
        *(
            "plan",
            "--model",
            make_checkpoint("llama", hidden_size=256, intermediate_size=1024),
            "--max-seq-length",
            512,
        ),
        *("--gpu", "virtual:10MiB", "--trainable", "full", "--optimizer", "adamw", "--weight-precision", "master"),
        *("--tokens", "10k"),
    )
    assert result.returncode == 1
    text = " ".join(plain(result.stdout).split())
    assert "Nothing fits" in text
    assert "without --" in text
    assert "on a larger GPU" in text


@pytest.mark.slow
def test_gpus_and_models_compared(make_checkpoint):
    tokens = ("--tokens", "10k")
    models = f"{make_checkpoint('llama')},{make_checkpoint('qwen2')}"
    result = oomless(
        *("plan", "--model", models, "--what-if", "gpu=virtual:24MiB,T4", "--max-seq-length", 64, "--json"),
        *("--optimizer", "adafactor", *tokens),
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [answer["gpu"] for answer in answers] == ["virtual:24MiB", "T4"] * 2
    assert all(any(row["picked"] for row in answer["strategies"]) for answer in answers)


@pytest.mark.slow
def test_the_longest_sequence(make_checkpoint):
    """A longer one by a step does not fit with the quality that a short one has."""
    folder = make_checkpoint("llama", max_position_embeddings=8192)
    arguments = (
        "plan",
        "--model",
        folder,
        "--gpu",
        "virtual:40MiB",
        "--trainable",
        "full",
        "--optimizer",
        "adamw",
        "--per-device-train-batch-size",
        8,
        "--json",
    )
    longest = json.loads(oomless(*arguments, "--max-seq-length", "max").stdout)
    length = longest["config"]["max_seq_length"]
    assert 256 < length < 8192
    pinned = ("--weight-precision", longest["config"]["weight_precision"], "--max-grad-norm", 1)
    longer = oomless(*arguments, "--max-seq-length", length + 256, *pinned)
    assert longer.returncode == 1
    assert json.loads(longer.stdout)["config"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gemma-7b", "--what-if", "gpus=T4"], "--what-if gpu="),
        (["--model", "gemma-7b", "--what-if", "gpu=T4", "--write", "x.yaml"], "a comparison goes without"),
        (
            ["--model", "gemma-7b", "--gpu", "T4", "--as-given", "--write", "x.yaml"],
            "so that --write would have no effect: remove --write",
        ),
        (["--model", "gemma-7b", "--gpu", "T4", "--host-memory", "much"], "--host-memory"),
        (["--model", "gemma-7b", "--gpu", "T4", "--host-memory", "0"], "of host memory, of which 0 B may be used"),
        (["--model", "gemma-7b", "--gpu", "T4", "--tokens-per-step", "1000"], "multiple of"),
        (["--model", "gemma-7b", "--gpu", "T4", "--tokens", "many"], "--tokens: a number of tokens"),
        (["--model", "gemma-7b", "--gpu", "T4", "--tokens", "1M", "--max-tokens", "5"], "keep one"),
        (["--model", "gemma-7b", "--gpu", "T4", "--hours", "-1"], "--hours is a number of hours"),
        (["--model", "gemma-7b", "--gpu", "24GiB", "--hours", "1"], "hours need a GPU whose speed is known"),
        (["--model", "gemma-7b", "--gpu", "T4", "--prefer", "fats"], "Did you mean 'fast'"),
        (["--gpu", "T4"], "model must be given"),
        (["--model", "meta-llama/Lama-3.2-1B", "--gpu", "T4"], "Did you mean"),
        (["--model", "gemma-7b", "--gpu", "RTX4009"], "Did you mean"),
        (["--model", "gemma-7b", "--gpu", "cpu"], "name one"),
        (["--model", "gemma-7b", "--gpu", "T4", "--max-seq-length", "0"], "at least 2"),
        (["--model", "gemma-7b", "--gpu", "T4", "--max-seq-length", "9000"], "max_position_embeddings, 8192"),
        (["--model", "gemma-7b", "--gpu", "T4", "--dtype", "bf16"], "compute capability 8.0"),
        (["--model", "gemma-7b", "--gpu", "T4", "--timeline", "x.gif"], ".html or .png"),
        (["--model", "{tmp}", "--gpu", "T4"], "config.json"),
        (["--model", "gemma-7b", "--gpu", "2x2x2xT4"], "at most two numbers, machines x GPUs"),
        (["--model", "gemma-7b", "--gpu", "2x8xT4", "--network", "100"], "--network: a network's rate is a number"),
        (["--model", "gemma-7b", "--gpu", "8xT4", "--network", "100Gbit"], "where it has no effect: leave it out"),
        (["--model", "gemma-7b", "--gpu", "T4", "--as-given", "--network", "1Gbit"], "where it has no effect"),
        (["--model", "gemma-7b", "--what-if", "gpu=T4,2xT4", "--network", "1Gbit"], "got it for T4, 2xT4"),
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


def test_a_tensor_larger_than_any_model_has_ends_at_once(make_checkpoint, tmp_path):
    config = json.loads((make_checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 10**9}))
    said = commands.oomless("plan", "--model", tmp_path / "config.json", *EIGHT_GIGABYTES, "--json")
    assert (said.code, said.json["needed_at_least"], said.json["batch_cannot_help"]) == (1, True, True)
    assert said.json["fixed_bytes"] == 512 * 10**9 * 2  # the embedding, in bf16


def test_a_run_that_went_on_with_less_is_not_held_to_its_plan(make_checkpoint, corpus, tmp_path):
    said = commands.oomless(
        *("train", "--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path / "run"),
        *("--gpu", "virtual:8MiB", "--as-given", "--max-seq-length", 256, "--max-steps", 1, "--eval-fraction", 0),
        *("--per-device-train-batch-size", 8),
    )
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert "does not fit" in words
    assert "the step is run again" in words
    assert "predicted" not in words


def test_the_gpu_benchmark_runs_here_in_its_tiny_form():
    script = Path(ROOT) / "bench" / "predicted_vs_measured.py"
    result = subprocess.run([sys.executable, script, "--tiny"], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "allocated median 0.00%, worst 0.00%" in result.stdout
