"""Pictures of memory: what is drawn is what was held."""

import itertools
import re

import pytest

from oomless.report.charts import LEFT, RIGHT, WIDTH
from oomless.report.pictures import Dot, Held, choices, held_over_time, made_of
from oomless.units import GiB, MiB


def test_a_bar_is_as_wide_as_its_bytes():
    """Of 4 GiB a part of 1 GiB takes a quarter, and the limit lies at its own place."""
    drawn = made_of(
        "t",
        [("weights", GiB), ("none", 0), ("gradients", 2 * GiB)],
        [("the GPU has", 4.0 * GiB)],
        "reached in the loss",
    )
    whole = WIDTH - LEFT - RIGHT
    bars = [
        (float(x), float(width))
        for x, width in re.findall(r'class="area c\d" x="([\d.]+)" y="\d+" width="([\d.]+)"', drawn)
    ]
    assert bars == [pytest.approx((LEFT, whole / 4), abs=0.1), pytest.approx((LEFT + whole / 4, whole / 2), abs=0.1)]
    assert float(re.search(r'class="limit" x1="([\d.]+)"', drawn)[1]) == pytest.approx(LEFT + whole, abs=0.1)
    for said in (
        "weights: 1.00 GiB, 33.3%",
        "gradients: 2.00 GiB, 66.7%",
        "<td>together</td><td>3.00 GiB</td>",
        "<p>reached in the loss</p>",
    ):
        assert said in drawn
    assert "none" not in drawn


def test_the_highest_moment_of_many_is_drawn():
    """100,000 moments, of which one is high: it is among what the pointer reads, with what it was made of."""
    weights, rest = [MiB] * 100_000, [0] * 100_000
    rest[54_321] = 7 * MiB
    held = Held(
        title="t",
        bands=[("weights", weights), ("temporaries", rest)],
        moments=["forward"] * 100_000,
        limits=[("it has", 10.0 * MiB)],
    )
    drawn = held_over_time(held)
    assert drawn.count("temporaries 7.00 MiB") == 1
    assert "together 8.00 MiB" in drawn
    assert len(drawn) < 200_000


@pytest.mark.parametrize(("limit", "said"), [(10.0 * MiB, False), (1000.0 * MiB, True)])
def test_a_limit_far_above_is_told_in_words(limit, said):
    held = Held(title="t", bands=[("weights", [MiB, 2 * MiB])], moments=["load", "forward"], limits=[("it has", limit)])
    drawn = held_over_time(held)
    assert ("Far above the picture: it has 1000.00 MiB." in drawn) == said
    assert ('class="limit"' in drawn) != said


def test_nothing_held_and_one_choice_are_drawn():
    assert "<svg" in held_over_time(Held(title="t", bands=[("weights", [0])], moments=["load"]))
    drawn = choices("t", "w", [Dot(name="<b>", x=5.0, y=1.0, size=9, said="<i>", colour=0, picked=True)], str)
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert drawn.count("<circle") == 1


def test_names_of_choices_do_not_lie_over_each_other():
    dots = [Dot(name=f"n{n}", x=5.0, y=0.98 + 0.01 * (n % 3), size=9, said="", colour=0) for n in range(5)]
    heights = sorted(
        float(y) for y in re.findall(r'<text class="in" x="[\d.]+" y="([\d.]+)"', choices("t", "w", dots, str))
    )
    assert len(heights) == 5
    assert all(below - above >= 12 for above, below in itertools.pairwise(heights))
