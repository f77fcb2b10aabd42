"""More of anything that a plan rests on never gives a worse answer: whole searches, in pairs."""

import random
from dataclasses import dataclass, replace

import pytest
from tests.planning.test_wish import scores

from oomless.catalogue import gpu
from oomless.models.spec import resolve
from oomless.planning.plan import Target
from oomless.planning.search import WORTH_A_TRIAL, search
from oomless.planning.wish import Wish

MiB = 1 << 20
SMALL = 2000
"""A small model is as busy on a GPU of so many times lower rates as a real one is on a real one."""

DEFAULT = (1, 35, 48, 58, 84)
"""Pairs that every run asks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, in what may be more or less."""

    capacity_bytes: int
    host_bytes: int
    hours: float
    length: int


def questions():
    """(number, architecture, tied, pins, what is asked, what is asked with more of one thing) from a seed."""
    draw = random.Random(3)
    for number in range(200):
        asked = Asked(
            capacity_bytes=draw.randrange(4, 16) * 2 * MiB,
            host_bytes=draw.choice([0, 4, 16, 64]) * MiB,
            hours=10 ** draw.uniform(-2, 1),
            length=draw.choice([128, 256]),
        )
        more = (
            replace(asked, capacity_bytes=asked.capacity_bytes + draw.randrange(1, 9) * 2 * MiB),
            replace(asked, host_bytes=asked.host_bytes + draw.choice([4, 16, 64]) * MiB),
            replace(asked, hours=asked.hours * draw.uniform(1.1, 5)),
            replace(asked, length=asked.length // 2),
        )[number % 4]
        pins = draw.choice([{}, {"trainable": "full"}, {"gradient_checkpointing": False}, {"optimizer": "adamw_8bit"}])
        marks = () if number in DEFAULT else pytest.mark.full_length
        yield pytest.param(
            draw.choice(["llama", "gemma", "qwen3", "mixtral"]),
            draw.random() < 0.5,
            pins,
            asked,
            more,
            id=str(number),
            marks=marks,
        )


def answered(spec, pins, asked):
    """Return the search's answer for ``asked``."""
    known = gpu("T4")
    slow = replace(
        known,
        bandwidth_bytes_per_s=known.bandwidth_bytes_per_s / SMALL,
        peak_flops={name: rate / SMALL for name, rate in known.peak_flops.items()},
    )
    target = Target(
        name="a small GPU",
        capacity_bytes=asked.capacity_bytes,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(7, 5),
        gpu=slow,
        host_bytes=asked.host_bytes,
    )
    given = {
        "model": spec.name,
        "data": "-",
        "output_dir": "-",
        "packing": "concatenate",
        "max_seq_length": asked.length,
    }
    wish = Wish(tokens=1_000_000, hours=asked.hours)
    return search(spec, given | {"tokens_per_step": 1024} | pins, target, processes=1, wish=wish)


def worth(found):
    """Return how good the answers by quality and in balance are; nothing where nothing fits."""
    return {"quality": 0.0, "balanced": 0.0} if found.picked is None else scores(found.wish, found.named)


@pytest.mark.parametrize(("architecture", "tied", "pins", "asked", "more"), list(questions()))
def test_more_never_gives_a_worse_answer(make_checkpoint, architecture, tied, pins, asked, more):
    """A larger GPU, more host memory, more hours, or a shorter sequence."""
    spec = resolve(str(make_checkpoint(architecture, tied=tied, hidden_size=128, intermediate_size=384)))
    before, after = (answered(spec, pins, one) for one in (asked, more))
    if asked.hours != more.hours:  # the same hours ask for the same: both are measured by the longer
        before = replace(before, wish=after.wish)
    was, now = worth(before), worth(after)
    for name in was:
        assert now[name] >= was[name] * (1 - WORTH_A_TRIAL), name
