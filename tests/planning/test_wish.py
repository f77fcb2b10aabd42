"""What is preferred among strategies that fit: by what a token teaches, by time, and within the hours that there are."""

import importlib
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from oomless.catalogue import learning
from oomless.catalogue._data import read_yaml
from oomless.cli.app import app
from oomless.cli.options import given_settings
from oomless.config import TrainConfig
from oomless.models.spec import resolve_for_plan
from oomless.planning.choice import Choice
from oomless.planning.choose import with_batch
from oomless.planning.given import host_size, read_given, wish_of
from oomless.planning.plan import target_for
from oomless.planning.row import Row
from oomless.planning.strategies import (
    FROZEN_BITS,
    OPTIMIZERS,
    PARTS,
    UNPLANNED,
    WEIGHT_PRECISIONS,
    Quality,
    in_words,
)
from oomless.planning.throughput import Throughput
from oomless.planning.wish import Wish
from oomless.report.choice import answer, print_choice
from oomless.report.screen import Screen

MILLION = 10**6


def quality(trainable="full", quantization=None, optimizer="adamw", weight_precision="master", clips=True):
    return Quality(
        trainable=trainable,
        tied_weights=None,
        quantization=quantization,
        optimizer=optimizer,
        weight_precision=weight_precision,
        clips=clips,
    )


def row(tokens_per_second, **given_up):
    return Row(quality=quality(**given_up), settings={}, fits=True, needed_bytes=1, seconds=1 / tokens_per_second)


FULL, LORA, HEAD = row(200), row(400, trainable="lora+embed_tokens+lm_head"), row(900, trainable="lm_head")
QLORA = row(450, trainable="lora", quantization="nf4")
ROWS = [FULL, LORA, QLORA, HEAD]


def named(rows=ROWS, **wish):
    return Wish(**wish).choices(rows)


def test_each_preference_has_its_own_answer():
    found = named(tokens=100 * MILLION)
    assert found == {
        "quality": FULL,
        "balanced": LORA,
        "fast": QLORA,
    }  # the head alone learns too little to be an answer


def test_full_training_is_balanced_where_it_is_almost_as_fast():
    assert named([row(350), LORA], tokens=100 * MILLION)["balanced"].quality == FULL.quality


def test_of_a_long_text_lora_takes_up_less():
    assert named([row(250), LORA], tokens=100 * MILLION)["balanced"] is LORA
    assert named([row(250), LORA], tokens=10_000 * MILLION)["balanced"].quality == FULL.quality


def test_within_the_hours_the_whole_text_through_lora_is_worth_more_than_half_of_it_in_full():
    text = 100 * MILLION
    assert named(tokens=text, hours=text / 200 / 3600)["quality"] is FULL  # there is time for it
    assert named(tokens=text, hours=text / 400 / 3600)["quality"] is LORA
    # With time enough for all of them a fourth is not worth giving up for twice the speed, but a hundredth is.
    assert named(tokens=text, hours=1000)["balanced"] is FULL
    leaner = row(1 / LORA.seconds, optimizer="adamw_8bit")
    assert named([FULL, leaner], tokens=text, hours=1000)["balanced"] is leaner


def test_of_what_has_less_state_the_one_that_teaches_as_much_with_least_is_enough():
    """Bytes for a parameter: those of moments, and of what keeps small updates."""
    moments = {"adamw": 8, "adamw_8bit": 2, "apollo": 1, "adafactor": 0}
    kept = {"master": 4, "correction": 1, "stochastic": 0}

    def state(one):
        return moments[one.optimizer] + kept[one.weight_precision]

    every = [quality(optimizer=optimizer, weight_precision=precision) for optimizer in moments for precision in kept]
    found = Wish().leaner(every[0], [*every[1:], quality(clips=False), quality("lora")], state)
    assert [(one.optimizer, one.weight_precision) for one in found] == [
        ("adamw", "correction"),
        ("adamw_8bit", "correction"),
        ("adamw_8bit", "stochastic"),
        ("adafactor", "correction"),
        ("adafactor", "stochastic"),
    ]


@st.composite
def rows(draw):
    parts = st.sampled_from([(name, None) for name in PARTS] + [("lora", "nf4"), ("lora", "int8")])
    found = []
    for trainable, bits in draw(st.lists(parts, min_size=1, max_size=8)):
        given_up = {
            "optimizer": draw(st.sampled_from(OPTIMIZERS)),
            "weight_precision": draw(st.sampled_from(WEIGHT_PRECISIONS)),
        }
        found.append(
            row(draw(st.floats(1, 1e5)), trainable=trainable, quantization=bits, clips=draw(st.booleans()), **given_up)
        )
    return found


def scores(wish, answers):
    """Return how good the ``answers`` by quality and in balance are: what one teaches in all; that for its time."""
    worth = {name: wish.share(one) for name, one in answers.items()}
    read = {name: wish.tokens_read(one) if wish.hours else 1 for name, one in answers.items()}
    weight = learning.constant("weight_of_what_is_given_up")
    asked = wish.tokens / wish.hours / 3600 if wish.tokens and wish.hours else math.inf
    speed = 1 / answers["balanced"].seconds
    speed = min(speed, asked) * max(1, speed / asked) ** learning.constant("weight_of_spare_speed")
    return {"quality": worth["quality"] * read["quality"], "balanced": worth["balanced"] ** weight * speed}


@settings(max_examples=200, deadline=None)
@given(rows(), rows(), st.none() | st.integers(1, 10**10), st.none() | st.floats(0.1, 1e4), st.floats(1, 100))
def test_more_that_fits_and_more_hours_never_give_a_worse_answer(some, more, tokens, hours, times):
    """A larger GPU, more host memory and a shorter sequence let more fit, and nothing slower."""
    wish = Wish(tokens=tokens, hours=hours)

    def best(wish, found):
        return scores(wish, wish.choices(found))

    before, after = best(wish, some), best(wish, some + more)
    for name, score in before.items():
        assert after[name] >= score * (1 - 1e-9), name
    faster = [replace(one, seconds=one.seconds / times) for one in some]
    if tokens is not None:  # else a text without an end grows with the speed
        assert best(wish, faster)["balanced"] >= before["balanced"] * (1 - 1e-9)
        if hours is not None:
            longer = replace(wish, hours=hours * times)
            assert best(longer, some)["quality"] >= before["quality"] * (1 - 1e-9)


def test_every_strategy_has_a_share_with_its_source():
    data = read_yaml("learning.yaml")
    for kind, names in (
        ("trainable", PARTS),
        ("quantization", [name for name in FROZEN_BITS if name]),
        ("optimizer", OPTIMIZERS),
        ("weight_precision", WEIGHT_PRECISIONS),
    ):
        assert set(names) <= set(data[kind])
    for one in Wish(tokens=1).given_up(row(1, trainable="lora", quantization="nf4", optimizer="apollo", clips=False)):
        assert one.evidence in {"measured", "published", "thin", "assumed"}
        assert one.source


def test_a_share_lies_between_those_of_the_lengths_beside_it():
    at = [Wish(tokens=tokens).share(LORA) for tokens in (1, 10 * MILLION, 30 * MILLION, 100 * MILLION, 10**12)]
    assert at[0] == at[1]
    assert at == sorted(at, reverse=True)
    assert at[1] > at[2] > at[3]


@pytest.mark.parametrize(
    ("tokens", "length", "gpus", "blocks"),
    [
        (100 * MILLION, 2048, 1, 32),
        (10**10, 2048, 1, 32),
        (1000, 2048, 1, 1),
        (50 * MILLION, 2048, 2, 16),
        (None, 65536, 1, 1),
        (None, 2048, 3, 24),
    ],
)
def test_a_step_has_as_many_blocks_as_leave_a_thousand_steps(tokens, length, gpus, blocks):
    found, wish = with_batch({**UNPLANNED, "model": "-", "max_seq_length": length}, Wish(tokens=tokens), gpus)
    assert found["tokens_per_step"] == blocks * length
    assert wish.tokens == tokens
    assert TrainConfig.from_mapping(found).blocks_per_step == blocks


@pytest.mark.parametrize(
    "said",
    [
        {"tokens_per_step": 4096},
        {"gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2},
        {"max_steps": 3},
    ],
)
def test_what_is_said_of_a_step_is_kept(said):
    given_settings = {**UNPLANNED, "model": "-", "max_seq_length": 2048, **said}
    assert with_batch(given_settings, Wish(tokens=100 * MILLION), 1)[0] == given_settings


def test_the_text_is_counted_from_what_the_run_says(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 60 * 10**6)
    base = {**UNPLANNED, "model": "-", "max_seq_length": 2048}
    found, wish = with_batch({**base, "data": [{"path": str(tmp_path)}]}, Wish(), 1)
    assert wish.tokens == 16 * MILLION
    assert "3 to 5 bytes a token, assumed" in wish.basis
    assert found["tokens_per_step"] == 4 * 2048
    assert with_batch({**base, "max_tokens": 4 * 2048}, Wish(), 1)[1].tokens == 4 * 2048
    assert in_words(found) == "1 block"
    # What belongs to a choice that is still open is no contradiction yet.
    assert (
        with_batch({**base, "max_tokens": 4 * 2048, "lora_r": 8, "checkpointed_layers": 2}, Wish(), 1)[0]["lora_r"] == 8
    )


def test_the_twenty_wishes_are_commands_that_plan_takes(monkeypatch):
    """Those of bench/wishes.py, whose answers are judged."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    cases = importlib.import_module("wishes").CASES
    command = typer.main.get_command(app).commands["plan"]
    assert len({tuple(case.arguments()) for case in cases}) == 20
    for case in cases:
        said = command.make_context("plan", case.arguments()[1:]).params
        of_settings = {name: said[name] for name in TrainConfig.__dataclass_fields__ if said[name]}
        pins = read_given(given_settings(None, of_settings))
        assert wish_of(said["prefer"], said["tokens"], said["hours"], pins)["tokens"] >= 5 * MILLION
        target = target_for(pins["gpu"], host_size(said["host_memory"]))
        assert target.gpu.bandwidth_bytes_per_s  # else hours are refused
        assert resolve_for_plan(pins["model"]).config.model_type


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (100, ""),
        (20, " That may be more than the 20 h that there are."),
        (4.5, " In the 4.5 h that there are it reads 1.62M to 3.24M of them."),
    ],
)
def test_too_few_hours_are_said(hours, said):
    """At 100 to 200 tokens a second 10 million take 14 to 28 hours."""
    speed = Throughput(
        tokens_per_second_low=100, tokens_per_second=150, tokens_per_second_high=200, basis="", calibrated=False
    )
    picked = replace(FULL, picked=True, speed=speed)
    wish, target = Wish(tokens=10 * MILLION, hours=hours), target_for("T4")
    choice = Choice(model="m", target=target, given={}, rows=(picked,), config=None, plan=None, trials=0, wish=wish)
    assert answer(choice) == ("m on T4: full, AdamW, fp32 masters", f". 10M tokens take 14-28 h, predicted.{said}")


def test_what_lacks_the_same_is_said_once_nearest_miss_first():
    def short(needed_bytes, **given_up):
        return Row(quality=quality(**given_up), settings={}, fits=False, needed_bytes=needed_bytes, reason="why")

    rows = (
        short(40 << 30),
        short(40 << 30, clips=False),
        short(20 << 30, trainable="lora"),
        short(30 << 30, optimizer="apollo"),
    )
    target = target_for("T4")
    choice = Choice(model="m", target=target, given={}, rows=rows, config=None, plan=None, trials=0, wish=Wish())
    shown = io.StringIO()
    print_choice(Screen(shown, width=80), choice)
    lines = [line for line in shown.getvalue().splitlines() if "GiB" in line]
    assert [line.partition(",")[0] for line in lines] == ["lora", "full", "full"]
    assert ["APOLLO" in line for line in lines] == [False, True, False]
    assert "and 1 more, which need as much or more" in shown.getvalue()
