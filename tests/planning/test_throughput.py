"""Predicted speed: a roofline that can be checked by hand, a range that contains itself, and what measured points change."""

from dataclasses import replace

import pytest

from oomless.catalogue import Gpu, gpu, gpus
from oomless.catalogue._data import read_yaml
from oomless.catalogue.efficiency import Efficiency, Measured, efficiency, efficiency_source, measured
from oomless.config import TrainConfig
from oomless.memory.work import Work
from oomless.models.spec import resolve_for_plan
from oomless.planning.plan import Target, plan, target_for
from oomless.planning.throughput import SPREAD, relative_seconds, speed_of, throughput

BOUNDS = ("low", "expected", "high")
WORK = Work(
    passes=2,
    of_passes=((("fp16", 10**12, 10**9), 4), (("fp32", 0, 10**9), 8), (("fp32", 0, 1000), 1000)),
    of_update=((("fp32", 0, 10**10), 1),),
    link_bytes_of_passes=10**9,
    link_bytes_of_update=2 * 10**9,
)


def config(**settings):
    return TrainConfig.from_mapping(
        {"model": "-", "data": "-", "output_dir": "-", "max_seq_length": 1000, "gradient_accumulation_steps": 6}
        | settings
    )


def target(found: Gpu | None) -> Target:
    return Target(name="-", capacity_bytes=1, outside_bytes=0, workspace_bytes=0, compute_capability=(8, 0), gpu=found)


def test_by_hand():
    """Each operator takes what is longest; the passes that were not rehearsed count; what is copied runs half beside."""
    t4 = gpu("T4")
    share = efficiency(t4, "expected")
    matrix, memory = 10**12 / (65e12 * share.matrix), 10**9 / (320e9 * share.memory)
    assert memory < matrix
    passes = 4 * matrix + 8 * memory + 1000 * share.operator_seconds
    update = 10 * memory
    link = t4.host_link_bytes_per_s * share.link
    copies = 10**9 / link, 2 * 10**9 / link
    assert copies[0] < passes
    assert copies[1] > update
    seconds = 3 * (passes + copies[0] / 2) + copies[1] + update / 2
    found = throughput(WORK, target(t4), config(), ())
    assert found.tokens_per_second == pytest.approx(6000 / seconds)
    assert found.basis == efficiency_source(t4)
    assert not found.calibrated


def test_several_gpus_by_hand():
    """All of them make tokens; what each sends goes beside its work, over NVLink where that comes with the GPU."""
    for name, rate in (("T4", gpu("T4").host_link_bytes_per_s), ("A100-80GB", 300e9)):
        found, share = gpu(name), efficiency(gpu(name), "expected")
        alone = replace(WORK, link_bytes_of_passes=0, link_bytes_of_update=0)
        seconds = 6000 / throughput(alone, target(found), config(), ()).tokens_per_second
        sent = 10**7  # in two of six passes
        pair = throughput(replace(alone, exchanged_bytes_of_passes=sent), replace(target(found), gpus=2), config())
        assert pair.tokens_per_second == pytest.approx(12000 / (seconds + 3 * sent / (rate * share.peers) / 2))
        assert "between GPUs assumed" in pair.basis


def test_several_machines_by_hand():
    """What each sends goes around a ring, whose slowest part is from machine to machine: 16 GPUs on two, with 1 GB/s between."""
    found, share, sent = gpu("A100-80GB"), efficiency(gpu("A100-80GB"), "expected"), 10**7
    alone = replace(WORK, link_bytes_of_passes=0, link_bytes_of_update=0)
    seconds = 6000 / throughput(alone, target(found), config(), ()).tokens_per_second
    both = replace(target(found), gpus=16, machines=2, network_bytes_per_s=1e9)
    pair = throughput(replace(alone, exchanged_bytes_of_passes=sent), both, config())
    assert pair.tokens_per_second == pytest.approx(96000 / (seconds + 3 * sent / (1e9 * share.network) / 2))
    assert "between machines assumed" in pair.basis


@pytest.mark.parametrize("name", ["T4", "H100", "24GiB"])
def test_machines_are_never_faster_than_one_and_slower_networks_never_faster(name):
    sent = replace(WORK, exchanged_bytes_of_passes=10**9, exchanged_bytes_of_update=10**9)
    one = relative_seconds(sent, target_for(f"16x{name}"), config())
    rates = [1e15, 400e9, 100e9, 12.5e9, 1.25e9, 1e8]
    times = [relative_seconds(sent, target_for(f"2x8x{name}", None, rate), config()) for rate in rates]
    assert [one, *times] == sorted([one, *times])
    assert times[0] == one
    assert times[-1] > one
    assumed = relative_seconds(sent, target_for(f"2x8x{name}"), config())
    assert one <= assumed < times[-1]


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_a_gpu_of_two_machines_holds_what_it_holds_in_one(sharding):
    """To the byte; and it computes and sends the same. While it is built DTensor asks once for shapes, which the books take for memory."""
    spec = resolve_for_plan("SmolLM2-135M")
    run = config(model=spec.name, max_seq_length=512, gradient_accumulation_steps=1, sharding=sharding)
    one, two = (plan(spec, run, target_for(name)) for name in ("16xH100", "2x8xH100"))
    held, beside = (
        {
            name: (phase.allocated_bytes, phase.reserved_bytes)
            for name, phase in found.profile.phases.items()
            if name != "load"
        }
        for found in (one, two)
    )
    assert beside == held
    assert two.profile.peak_bytes_by_category == one.profile.peak_bytes_by_category
    assert (two.needed_bytes, two.work) == (one.needed_bytes, one.work)
    assert two.work.exchanged_bytes_of_passes + two.work.exchanged_bytes_of_update > 0
    assert abs(two.target.host_bytes - 2 * one.target.host_bytes) <= 1  # of each machine eight processes take a part
    over_network = replace(two, target=replace(two.target, network_bytes_per_s=12.5e9))
    together, assumed, slower = (speed_of(found, run).tokens_per_second for found in (one, two, over_network))
    assert slower < assumed <= together


@pytest.mark.parametrize("entry", gpus(), ids=lambda entry: entry.name)
def test_the_range_contains_itself(entry):
    found = throughput(WORK, target(entry), config())
    assert 0 < found.tokens_per_second_low < found.tokens_per_second < found.tokens_per_second_high
    fewest, most = found.hours(36_000_000)
    assert fewest == pytest.approx(10_000 / found.tokens_per_second_high)
    assert most == pytest.approx(10_000 / found.tokens_per_second_low)
    assert found.basis


@pytest.mark.parametrize(
    "better",
    [
        {"bandwidth_bytes_per_s": 640e9},
        {"peak_flops": {"fp32": 8.1e12, "fp16": 130e12}},
        {"pcie": (4, 16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_better_gpu_is_faster(better):
    slow, fast = (throughput(WORK, target(card), config()) for card in (gpu("T4"), replace(gpu("T4"), **better)))
    assert fast.tokens_per_second_low > slow.tokens_per_second_low
    assert fast.tokens_per_second > slow.tokens_per_second
    assert fast.tokens_per_second_high > slow.tokens_per_second_high


def test_more_work_takes_longer():
    more = replace(WORK, of_passes=(*WORK.of_passes, (("fp16", 10**12, 0), 1)))
    for place in (target(gpu("T4")), target(None)):
        assert relative_seconds(more, place, config()) > relative_seconds(WORK, place, config())
        twice = replace(WORK, link_bytes_of_passes=10**11)
        assert relative_seconds(twice, place, config()) > relative_seconds(WORK, place, config())


def test_a_dtype_without_hardware_runs_in_fp32():
    """A T4 has no bf16."""
    works = [replace(WORK, of_passes=(((rate, 10**12, 0), 1),)) for rate in ("fp16", "bf16", "fp32")]
    half, brain, full = (throughput(work, target(gpu("T4")), config()).tokens_per_second for work in works)
    assert brain == full < half


@pytest.mark.parametrize("name", ["24GiB", "virtual:256MiB"])
def test_no_speed_is_made_up_for_a_gpu_of_unknown_rates(name):
    place = target_for(name)
    assert throughput(WORK, place, config()) is None
    assert relative_seconds(WORK, place, config()) > 0


def test_measured_points_scale_the_prediction_and_its_range():
    plain = throughput(WORK, target(gpu("T4")), config(), ())
    points = [Measured(predicted=100.0, measured=ratio * 100, source="bench/gpu.py") for ratio in (0.5, 0.8, 0.9)]
    found = throughput(WORK, target(gpu("T4")), config(), points)
    assert found.calibrated
    assert found.tokens_per_second == pytest.approx(0.8 * plain.tokens_per_second)
    assert found.tokens_per_second_low == pytest.approx(0.5 * plain.tokens_per_second * (1 - SPREAD))
    assert found.tokens_per_second_high == pytest.approx(0.9 * plain.tokens_per_second * (1 + SPREAD))
    assert found.basis == "3 measured points on T4: bench/gpu.py"


def test_measured_points_are_read_for_their_gpu(monkeypatch):
    data = read_yaml("efficiency.yaml")
    entries = [{"gpu": name, "predicted": 10, "measured": 9, "source": "here"} for name in ("T4", "L4", "T4")]
    monkeypatch.setitem(data, "measured", entries)
    assert measured(gpu("T4")) == (Measured(predicted=10, measured=9, source="here"),) * 2
    assert throughput(WORK, target(gpu("T4")), config()).calibrated
    assert not throughput(WORK, target(gpu("A100-80GB")), config()).calibrated


def test_the_catalogue_s_efficiencies_are_shares_in_order():
    data = read_yaml("efficiency.yaml")
    assert set(data["gpus"]) <= {entry.name for entry in gpus()}
    for entry in gpus():
        low, expected, high = (efficiency(entry, bound) for bound in BOUNDS)
        for name in ("matrix", "memory", "link", "peers", "network"):
            assert 0 < getattr(low, name) < getattr(expected, name) < getattr(high, name) < 1
        assert low.operator_seconds > expected.operator_seconds > high.operator_seconds > 0
        assert isinstance(low, Efficiency)
    for point in data["measured"]:
        assert gpu(point["gpu"]).name == point["gpu"]
        assert point["predicted"] > 0
        assert point["measured"] > 0
        assert point["source"]


def test_what_saves_memory_costs_time():
    """On the real thing: checkpointing is slower than keeping, offloading slower still, and lm_head alone the fastest."""
    spec, place = resolve_for_plan("SmolLM2-135M"), target_for("T4")

    def seconds(**settings):
        run = config(model=spec.name, max_seq_length=512, gradient_accumulation_steps=1, dtype="fp16", **settings)
        return relative_seconds(plan(spec, run, place).work, place, run)

    kept = seconds(optimizer="adamw")
    again = seconds(optimizer="adamw", gradient_checkpointing=True)
    offloaded = seconds(optimizer="adamw", gradient_checkpointing=True, offload_optimizer=True)
    assert seconds(trainable="lm_head", tied_weights="untied") < kept < again < offloaded
