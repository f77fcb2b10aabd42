"""What a user types for several GPUs: plan, write, torchrun, resume; and one message where it cannot be."""

import subprocess
import sys

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


@pytest.mark.slow
def test_stages_are_one_run_of_both(make_checkpoint, corpus, tmp_path):
    config, run = tmp_path / "run.yaml", tmp_path / "run"
    settings = dict(
        model=str(make_checkpoint("llama")), data=str(corpus), output_dir=str(run), gpu="cpu", eval_fraction=0
    )
    stages = [dict(name="short", max_seq_length=32), dict(name="long", max_seq_length=64), dict(name="last", seed=1)]
    config.write_text(yaml.safe_dump({**settings, "max_seq_length": 32, "max_steps": 2, "stages": stages}))
    trained = torchrun("train", "--config", config)
    assert trained.returncode == 0, trained.stderr
    for part in ("stage 1 (short) of 3", "stage 3 (last) of 3", "2 steps of 2 blocks x 64 tokens on 2 x"):
        assert plain(trained.stdout).count(part) == 1, part
    assert (run / "model" / "config.json").is_file()
    again = torchrun("train", "--config", config, "--resume", "--output-dir", run)
    assert again.returncode == 0, again.stderr
    assert "resumed from checkpoint-2" in again.stdout


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
