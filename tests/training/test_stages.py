"""Runs in stages: what each begins with, what is left of it, and a SIGKILL wherever it may come."""

import gc
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oomless.config import TrainConfig
from oomless.config.stages import stages_of
from oomless.config.values import load_yaml
from oomless.errors import CheckpointError, ConfigError, DataError
from oomless.export.source import find, find_two
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.planning.plan import plan_training
from oomless.planning.stages import settings_to_plan
from oomless.report.run import read_end, read_run, run_page
from oomless.training import loop, stages
from oomless.training.checkpoint import list_checkpoints

FIRST, SECOND = dict(name="first", max_steps=4), dict(name="second", max_steps=6, save_steps=3, max_seq_length=32)


def planned(model, corpus, out, *listed, **around):
    settings = dict(
        model=str(model),
        data=str(corpus),
        output_dir=str(out),
        gpu="cpu",
        eval_fraction=0.1,
        max_seq_length=48,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    found = stages_of({**settings, **around, "stages": list(listed or (FIRST, SECOND))})
    return [stages.Planned(stage=stage, config=TrainConfig.from_mapping(stage.settings)) for stage in found]


def of(run, stage):
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def losses(run, stage):
    return [line["loss"] for line in of(run, stage) if "loss" in line]


def evaluations(run, stage):
    return [value for line in of(run, stage) for name, value in line.items() if name.startswith("eval_loss/")]


def test_each_begins_where_the_one_before_ended(make_checkpoint, corpus, tmp_path):
    run, ended = tmp_path / "run", []
    both = planned(make_checkpoint("llama"), corpus, run, dict(FIRST, save_steps=2), dict(SECOND, max_seq_length=48))
    result = stages.train_stages(both, ended=lambda stage, result: ended.append((stage.name, result.steps)))
    assert ended == [("first", 4), ("second", 6)]
    assert evaluations(run, "stage-2-second")[0] == evaluations(run, "stage-1-first")[-1]
    assert evaluations(run, "stage-2-second")[-1] < evaluations(run, "stage-1-first")[0] - 0.1
    # Of a stage that is over its model is left; of the last one what any run leaves.
    assert list_checkpoints(run / "stage-1-first") == []
    assert [one.step for one in list_checkpoints(run / "stage-2-second")] == [3, 6]
    assert result.model_dir == run / "model"
    weights = [load_file(folder / "model.safetensors") for folder in (run / "model", run / "stage-2-second" / "model")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    AutoModelForCausalLM.from_pretrained(run / "model")
    AutoTokenizer.from_pretrained(run / "model")

    whole = read_run(run)
    assert [step for step, _ in whole.values["loss"]] == list(range(1, 11))
    assert whole.total_steps == 10
    assert whole.last("tokens") == of(run, "stage-1-first")[-2]["tokens"] + of(run, "stage-2-second")[-2]["tokens"]
    assert read_end(run).values["loss"][-1] == (10, losses(run, "stage-2-second")[-1])
    assert "<svg" in run_page(whole)
    found = find(run)
    assert (found.name, found.began_with) == ("checkpoint-6 of stage-2-second", both[0].config.model)
    assert find(run, "3").saved.step == 3
    assert find_two(run)[1].folder == Path(both[0].config.model)


LORA = dict(trainable="lora", lora_r=4, lora_alpha=64.0)
WAYS = {
    "full": ({}, {}),
    "an adapter goes on": (LORA, LORA),
    "an adapter in 4 bits goes on": (dict(LORA, quantization="nf4", dtype="bf16"),) * 2,
    "another adapter": (LORA, dict(LORA, lora_r=8)),
    "lora, then full": (LORA, {}),
    "untied once": (dict(trainable="lm_head", tied_weights="untied"),) * 2,
    "rows": (dict(trainable="lm_head", trainable_rows="5,7-9"), {}),
}


@pytest.mark.parametrize(
    "way",
    [
        way if way in ("an adapter goes on", "untied once") else pytest.param(way, marks=pytest.mark.slow)
        for way in WAYS
    ],
)
def test_weights_go_on_whatever_trains(make_checkpoint, corpus, tmp_path, way):
    first, second = WAYS[way]
    model = make_checkpoint("llama", tied=way == "untied once")
    listed = [dict(FIRST, **first), dict(SECOND, max_seq_length=48, max_steps=2, **second)]
    stages.train_stages(planned(model, corpus, tmp_path, *listed))
    before, then = evaluations(tmp_path, "stage-1-first"), evaluations(tmp_path, "stage-2-second")
    exactly = "4 bits" not in way and way != "another adapter" and way != "lora, then full"
    assert then[0] == (before[-1] if exactly else pytest.approx(before[-1], abs=2e-4))
    assert before[-1] != before[0]  # something trained
    is_adapter = (tmp_path / "stage-1-first" / "model" / "adapter_config.json").is_file()
    assert is_adapter == ("goes on" in way)
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    # What is measured of the model as transformers loads it is what the last stage ended with.
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert written.config.tie_word_embeddings is False
    if way == "an adapter in 4 bits goes on":  # the base is loaded again, not rounded twice
        config = TrainConfig.from_mapping(load_yaml(tmp_path / "stage-2-second" / "config.yaml"))
        adapter = json.loads((Path(config.model) / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(model)


@pytest.mark.slow
def test_tokens_are_learnt_in_the_first_stage_and_known_in_the_others(make_checkpoint, corpus, tmp_path):
    rows = dict(trainable="embed_tokens+lm_head", trainable_rows="new", max_steps=2)
    listed = [dict(FIRST, **rows), dict(SECOND, **rows), dict(name="third", max_steps=1)]
    model, run = make_checkpoint("llama"), tmp_path / "run"
    found = planned(model, corpus, run, *listed, extend_tokenizer=20, max_seq_length=32)
    stages.train_stages(found)
    # The later stages are planned for the model with the new tokens.
    later = settings_to_plan(found[2].stage.settings, [found[0].config, found[1].config], tmp_path)
    vocabularies = [
        AutoConfig.from_pretrained(place).vocab_size
        for place in (model, later["model"], run / "stage-3-third" / "model")
    ]
    assert vocabularies[0] == 512
    assert vocabularies[1] == vocabularies[2] >= 532
    assert evaluations(run, "stage-2-second")[0] == evaluations(run, "stage-1-first")[-1]
    assert len(AutoTokenizer.from_pretrained(run / "model")) == 532
    assert find_two(run)[1].folder == (run / "stage-1-first" / "extended").resolve()


@pytest.mark.slow
def test_the_final_model_may_be_the_adapter_alone(make_checkpoint, corpus, tmp_path):
    listed = [dict(FIRST, max_steps=1), dict(SECOND, max_steps=1)]
    stages.train_stages(planned(make_checkpoint("llama"), corpus, tmp_path, *listed, **LORA, merge_lora=False))
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    assert find(tmp_path).kind == "adapter"


def run_in_process(listed, log, moment=None):
    """In a process of its own, which kills itself at a moment between the stages."""
    torch.set_num_threads(1)
    if moment is not None:
        leave = stages._leave

        def die(*arguments, **named):
            if moment == "after":
                leave(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        stages._leave = die
    try:
        stages.train_stages(listed)
        log.write_text("done")
    except Exception as error:
        log.write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("way", "moment"),
    [
        ("full", "in the second"),
        ("an adapter goes on", "before"),
        pytest.param("full", "after", marks=pytest.mark.slow),
        pytest.param("an adapter goes on", "in the second", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_undisturbed(make_checkpoint, corpus, tmp_path, processes, way, moment):
    model = make_checkpoint("llama")
    listed = [FIRST | WAYS[way][0], SECOND | WAYS[way][1]]
    stages.train_stages(planned(model, corpus, tmp_path / "straight", *listed))
    broken, log = tmp_path / "broken", tmp_path / "log"
    between = None if moment == "in the second" else moment
    victim = processes.Process(target=run_in_process, args=(planned(model, corpus, broken, *listed), log, between))
    victim.start()
    while between is None and not (broken / "stage-2-second" / "checkpoint-3").is_dir():
        time.sleep(0.002)
        assert victim.is_alive()
    if between is None:
        os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert (broken / "stage-2-second").exists() == (between is None)
    assert not (broken / "model").exists(), "killed too late to show anything"
    with pytest.raises(ConfigError, match="holds the stages of an earlier run: give --resume"):
        stages.train_stages(planned(model, corpus, broken, *listed))
    again = processes.Process(target=run_in_process, args=(planned(model, corpus, broken, *listed, resume=True), log))
    again.start()
    again.join()
    assert log.read_text() == "done"
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "straight", broken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for stage in ("stage-1-first", "stage-2-second"):
        assert losses(tmp_path / "straight", stage) == losses(broken, stage)
    assert list_checkpoints(broken / "stage-1-first") == []


def test_the_peak_of_a_stage_is_its_own(make_checkpoint, corpus, tmp_path, monkeypatch):
    """On one device for all stages, as a GPU is; what is left of a stage is not collected by chance."""
    device, peaks = VirtualGPU(64 << 20), []
    monkeypatch.setattr(loop, "open_device", lambda name: device)
    listed = [dict(name="long", max_steps=2, max_seq_length=512), dict(name="short", max_steps=2, max_seq_length=32)]
    both = planned(make_checkpoint("llama"), corpus, tmp_path / "run", *listed, gpu="virtual:64MiB", eval_fraction=0)
    gc.disable()
    try:
        stages.train_stages(both, ended=lambda stage, result: peaks.append(result.peak_memory_bytes))
    finally:
        gc.enable()
    assert peaks == [plan_training(one.config).profile.peak_allocated_bytes for one in both]
    assert peaks[1] < peaks[0] / 2


def test_moved_it_goes_on_where_it_lies(make_checkpoint, corpus, tmp_path):
    """The second stage trains on the adapter of the first, whose base with the new tokens lies in the folder of that."""
    lora = dict(trainable="lora", lora_r=4, lora_alpha=8.0, max_seq_length=32)
    listed = [dict(name="first", max_steps=1, **lora), dict(name="second", max_steps=1, **lora)]
    model, run, moved = make_checkpoint("llama"), tmp_path / "run", tmp_path / "elsewhere" / "moved"
    stages.train_stages(planned(model, corpus, run, *listed, extend_tokenizer=20))
    moved.parent.mkdir()
    run.rename(moved)
    listed[1]["max_steps"] = 2
    result = stages.train_stages(planned(model, corpus, moved, *listed, extend_tokenizer=20, resume=True))
    assert (result.steps, len(losses(moved, "stage-2-second"))) == (2, 2)
    assert not run.exists()
    assert len(AutoTokenizer.from_pretrained(moved / "model")) == 532


def test_what_is_wrong_with_a_later_stage_shows_before_the_first(make_checkpoint, corpus, tmp_path):
    model = make_checkpoint("llama")
    for wrong, error, message in (
        (dict(data=str(tmp_path / "nothing.txt")), DataError, r"^stage 2 \(second\): .*nothing\.txt"),
        (dict(max_seq_length=1024), ConfigError, r"^stage 2 \(second\): max_seq_length must be at most .* 512"),
        (
            dict(trainable="lora", quantization="mxfp4"),
            ConfigError,
            r"^stage 2 \(second\): .* leaves a whole model in plain",
        ),
        (dict(loss_on="all"), ConfigError, r"^stage 2 \(second\): loss_on is for chats"),
    ):
        with pytest.raises(error, match=message):
            stages.train_stages(planned(model, corpus, tmp_path / "run", FIRST, SECOND | wrong))
        assert not (tmp_path / "run" / "stage-1-first").exists()


def test_a_run_goes_on_only_as_it_began(make_checkpoint, corpus, tmp_path):
    model, run = make_checkpoint("llama"), tmp_path / "run"
    short = [FIRST, dict(name="second", max_steps=2)]
    stages.train_stages(planned(model, corpus, run, *short))
    with pytest.raises(ConfigError, match=r"stage 1 \(first\): a resumed run must keep learning_rate"):
        stages.train_stages(planned(model, corpus, run, FIRST | dict(learning_rate=1e-3), short[1], resume=True))
    with pytest.raises(ConfigError, match=r"stage 1 \(first\): a resumed run must keep max_steps: it began with 4"):
        stages.train_stages(planned(model, corpus, run, FIRST | dict(max_steps=5), short[1], resume=True))
    with pytest.raises(ConfigError, match="holds a run in stages: go on with it by --config"):
        loop.train(TrainConfig(model=str(model), data=str(corpus), output_dir=str(run), gpu="cpu", resume=True))
    # The last stage may be made longer, as any run may.
    result = stages.train_stages(planned(model, corpus, run, FIRST, dict(name="second", max_steps=3), resume=True))
    assert result.steps == 3
    (run / "stage-1-first" / "model").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"stage 2 \(second\) has begun, and the model of stage 1 \(first\)"):
        stages.train_stages(planned(model, corpus, run, *short, resume=True))
