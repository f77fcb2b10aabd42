"""What a user types for several GPUs: plan, write, torchrun, resume; and one message where it cannot be."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.cli.test_cli import ENVIRONMENT, oomless, plain


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "oomless"]
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


@pytest.mark.slow
def test_plan_train_and_resume_on_one(make_checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    pick, run = tmp_path / "pick.yaml", tmp_path / "run"
    settings = ["--max-seq-length", 64, "--tokens-per-step", 256, "--max-steps", 3, "--dtype", "bf16"]
    planned = oomless("plan", "--model", make_checkpoint("llama"), "--gpu", "2x8GiB", *settings, "--write", pick)
    assert planned.returncode == 0, planned.stderr
    text = " ".join(plain(planned.stdout).split())
    assert "on 2 x GPU of 8.00 GiB: full, AdamW" in text
    assert f"torchrun --nproc-per-node 2 -m oomless train --config {pick}" in text
    data = ["--data", corpus, "--output-dir", run, "--gpu", "cpu", "--eval-fraction", 0]
    trained = torchrun("train", "--config", pick, *data)
    assert trained.returncode == 0, trained.stderr
    assert (run / "model" / "config.json").is_file()
    for part in ("3 steps of 4 blocks x 64 tokens on 2 x ", "step 3/3"):
        assert plain(trained.stdout).count(part) == 1, part
    written = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump({**written, "gradient_accumulation_steps": 2 * written["gradient_accumulation_steps"]})
    )
    again = oomless("train", "--config", tmp_path / "one.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed from checkpoint-3" in again.stdout


def on_two_machines(places, *arguments):
    """What two agents say whose machines share nothing but the network, and work in the folders ``places``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet]

    def agent(place):
        command = [*launcher, "-m", "oomless", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=place)

    with ThreadPoolExecutor() as both:
        return list(both.map(agent, places))


@pytest.mark.slow
def test_stages_are_one_run_of_two_machines(make_checkpoint, corpus, tmp_path):
    config, places = tmp_path / "run.yaml", [tmp_path / "a", tmp_path / "b"]
    settings = dict(model=str(make_checkpoint("llama")), data=str(corpus), output_dir="run", gpu="cpu", eval_fraction=0)
    for place in places:
        place.mkdir()
    stages = [dict(name="short", max_seq_length=32), dict(name="long", max_seq_length=64), dict(name="last", seed=1)]
    config.write_text(yaml.safe_dump({**settings, "max_seq_length": 32, "max_steps": 2, "stages": stages}))
    trained = on_two_machines(places, "train", "--config", config)
    assert [agent.returncode for agent in trained] == [0, 0], trained[0].stderr
    said = "".join(plain(agent.stdout) for agent in trained)
    for part in ("stage 1 (short) of 3", "stage 3 (last) of 3", "2 steps of 2 blocks x 64 tokens on 2 x"):
        assert said.count(part) == 1, part
    assert "2 machines, with 2 run folders, each of them whole" in said
    assert all((place / "run" / "model" / "config.json").is_file() for place in places)


@pytest.mark.slow
def test_one_message_where_it_cannot_be(make_checkpoint, corpus, tmp_path):
    common = ["train", "--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path, "--gpu", "cpu"]
    refused = torchrun(*common, "--optimizer-in-backward", "--max-steps", 1)
    assert refused.returncode != 0
    assert (
        plain(refused.stderr).count(
            "error: optimizer_in_backward cannot be used with several GPUs: of a model in parts"
        )
        == 1
    )
    (tmp_path / "checkpoint-1").mkdir()
    refused = torchrun(*common, "--max-steps", 1)
    assert plain(refused.stderr).count("holds the checkpoints of an earlier run") == 1
