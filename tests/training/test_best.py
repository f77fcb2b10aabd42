"""What a run keeps of its evaluations: the best model, an end before its length, an adapter alone; and one that becomes longer."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.training import loop
from oomless.training.best import Best
from oomless.training.checkpoint import list_checkpoints

IDS = torch.arange(1, 21)[None] * 17 % 512


def config(model, corpus, out, **settings):
    defaults = dict(max_seq_length=64, per_device_train_batch_size=2, learning_rate=1e-2, eval_fraction=0.1)
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        cache_dir=str(out.parent / "cache"),
        gpu="cpu",
        **{**defaults, **settings},
    )


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    return {
        line["step"]: line["eval_loss/library.jsonl"] for line in lines_of(out) if "eval_loss/library.jsonl" in line
    }


def test_the_best_model_is_kept_and_the_run_ends_when_none_is_better(make_checkpoint, corpus, tmp_path):
    """At a rate that soon is too high, the loss falls and rises again."""
    settings = dict(learning_rate=0.2, lr_scheduler_type="constant", max_steps=40, eval_steps=1, save_total_limit=1)
    out = tmp_path / "run"
    settings |= dict(early_stopping_patience=3, load_best_model_at_end=True)
    result = loop.train(config(make_checkpoint("llama"), corpus, out, **settings))
    losses = losses_of(out)
    losses.pop(0)  # nothing was trained then
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(1, best + 4)), "three evaluations that were no better end it"
    assert result.steps == best + 3 < 40
    assert result.eval_after == {"library.jsonl": losses[best]}, "what is said of the final model is measured on it"
    assert [one.step for one in list_checkpoints(out)] == [best, best + 3]
    kept, final, last = (
        load_file(out / name / "model.safetensors")
        for name in (f"checkpoint-{best}", "model", f"checkpoint-{best + 3}")
    )
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert not all(torch.equal(final[name], last[name]) for name in last)
    again = loop.train(config(make_checkpoint("llama"), corpus, out, resume=True, **settings))
    assert again.steps == best + 3, "a run that ended early is over"


def test_the_best_adapter_is_merged(make_checkpoint, corpus, tmp_path):
    settings = dict(learning_rate=0.3, lr_scheduler_type="constant", max_steps=2, eval_steps=1, trainable="lora")
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    model = make_checkpoint("llama")
    loop.train(config(model, corpus, merged, load_best_model_at_end=True, save_total_limit=9, **settings))
    losses = losses_of(merged)
    losses.pop(0)
    best = min(losses, key=losses.get)
    assert best == 1
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), merged / f"checkpoint-{best}")
    found = AutoModelForCausalLM.from_pretrained(merged / "model")(IDS).logits
    assert torch.allclose(found, adapter(IDS).logits, atol=1e-4)

    result = loop.train(config(model, corpus, alone, merge_lora=False, **settings))
    assert (result.model_dir / "adapter_config.json").is_file()
    assert not (result.model_dir / "model.safetensors").exists()
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), result.model_dir)
    last = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), alone / "checkpoint-2")
    assert torch.equal(adapter(IDS).logits, last(IDS).logits)


def test_a_finished_run_becomes_longer(make_checkpoint, corpus, tmp_path):
    settings = dict(lr_scheduler_type="constant", eval_fraction=0.0)
    model, short, whole = make_checkpoint("llama"), tmp_path / "short", tmp_path / "whole"
    loop.train(config(model, corpus, short, max_steps=2, **settings))
    with pytest.raises(ConfigError, match="is at step 2, and the run's length is now 1 step: make it longer"):
        loop.train(config(model, corpus, short, max_steps=1, resume=True, **settings))
    loop.train(config(model, corpus, short, max_steps=4, resume=True, **settings))
    loop.train(config(model, corpus, whole, max_steps=4, **settings))
    assert [line["step"] for line in lines_of(short)] == [1, 2, 3, 4]
    left, right = (load_file(out / "model" / "model.safetensors") for out in (short, whole))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_some_blocks_are_evaluated(make_checkpoint, corpus, tmp_path):
    model, losses = make_checkpoint("llama"), {}
    for most in (None, 10**6, 1, 3):
        out = tmp_path / str(most)
        settings = {} if most is None else {"max_eval_blocks": most}
        loop.train(config(model, corpus, out, max_steps=1, **settings))
        losses[most] = losses_of(out)
    assert losses[10**6] == losses[None]
    assert len({tuple(values.items()) for values in losses.values()}) == 3


def test_what_is_best_is_kept_between_runs():
    best = Best()
    assert best.judge(1, {"a": 3.0, "b": 1.0})
    assert not best.judge(2, {"a": 1.0, "b": 3.0})
    assert not best.judge(3, {"a": float("nan"), "b": 0.0})
    other = Best()
    other.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert other == best == Best(step=1, loss=2.0, worse=2)


@pytest.mark.parametrize("name", ["load_best_model_at_end", "early_stopping_patience"])
def test_without_evaluations_on_the_way(tmp_path, name):
    value = True if name == "load_best_model_at_end" else 2
    for settings in ({}, dict(eval_steps=1, eval_fraction=0.0)):
        with pytest.raises(ConfigError, match=f"{name} goes by evaluations on the way"):
            config("m", "d", tmp_path / "run", **{name: value} | settings)
