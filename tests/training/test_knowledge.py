"""What is learnt and what is forgotten: measured by the byte, on text that does not decide anything."""

import json
import math

import pytest
import torch
from tests.training.test_stages import FIRST, planned
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.config import DataSource, TrainConfig
from oomless.data.prepare import GENERAL_TEXT
from oomless.errors import ConfigError
from oomless.export.source import find
from oomless.planning.layout import Layout, read_layout
from oomless.report.knowledge import known
from oomless.report.run import read_run, run_page
from oomless.training import loop, stages

BUILTIN = (DataSource(path="builtin"),)


def config(model, corpus, out, **settings):
    defaults = dict(max_seq_length=64, per_device_train_batch_size=2, learning_rate=1e-2, eval_fraction=0.1)
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        gpu="cpu",
        **{**defaults, **dict(max_steps=2, max_eval_blocks=3), **settings},
    )


def evaluations(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval_loss/") for name in line)]


def test_the_sample_that_ships_is_text_in_forty_languages():
    rows = [json.loads(line) for line in GENERAL_TEXT.read_text(encoding="utf-8").splitlines()]
    assert len({row["language"] for row in rows}) == len(rows) == 40
    assert all(2600 <= len(row["text"].encode()) <= 3200 for row in rows)
    assert "free of copyright" in GENERAL_TEXT.with_name("general.license.txt").read_text(encoding="utf-8")


def test_bits_per_byte_are_those_of_the_text(make_checkpoint, corpus, tmp_path):
    """One document in one block, against transformers and the text itself, with letters of two and three bytes."""
    model, text = make_checkpoint("llama"), "Größe, ንባብ: naïve, and so on."
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    sources = dict(general_data=(DataSource(path=str(tmp_path / "short.txt"), name="short"),), eval_fraction=0)
    loop.train(config(model, corpus, tmp_path / "run", max_seq_length=128, max_steps=1, **sources))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(text).input_ids + [tokenizer.eos_token_id]])
    with torch.no_grad():
        mean = float(AutoModelForCausalLM.from_pretrained(model)(ids, labels=ids).loss)
    learnt_bytes = len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
    first, last = evaluations(tmp_path / "run")
    assert set(first) == {"step", "eval_loss/short", "bits_per_byte/short"}
    assert first["bits_per_byte/short"] == pytest.approx(
        mean * (ids.shape[1] - 1) / learnt_bytes / math.log(2), rel=1e-5
    )
    assert last["bits_per_byte/short"] / last["eval_loss/short"] == pytest.approx(
        first["bits_per_byte/short"] / first["eval_loss/short"]
    )


def test_general_text_decides_nothing(make_checkpoint, corpus, tmp_path):
    """Text of another kind gets worse from the first step on; the best model is the same whatever that says."""
    (tmp_path / "other.txt").write_text("ÿþ" * 400)
    settings = dict(learning_rate=0.03, lr_scheduler_type="constant", max_steps=6, eval_steps=1, save_total_limit=1)
    settings |= dict(load_best_model_at_end=True, early_stopping_patience=3)
    other = dict(general_data=(DataSource(path=str(tmp_path / "other.txt"), name="other"),))
    results = []
    for name, more in (("plain", {}), ("general", other)):
        out = tmp_path / name
        result = loop.train(config(make_checkpoint("llama"), corpus, out, **settings, **more))
        results.append((result.steps, result.eval_after["library.jsonl"], find(out, "best").saved.step))
    assert results[0] == results[1]
    by_all = min(
        evaluations(tmp_path / "general")[1:],
        key=lambda line: line["eval_loss/other"] + line["eval_loss/library.jsonl"],
    )
    assert by_all["step"] < results[0][2], "the two would have chosen alike, which shows nothing"


def test_each_stage_says_what_was_learnt_and_forgotten(make_checkpoint, corpus, tmp_path):
    around = dict(general_data="builtin", max_eval_blocks=3)
    listed = [dict(FIRST, max_steps=2), dict(name="second", max_steps=1, data=[{"path": str(corpus), "name": "other"}])]
    stages.train_stages(planned(make_checkpoint("llama"), corpus, tmp_path, *listed, **around))
    first, second = (
        [line["bits_per_byte/general"] for line in evaluations(tmp_path / stage)]
        for stage in ("stage-1-first", "stage-2-second")
    )
    logged = read_run(tmp_path)
    found = {row.name: row for row in known(logged)}
    assert found["general"].bits == (first[0], first[1], second[1])
    less = first[0] - second[1]
    assert found["general"].change == f"{'learnt' if less >= 0 else 'forgot'} {abs(less):.3f}"
    assert [value is None for value in found["other"].bits] == [True, False, False]
    assert [value is None for value in found["library.jsonl"].bits] == [False, False, True]
    page = run_page(logged)
    assert "Learnt and forgotten" in page
    assert f"{second[1]:.3f}" in page


def test_a_plan_evaluates_it_too(make_checkpoint, corpus, tmp_path):
    asked = config(make_checkpoint("llama"), corpus, tmp_path, eval_fraction=0, general_data=BUILTIN)
    assert len(read_layout(asked).evaluation) == 1
    assert len(Layout.uniform((64,), asked).evaluation) == 1
    twice = config(
        make_checkpoint("llama"), corpus, tmp_path, general_data=(DataSource(path="builtin", name="library.jsonl"),)
    )
    with pytest.raises(ConfigError, match="two sources are called 'library.jsonl'"):
        loop.train(twice)
