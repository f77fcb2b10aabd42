"""What a model writes on the way: the text that transformers makes of it, and nothing lost when the run is resumed."""

import json

import pytest
import torch
from tests.training.test_best import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.errors import ConfigError
from oomless.training import loop

PROMPTS = ("def main(", "import sys\n\n# 天気 ")


def written(run):
    """By step, what was written after each prompt."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        (record["step"], {sample["prompt"]: sample["text"] for sample in record["samples"]})
        for record in records
        if "samples" in record
    ]


def by_transformers(folder, new):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))[0]
        after = [token for token in out[ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        found[prompt] = tokenizer.decode([*ids[0], *after])[len(tokenizer.decode(ids[0])) :]
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_what_is_written_is_what_transformers_writes(make_checkpoint, corpus, tmp_path, architecture):
    """Before the first step by the model that was given, at the end by the final one; in between as often as it is evaluated."""
    folder, run = make_checkpoint(architecture), tmp_path / "run"
    packing = {"packing": "concatenate"} if architecture == "mamba" else {}
    given = dict(max_steps=4, eval_steps=2, eval_fraction=0, sample_prompts=PROMPTS, sample_tokens=9, **packing)
    loop.train(config(folder, corpus, run, **given))
    (first, before), (between, _), (last, after) = written(run)
    assert (first, between, last) == (0, 2, 4)
    assert before == by_transformers(folder, 9)
    assert after == by_transformers(run / "model", 9)
    assert before != after


def test_a_resumed_run_has_written_each_once(make_checkpoint, corpus, tmp_path):
    run = tmp_path / "run"
    given = dict(max_steps=4, eval_steps=1, save_steps=2, save_total_limit=5, sample_prompts=PROMPTS, sample_tokens=2)
    loop.train(config(make_checkpoint("llama"), corpus, run, **given))
    whole = written(run)
    assert [step for step, _ in whole] == [0, 1, 2, 3, 4]
    for name in ("model", "checkpoint-4"):
        (run / name).rename(tmp_path / name)
    loop.train(config(make_checkpoint("llama"), corpus, run, resume=True, **given))
    assert written(run) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sample_tokens=3), "sample_tokens has no effect without sample_prompts"),
        (dict(sample_prompts=["a"], sample_tokens=64), "sample_tokens is below max_seq_length"),
        (dict(sample_prompts=[]), "sample_prompts is empty"),
        (dict(sample_prompts=["a", " "]), "sample_prompts is empty"),
        (dict(sample_prompts=[["a"]]), "sample_prompts must be text"),
        (dict(sample_prompts=["a " * 99], sample_tokens=8), "has 1 to 56 tokens here"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(make_checkpoint, corpus, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        loop.train(config(make_checkpoint("llama"), corpus, tmp_path / "run", max_steps=1, **settings))
