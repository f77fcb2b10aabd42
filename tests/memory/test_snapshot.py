"""Snapshots: read by torch's own readers, replayed, and (where there is a GPU) compared with a real process."""

import gc
import os
import pickle
import pickletools
import random
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz

from oomless.memory.allocator import CachingAllocator
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.snapshot import replay, snapshot, write_snapshot
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.units import GiB, MiB

TEXTS = ["", "expandable_segments:True", "max_split_size_mb:32,roundup_power2_divisions:[4:2,>:8]"]


def worked(text="", **options):
    """An allocator with history: two blocks live, one waiting, one freed, one request failed."""
    allocator = CachingAllocator(100 * MiB, AllocatorSettings.parse(text), record_history=True, **options)
    allocator.allocate(3 * MiB, note="aten.mm in layers.0", category="weights")
    freed = allocator.allocate(5 * MiB, stream=4)
    waiting = allocator.allocate(1000)
    allocator.record_stream(waiting, 4)
    allocator.free(waiting)
    allocator.allocate(700)
    allocator.free(freed)
    with pytest.raises(torch.OutOfMemoryError):
        allocator.allocate(90 * MiB, note="aten.cat")
    return allocator


def actions(allocator):
    return [event.action for event in allocator.history]


def test_the_history_in_the_order_of_torch():
    assert actions(worked()) == [
        *("segment_alloc", "alloc", "segment_alloc", "alloc", "segment_alloc", "alloc", "free_requested", "alloc"),
        *("free_requested", "free_completed"),
        *("free_completed", "segment_free", "oom"),  # the failure waits for streams and gives the cache back
    ]
    assert "segment_map" in actions(worked("expandable_segments:True"))
    assert "segment_unmap" in actions(worked("expandable_segments:True"))


def test_large_segments_go_back_before_small_ones():
    allocator = CachingAllocator(GiB, record_history=True)
    for block in [allocator.allocate(size) for size in (1, 2 * MiB)]:
        allocator.free(block)
    allocator.empty_cache()
    given_back = [event.size_bytes for event in allocator.history if event.action == "segment_free"]
    assert given_back == [20 * MiB, 2 * MiB]


def test_the_history_can_be_bounded_or_left_out():
    assert actions(worked(history_limit=2)) == ["segment_free", "oom"]
    allocator = CachingAllocator(GiB)
    allocator.allocate(1)
    assert allocator.history is None
    assert snapshot(allocator)["device_traces"] == [[]]


@pytest.mark.parametrize("text", TEXTS)
def test_sizes_of_segments(text):
    allocator = worked(text)
    data = snapshot(allocator)
    assert sum(segment["total_size"] for segment in data["segments"]) == allocator.statistics.reserved.current
    assert sum(segment["allocated_size"] for segment in data["segments"]) == allocator.statistics.allocated.current
    assert sum(segment["active_size"] for segment in data["segments"]) == allocator.statistics.active.current
    assert sum(segment["requested_size"] for segment in data["segments"]) == allocator.statistics.requested.current
    for segment in data["segments"]:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    frames = [block["frames"] for segment in data["segments"] for block in segment["blocks"]]
    assert [{"filename": "simulated", "line": 0, "name": "aten.mm in layers.0"}] in frames


def test_a_category_is_named_for_every_event_or_for_none():
    trace = snapshot(worked())["device_traces"][0]
    assert {entry["category"] for entry in trace} == {"weights", "unknown"}
    allocator = CachingAllocator(GiB, record_history=True)
    allocator.allocate(1)
    assert not any("category" in entry for entry in snapshot(allocator)["device_traces"][0])


def test_times_rise():
    times = [entry["time_us"] for entry in snapshot(worked())["device_traces"][0]]
    assert times == sorted(set(times))


@pytest.mark.parametrize("text", TEXTS)
def test_torch_reads_it(tmp_path, text):
    allocator = worked(text)
    write_snapshot(allocator, tmp_path / "run.pickle")
    data = pickle.loads((tmp_path / "run.pickle").read_bytes())
    assert data == snapshot(allocator)
    summary = _memory_viz.segsum(data)
    assert f"segments: {len(allocator.segments())}\n" in summary
    assert re.search(rf"total_reserved: {allocator.statistics.reserved.current / MiB:.1f}MiB", summary)
    story = _memory_viz.trace(data)
    rounded = allocator.round_size(90 * MiB) / MiB
    assert f"raise OutOfMemoryError # {rounded:.1f}MiB requested" in story
    assert _memory_viz.segments(data, format_flamegraph=str).count("\n") >= len(allocator.segments())
    for page in (
        _memory_viz.trace_plot(data),
        _memory_viz.segment_plot(data),
        _memory_viz.trace_plot(data, None, True),
    ):
        assert "add_local_files" in page


def test_the_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run.pickle"
    write_snapshot(worked(), path)
    before = path.read_bytes()
    assert {op.name: argument for op, argument, _ in pickletools.genops(before)}["PROTO"] == 4

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(worked(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pickle"]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        write_snapshot(worked(), tmp_path / "missing" / "run.pickle")


REQUESTS = st.lists(
    st.one_of(st.tuples(st.integers(1, 30 * MiB), st.integers(0, 2)), st.integers(0, 40), st.none()), max_size=60
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.sampled_from(TEXTS), REQUESTS)
def test_a_replay_comes_to_the_same_statistics_and_addresses(text, requests):
    allocator = CachingAllocator(GiB, AllocatorSettings.parse(text), record_history=True)
    live = []
    for request in requests:
        if request is None:
            allocator.empty_cache()
        elif isinstance(request, tuple):
            live.append(allocator.allocate(request[0], stream=request[1]))
        elif live:
            block = live.pop(request % len(live))
            if request % 3 == 0:
                allocator.record_stream(block, 7)
            allocator.free(block)
    replayed = replay(snapshot(allocator), check_addresses=True).memory_stats()
    recorded = allocator.statistics.memory_stats()
    for key, value in recorded.items():
        if key != "num_sync_all_streams":  # leaves no event
            assert replayed[key] == value, key


def test_addresses_of_the_driver_decide_between_equals():
    """The process's second segment lies below its first, so that equal blocks are taken in the other order."""
    low, high = 1 << 40, 1 << 41
    trace = [
        {"action": action, "addr": address, "size": 20 * MiB, "stream": 0}
        for action, address in [
            ("segment_alloc", high),
            ("alloc", high),
            ("segment_alloc", low),
            ("alloc", low),
            *((kind, address) for address in (high, low) for kind in ("free_requested", "free_completed")),
            ("alloc", low),
        ]
    ]
    assert replay(trace, check_addresses=True).reserved_bytes == 40 * MiB
    trace[-1]["addr"] = high
    with pytest.raises(ValueError, match="allocation 8 of 20971520 bytes lay at"):
        replay(trace, check_addresses=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_history_that_begins_with_memory_in_use(seed):
    """As most real ones do: what was there at its beginning follows from the end of the snapshot.

    Sizes leave no remainder that is too small to be split off, which an event does not tell of.
    """
    chance, live = random.Random(seed), []
    allocator = CachingAllocator(64 * GiB, record_history=True, history_limit=300)
    for _ in range(700):
        if live and chance.random() < 0.5:
            allocator.free(live.pop(chance.randrange(len(live))))
        if chance.random() < 0.01:
            allocator.empty_cache()
        live.append(allocator.allocate(chance.choice([chance.randrange(1, 4000), 2 * MiB * chance.randrange(1, 8)])))
    recorded = snapshot(allocator)
    assert replay(recorded, check_addresses=True).reserved_bytes == allocator.statistics.reserved_bytes
    trace = recorded["device_traces"][0]
    moved = next(entry for entry in reversed(trace) if entry["action"] == "alloc")
    moved["addr"] += 512
    with pytest.raises(ValueError, match="the simulation"):
        replay(recorded, check_addresses=True)


def test_a_growth_that_the_process_did_not_need():
    trace = [
        {"action": action, "addr": address, "size": 20 * MiB, "stream": 0}
        for action, address in (("segment_alloc", 1 << 40), ("segment_alloc", 1 << 41), ("alloc", 1 << 40))
    ]
    with pytest.raises(ValueError, match="before event 2 the process did .* the simulation"):
        replay(trace, check_addresses=True)


def test_a_history_of_expandable_segments_that_begins_with_memory_in_use():
    allocator = CachingAllocator(
        GiB, AllocatorSettings.parse("expandable_segments:True"), record_history=True, history_limit=2
    )
    kept = [allocator.allocate(MiB) for _ in range(3)]
    with pytest.raises(ValueError, match="must begin before the first allocation"):
        replay(snapshot(allocator))
    assert kept


def test_a_history_that_begins_too_late():
    with pytest.raises(ValueError, match="event 0 frees 0x200, which was not allocated before; record"):
        replay([{"action": "free_requested", "addr": 512, "size": 1, "stream": 0}])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", ["expandable_segments:False", "expandable_segments:True", "max_split_size_mb:64"])
def test_a_real_process_and_its_replay(text, tmp_path):
    """In a process of its own, whose allocator was never used."""
    program = """
import pickle, sys, torch
torch.cuda.memory._record_memory_history(max_entries=1_000_000)
model = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for length in (64, 300, 17, 300, 511):
    model(torch.randn(8, length, 512, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if length == 17:
        torch.cuda.empty_cache()
stats = torch.cuda.memory_stats()
pickle.dump((torch.cuda.memory._snapshot(), stats), open(sys.argv[1], "wb"))
"""
    path = tmp_path / "run.pickle"
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": text}
    environment.pop("PYTORCH_ALLOC_CONF", None)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
    recorded, stats = pickle.loads(path.read_bytes())
    books = replay(recorded, settings=AllocatorSettings.parse(text), check_addresses=True).memory_stats()
    for key in books:
        if key.split(".")[0] in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes", "segment"):
            assert books[key] == stats[key], key


def test_garbage_that_dies_meanwhile_does_no_harm():
    gpu = VirtualGPU(GiB, snapshot_history=True)
    before = gc.get_threshold()
    gc.disable()
    try:
        with gpu.active():
            cycle = [torch.empty(1000) for _ in range(200)]
            cycle.append(cycle)
            del cycle
        gc.set_threshold(gc.get_count()[0] + 100)  # reached in the middle of the history
        gc.enable()
        (trace,) = snapshot(gpu.allocator)["device_traces"]
    finally:
        gc.enable()
        gc.set_threshold(*before)
    assert [entry["action"] for entry in trace].count("free_completed") == 200
