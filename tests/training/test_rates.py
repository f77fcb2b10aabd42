"""Rates that nobody gave: as published where something is, the same in every command, and never in place of what was given."""

import dataclasses
from types import SimpleNamespace

import pytest
import yaml
from tests.settings.commands import oomless
from tests.training.test_run import config as run_of
from tests.training.test_run import metrics

from oomless.catalogue import learning
from oomless.config import TrainConfig
from oomless.config.optimizer import OPTIMIZER_DEFAULTS
from oomless.errors import ConfigError
from oomless.training import loop, rates, resuming

BOTH = "lora+embed_tokens+lm_head"


def of(**settings):
    return TrainConfig.from_mapping({"model": "-", "data": "-", "output_dir": "-", **settings})


def wide(width):
    text = SimpleNamespace(hidden_size=width)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("settings", "width", "published", "of_embeddings"),
    [
        ({"trainable": "full"}, 4096, 2e-5, None),  # Alpaca 7B
        ({"trainable": "full"}, 5120, 1e-5, None),  # Alpaca 13B
        ({"trainable": "lora"}, 4096, 2e-4, None),  # QLoRA 7B
        ({"trainable": "lora"}, 6656, 1e-4, None),  # QLoRA 33B
        ({"trainable": "lora", "lora_r": 256}, 2000, 5e-4, None),  # LoRA Without Regret: whatever the rank
        ({"trainable": BOTH, "lora_r": 128, "use_rslora": True}, 4096, 5e-5, 1e-5),  # Unsloth's notebook
        ({"trainable": "embed_tokens+lm_head"}, 4096, 2e-4, None),  # Chinese LLaMA 7B
        ({"trainable": "embed_tokens", "trainable_rows": "5"}, 4096, 2e-4, None),
    ],
)
def test_they_are_near_what_is_published(settings, width, published, of_embeddings):
    found = rates.resolved(of(**settings), wide(width), 1000)
    assert published / 1.5 < found.learning_rate < published * 1.5
    if of_embeddings is None:
        assert found.embedding_learning_rate is None
    else:
        assert of_embeddings / 1.5 < found.embedding_learning_rate < of_embeddings * 1.5


def test_wider_models_have_smaller_ones_and_layers_beside_lora_those_of_layers():
    for trainable in ("full", "lora", "embed_tokens", "lm_head", "lora+model.norm", "model.layers.3.*"):
        found = [rates.resolved(of(trainable=trainable), wide(width)).learning_rate for width in range(64, 16384, 256)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 100 * found[-1]
    layers = [rates.resolved(of(trainable=trainable), wide(1024)) for trainable in ("full", "lora+model.norm")]
    assert layers[0].learning_rate == layers[1].learning_rate


def test_each_optimizer_has_its_own_and_decays_as_much_in_a_step():
    found = {name: rates.resolved(of(optimizer=name), wide(2048)) for name in OPTIMIZER_DEFAULTS}
    beside = {name: one.learning_rate / found["adamw"].learning_rate for name, one in found.items()}
    assert beside == pytest.approx(
        dict(dict.fromkeys(OPTIMIZER_DEFAULTS, 1), adafactor=2, apollo=2, muon=5, sgd=300), rel=0.05
    )
    decays = [one.learning_rate * one.weight_decay for one in found.values()]
    assert decays == pytest.approx([decays[0]] * len(decays), rel=0.05)
    assert found["adamw"].weight_decay == 0.1
    assert rates.resolved(of(trainable="lora"), wide(2048)).weight_decay == 0


def test_the_warm_up_is_a_share_between_two_numbers_of_steps():
    steps = {1: 0, 2: 1, 5: 1, 60: 6, 100: 10, 300: 10, 1000: 30, 5000: 150, 100_000: 200}
    assert {total: learning.warmup_steps(total) for total in steps} == steps
    assert [rates.resolved(of(), wide(64), total).warmup_ratio for total in (1, 2)] == [0.0, 0.5]


def test_what_is_given_is_not_altered():
    given = dict(learning_rate=3e-3, embedding_learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.0)
    config = of(trainable=BOTH, **given)
    assert rates.resolved(config, wide(2048), 1000) == config
    for left_out in given:
        others = {name: value for name, value in given.items() if name != left_out}
        found = rates.resolved(of(trainable=BOTH, **others), wide(2048), 1000)
        assert {name: getattr(found, name) for name in others} == others
        assert getattr(found, left_out) is not None
    assert rates.resolved(of(trainable=BOTH, learning_rate=3e-3), wide(2048)).embedding_learning_rate == 6e-4
    assert "the default" not in rates.said(config, wide(2048), 1000)


def test_a_run_of_an_earlier_version_keeps_its_one_rate():
    earlier = of(trainable=BOTH, learning_rate=2e-5, warmup_ratio=0.0, weight_decay=0.0)
    now = rates.kept(of(trainable=BOTH), earlier)
    assert [getattr(now, name) for name in rates.RATES] == [2e-5, 2e-5, 0.0, 0.0]
    assert rates.resolved(now, wide(64), 10) == now
    resuming.check_same_config(earlier, of(trainable=BOTH), ())
    resuming.check_same_config(earlier, now, ())
    for changed in ({"learning_rate": 1e-4}, {"embedding_learning_rate": 1e-4}, {"warmup_ratio": 0.5}):
        with pytest.raises(ConfigError, match=f"must keep {next(iter(changed))}"):
            resuming.check_same_config(earlier, of(trainable=BOTH, **changed), ())


def test_a_run_that_goes_on_keeps_them(make_checkpoint, corpus, tmp_path):
    left_open = dict(learning_rate=None, eval_fraction=0.0, max_seq_length=32, trainable=BOTH, lora_r=2)
    config = run_of(make_checkpoint("llama"), corpus, tmp_path, **left_open, max_steps=20, save_steps=2)
    loop.train(dataclasses.replace(config, max_steps=2))
    first = yaml.safe_load((tmp_path / "config.yaml").read_text())
    loop.train(dataclasses.replace(config, max_steps=4, resume=True))
    second = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {name: first[name] for name in rates.RATES} == {name: second[name] for name in rates.RATES}
    assert first["warmup_ratio"] == 0.5
    # What is logged is the rate of the layers, also where embeddings have another.
    assert metrics(tmp_path)[0]["learning_rate"] == pytest.approx(first["learning_rate"])


def test_every_command_says_and_does_the_same(make_checkpoint, corpus, tmp_path):
    model, pick = make_checkpoint("llama"), tmp_path / "pick.yaml"
    run = ("--model", model, "--data", corpus, "--gpu", "virtual:64MiB", "--max-steps", 12, "--eval-fraction", 0)
    run += ("--max-seq-length", 32, "--trainable", "lora", "--lora-r", 2)
    planned = oomless("plan", *run, "--json", "--write", pick)
    as_given = oomless("plan", *run, "--json", "--as-given")
    trained = oomless("train", "--config", pick, "--output-dir", tmp_path / "run")
    assert (planned.code, as_given.code, trained.code) == (0, 0, 0), planned.err + as_given.err + trained.err
    usual = rates.resolved(of(trainable="lora", lora_r=2), wide(64), 12)
    line = rates.said(usual, wide(64), 12)
    assert line.startswith(
        f"Learning rate {usual.learning_rate:g}; warm-up 2 of 12 steps, then cosine; weight decay 0: the"
    )
    assert planned.json["rates"] == as_given.json["rates"] == line
    assert line in " ".join(trained.out.split())
    done = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: done.get(name) for name in rates.RATES} == {name: getattr(usual, name) for name in rates.RATES}
    assert not set(rates.RATES) & set(yaml.safe_load(pick.read_text()))
    # Where there is no text, no number of steps is made up.
    alone = ("plan", "--model", model, "--gpu", "virtual:64MiB", "--max-seq-length", 32, *run[-4:], "--json")
    assert "warm-up" not in oomless(*alone).json["rates"]
    assert "warm-up" in oomless(*alone, "--tokens", "10k").json["rates"]
