"""A check of the GPU finds what is wrong, and what it measured is used and named."""

import subprocess
import sys

import pytest

from oomless.calibration import parts
from oomless.calibration.check import _judged, check
from oomless.calibration.points import Point
from oomless.catalogue import calibration, gpu, overhead
from oomless.catalogue.calibration import Calibration
from oomless.catalogue.efficiency import measured
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.memory.work import Work
from oomless.planning.plan import target_for
from oomless.planning.throughput import throughput

MiB = 1 << 20
FOUND = Calibration(
    gpu="T4", made="2026-11-30, torch 2.13.0", outside_bytes=200 * MiB, speeds=((1000, 900), (500, 400)), rates={}
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_virtual_gpu_does_what_is_predicted_and_is_not_kept(cache):
    heard = []
    gpu_here = VirtualGPU(1 << 32)
    found = check(gpu_here, target_for("virtual:4GiB"), seconds=0, heard=heard.append)
    assert found.right
    assert [finding.part for finding in found.findings] == ["allocator", "attention", "operators", "updates", "peaks"]
    (point,) = found.points
    assert (point.allocated_error, point.reserved_error) == (0, 0)
    assert point.measured_allocated_bytes > MiB
    assert point.measured_tokens_per_second > 0
    assert found.untried == 9
    assert heard == ["allocator", "attention", "operators", "updates", "rates", "SmolLM2-135M, full"]
    assert found.calibration is None
    assert not list(cache.rglob("calibrations"))
    assert set(found.rates) == {"fp32 products", "fp16 products", "bf16 products", "memory", "to the host"}


def test_another_allocator_is_noticed():
    other = VirtualGPU(1 << 32, settings=AllocatorSettings.parse("roundup_power2_divisions:4"))
    with other.active(), pytest.raises(RuntimeError, match="after request .* simulated"):
        parts.allocator(other)


def test_a_kernel_that_lets_documents_see_each_other_is_noticed(monkeypatch):
    whole = parts.packed_attention
    monkeypatch.setattr(parts, "packed_attention", lambda *states, scale, **documents: whole(*states, scale=scale))
    device = VirtualGPU(1 << 32)
    with device.active(), pytest.raises(RuntimeError, match="attention in float32 is .* times as far off"):
        parts.attention(device)


def test_a_loss_that_is_off_by_a_thousandth_is_noticed(monkeypatch):
    right = parts.linear_cross_entropy
    monkeypatch.setattr(parts, "linear_cross_entropy", lambda *args, **how: right(*args, **how) * 1.001)
    device = VirtualGPU(1 << 32)
    with device.active(), pytest.raises(RuntimeError, match="the loss in float32"):
        parts.operators(device)


def point(measured, **more):
    figures = {"predicted_allocated_bytes": 1000, "predicted_reserved_bytes": 1000, "predicted_tokens_per_second": None}
    return Point(
        name="one", fits=True, **figures, measured_allocated_bytes=measured, measured_reserved_bytes=1000, **more
    )


@pytest.mark.parametrize(
    ("points", "right"),
    [
        ([point(1000)], True),
        ([point(1000), point(1009)], True),
        ([point(1000), point(1011)], False),
        ([point(1000), point(0, error="CUDA out of memory")], False),
    ],
)
def test_a_peak_that_is_missed_by_more_than_a_hundredth_is_wrong(points, right):
    assert _judged(points).right == right


def test_what_cannot_be_kept_is_not_said_to_be(tmp_path, monkeypatch):
    (tmp_path / "oomless").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.keep(FOUND) is None


def test_what_was_measured_outranks_the_catalogue_and_is_named(cache):
    before = target_for("T4")
    where = calibration.keep(FOUND)
    assert calibration.calibration("T4") == FOUND
    target = target_for("T4")
    assert target.outside_bytes == 200 * MiB
    assert target.margin_bytes < before.margin_bytes  # nothing of it is uncertain now
    assert any(FOUND.source in note for note in target.notes)
    assert [(point.predicted, point.measured) for point in measured(gpu("T4"))] == [(1000, 900), (500, 400)]
    config = _config()
    free, scaled = throughput(WORK, before, config, ()), throughput(WORK, target, config)
    assert scaled.tokens_per_second == pytest.approx(free.tokens_per_second * 0.85)
    assert scaled.calibrated
    assert FOUND.source in scaled.basis
    assert measured(gpu("L4")) == ()
    # Damaged, it is as if there were none.
    for text in ("{", "[]", '{"gpu": "T4"}', '{"gpu": "T4", "speeds": 3}'):
        with open(where, "w", encoding="utf-8") as file:
            file.write(text)
        assert overhead("context", gpu("T4")).bytes_expected == before.outside_bytes
        assert measured(gpu("T4")) == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "cpu"), "check-gpu is for a GPU, and the CPU is none"),
        (("--gpu", "virtual:4GiB", "--minutes", "0"), "minutes must be above 0; got 0"),
        (("--gpu", "virtual:64MiB"), "a check asks for up to 1.00 GiB, and 64.00 MiB of"),
    ],
)
def test_what_cannot_be_checked_is_one_error(arguments, said):
    done = subprocess.run([sys.executable, "-m", "oomless", "check-gpu", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")


WORK = Work(
    passes=1,
    of_passes=((("fp16", 10**12, 10**9), 3),),
    of_update=((("fp32", 0, 10**9), 2),),
    link_bytes_of_passes=0,
    link_bytes_of_update=0,
)


def _config():
    from oomless.config import TrainConfig

    return TrainConfig.from_mapping({"model": "m", "data": "-", "output_dir": "-", "max_seq_length": 512})
