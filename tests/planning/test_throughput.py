"""The predicted speed: a range that contains itself, follows the GPU's rates, and gives way to measured points."""

from dataclasses import replace

import pytest

from oomless.catalogue.efficiency import Measured, efficiency
from oomless.config import TrainConfig
from oomless.memory.work import Work
from oomless.planning.plan import target_for
from oomless.planning.throughput import relative_seconds, throughput

CONFIG = TrainConfig.from_mapping({"model": "m", "data": "-", "output_dir": "-", "max_seq_length": 1000})


def work(flops=10**13, moved=10**9, link=0, passes=1):
    return Work(
        passes=passes,
        of_passes=((("fp16", flops, moved), 10),),
        of_update=((("fp32", 0, 10**9), 5),),
        link_bytes_of_passes=link,
        link_bytes_of_update=0,
    )


def test_by_hand():
    """Ten products bound by arithmetic and five updates bound by memory, at the expected efficiency."""
    target = target_for("T4")
    share = efficiency(target.gpu, "expected")
    seconds = 10 * 10**13 / (65e12 * share.matrix) + 5 * 10**9 / (320e9 * share.memory)
    assert throughput(work(), target, CONFIG).tokens_per_second == pytest.approx(1000 / seconds)


@pytest.mark.parametrize("gpu", ["T4", "RTX4090", "A100-40G", "L4", "P100"])
def test_the_range_contains_what_is_expected(gpu):
    found = throughput(work(link=10**9), target_for(gpu), CONFIG)
    assert found.tokens_per_second_low < found.tokens_per_second < found.tokens_per_second_high
    assert "assumed" in found.basis
    assert not found.calibrated
    fewest, most = found.hours(3_600_000)
    assert fewest == pytest.approx(1000 / found.tokens_per_second_high)
    assert fewest < most


def test_more_work_is_slower_and_better_rates_are_faster():
    target = target_for("T4")
    plain = relative_seconds(work(), target, CONFIG)
    assert relative_seconds(work(flops=2 * 10**13), target, CONFIG) > plain
    assert relative_seconds(work(link=10**11), target, CONFIG) > plain
    wider = replace(target, gpu=replace(target.gpu, bandwidth_bytes_per_s=1e12))
    assert relative_seconds(work(), wider, CONFIG) < plain


def test_passes_that_were_not_rehearsed_count():
    many = replace(CONFIG, gradient_accumulation_steps=8)
    target, update = target_for("T4"), 5 * 10**9 / (320e9 * efficiency(target_for("T4").gpu, "expected").memory)
    of_two = 8000 / throughput(work(passes=2), target, many).tokens_per_second
    of_one = 8000 / throughput(work(passes=1), target, many).tokens_per_second
    assert (of_one - update) == pytest.approx(2 * (of_two - update))


def test_unknown_rates_give_no_figure_but_an_order():
    target = target_for("24GiB")
    assert throughput(work(), target, CONFIG) is None
    assert relative_seconds(work(), target, CONFIG) < relative_seconds(work(flops=10**14), target, CONFIG)


def test_measured_points_replace_the_range():
    points = [
        Measured(predicted=100.0, measured=80.0, source="a run"),
        Measured(predicted=100.0, measured=90.0, source="a run"),
    ]
    free, scaled = (throughput(work(), target_for("T4"), CONFIG, p) for p in ([], points))
    assert scaled.calibrated
    assert scaled.tokens_per_second == pytest.approx(0.85 * free.tokens_per_second)
    assert scaled.tokens_per_second_low == pytest.approx(0.8 * free.tokens_per_second)
    assert "2 measured points on T4: a run" in scaled.basis
