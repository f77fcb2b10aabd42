"""Runs in stages as a user meets them: planned together, refused together, written, trained and gone on with."""

import json

import pytest
import yaml

from oomless.config import TrainConfig
from oomless.planning.plan import plan_training
from oomless.planning.stages import as_said, settings_to_plan
from tests.cli.test_cli import oomless, plain


def written(path, model, corpus, **around):
    settings = {
        **dict(model=str(model), data=str(corpus), output_dir=str(path.parent / "run"), max_steps=2, dtype="fp32"),
        **dict(per_device_train_batch_size=4, eval_fraction=0, gpu="virtual:24MiB"),
        **around,
    }
    stages = [dict(name="short", max_seq_length=32), dict(name="long", max_seq_length=512)]
    path.write_text(yaml.safe_dump({**settings, "stages": stages}))
    return path


def test_a_later_stage_that_does_not_fit_is_found_before_the_first_begins(make_checkpoint, corpus, tmp_path):
    config = written(tmp_path / "run.yaml", make_checkpoint("llama"), corpus)
    planned = oomless("plan", "--config", config, "--as-given", "--json")
    assert planned.returncode == 1, planned.stderr
    answer = json.loads(planned.stdout)
    assert (answer["fits"], answer["decides"]) == (False, "long")
    assert [stage["fits"] for stage in answer["stages"]] == [True, False]
    assert answer["stages"][0]["needed_bytes"] < 24 << 20 < answer["stages"][1]["needed_bytes"]
    refused = oomless("train", "--config", config, "--as-given")
    assert refused.returncode == 1, refused.stderr
    assert "stage 2 (long): does not fit, so that the run does not. Nothing was begun" in " ".join(
        plain(refused.stdout).split()
    )
    assert not (tmp_path / "run").exists()


def test_what_a_form_rests_on_is_said_of_stages_too(gpt_oss_checkpoint, tmp_path):
    around = dict(
        model=str(gpt_oss_checkpoint / "config.json"), trainable="lora", gpu="virtual:64MiB", max_seq_length=32
    )
    listed = [dict(max_steps=1), dict(max_steps=1, quantization="mxfp4")]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({**around, "stages": listed}))
    said = oomless("plan", "--config", tmp_path / "stages.yaml", "--as-given")
    assert "as published stores its experts in MXFP4" in " ".join(said.stderr.split())


def test_a_stage_is_planned_for_the_model_that_those_before_it_leave(make_checkpoint, corpus, tmp_path):
    tied = make_checkpoint("llama", tied=True)
    settings = dict(
        model=str(tied), data=str(corpus), output_dir="out", gpu="virtual:1GiB", trainable="lm_head", max_seq_length=64
    )
    first = TrainConfig.from_mapping({**settings, "tied_weights": "untied"})
    then = {**settings, "tied_weights": "untied", "trainable": "full"}
    planned = TrainConfig.from_mapping(settings_to_plan(then, [first], tmp_path))
    two_matrices = TrainConfig.from_mapping({**settings, "trainable": "full", "model": str(make_checkpoint("llama"))})
    bytes_ = [plan_training(one).profile.peak_allocated_bytes for one in (planned, two_matrices, first)]
    assert bytes_[0] == bytes_[1] != bytes_[2]
    assert as_said(planned, then).model == str(tied)
    assert plan_training(planned).model == f"{tied} (embed_tokens and lm_head untied)"


def test_hours_are_added_up(tmp_path):
    config, around = (
        tmp_path / "run.yaml",
        dict(model="gpt2", gpu="T4", data="text", output_dir="out", max_seq_length=64),
    )
    listed = [dict(max_steps=7200), dict(max_steps=3600)]
    config.write_text(yaml.safe_dump({**around, "stages": listed}))
    planned = json.loads(oomless("plan", "--config", config, "--as-given", "--json").stdout)
    speeds = [stage["speed"] for stage in planned["stages"]]
    ends = [
        sum(stage["max_steps"] * 64 / speed[name] / 3600 for stage, speed in zip(listed, speeds, strict=True))
        for name in ("tokens_per_second_high", "tokens_per_second_low")
    ]
    assert planned["hours"] == pytest.approx(ends)
    assert 0 < ends[0] < ends[1]


@pytest.mark.full_length
def test_planned_written_trained_and_gone_on_with(make_checkpoint, corpus, tmp_path):
    model = make_checkpoint("llama", vocab_size=512)
    config = written(tmp_path / "run.yaml", model, corpus, gpu="virtual:64MiB", eval_fraction=0.1)
    page, pick = tmp_path / "plan.html", tmp_path / "pick.yaml"
    planned = oomless("plan", "--config", config, "--write", pick, "--html", page)
    assert planned.returncode == 0, planned.stderr
    said = " ".join(plain(planned.stdout).split())
    assert said.index("stage 1 (short) of 2") < said.index("stage 2 (long) of 2") < said.index("stage 2 (long) decides")
    assert "stage 2 (long)" in page.read_text()
    trained = oomless("train", "--config", pick)
    assert trained.returncode == 0, trained.stderr
    assert "predicted" in trained.stdout
    run = tmp_path / "run"
    assert {path.name for path in run.glob("stage-*")} == {"stage-1-short", "stage-2-long"}
    assert (run / "stage-2-long" / "prediction.json").is_file()
    longer = oomless("train", "--config", run / "config.yaml", "--resume", "--max-steps", 2)
    assert longer.returncode == 0, longer.stderr
    assert "resumed from checkpoint-2" in longer.stdout
    for command in ("report", "generate", "compare", "export"):
        more = ("--prompt", "def") if command in ("generate", "compare") else ()
        done = oomless(command, run, *more)
        assert done.returncode == 0, (command, done.stderr)
