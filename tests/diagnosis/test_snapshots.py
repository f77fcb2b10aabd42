"""Snapshots: what they say, and that no file can run anything."""

import os
import pickle

import pytest
import torch

from oomless.diagnosis.snapshots import load_snapshot, read_snapshot
from oomless.errors import DataError
from oomless.memory.snapshot import write_snapshot
from oomless.memory.virtual_gpu import VirtualGPU

MiB = 1 << 20


class Hostile:
    """A pickle that writes a file as soon as it is read the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile_files(marker):
    yield "function", pickle.dumps({"segments": [Hostile(marker)]})
    yield "protocol 0", pickle.dumps({"segments": [Hostile(marker)]}, protocol=0)
    yield "protocol 2", pickle.dumps(Hostile(marker), protocol=2)
    yield "system", b"cos\nsystem\n(S'mkdir " + str(marker).encode() + b"'\ntR."
    yield "instance", b"(S'mkdir " + str(marker).encode() + b"'\nios\nsystem\n."
    yield "by stack", pickle.PROTO + b"\x04\x8c\x02os\x8c\x06system\x93\x8c\x08mkdir " + b"x\x85R."
    yield "persistent", b"Panything\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield "build", b"\x80\x02}(\x8c\x01ad}\x8c\x01bK\x01sb."
    yield "torch's own", pickle.dumps({"segments": [torch.zeros(1)]})


@pytest.mark.parametrize("number", range(10))
def test_nothing_runs(tmp_path, number):
    marker = tmp_path / "it-ran"
    name, content = list(hostile_files(marker))[number]
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_snapshot(path)
    assert not marker.exists()
    if name == "function":  # the marker is real: the ordinary reader would have made it
        pickle.loads(content)
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a memory snapshot"),
        (b"hello", "not a memory snapshot"),
        (pickle.dumps([1, 2]), "dict with segments"),
        (pickle.dumps({"segments": [3]}), "not understood"),
        (pickle.dumps({"segments": [{"total_size": "x", "blocks": []}]}), "not understood"),
        (pickle.dumps({"segments": [], "device_traces": [[{"action": "oom"}]]}), "not understood"),
    ],
)
def test_what_is_no_snapshot(tmp_path, content, message):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_snapshot(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_snapshot(tmp_path / "absent.pickle")


def test_what_a_run_held_and_what_failed(tmp_path):
    device = VirtualGPU(200 * MiB, snapshot_history=True)
    with device.active():
        kept = [torch.zeros(30 * MiB, dtype=torch.uint8) for _ in range(3)]
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(150 * MiB, dtype=torch.uint8)
        write_snapshot(device.allocator, tmp_path / "s.pickle")
    found = read_snapshot(tmp_path / "s.pickle")
    assert found.allocated_bytes == found.reserved_bytes == sum(t.nbytes for t in kept)
    assert found.out_of_memory.requested.low == found.out_of_memory.requested.high == 150 * MiB
    assert found.out_of_memory.free.low == 110 * MiB
    assert [(h.blocks, h.size_bytes) for h in found.holders] == [(3, 90 * MiB)]


def entry(action, address, size, name):
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 0,
            "frames": [{"filename": "/x/torch/nn/modules/linear.py", "line": 2, "name": "forward"},
                       {"filename": f"/home/me/{name}.py", "line": 7, "name": name}]}  # fmt: skip


def test_a_leak_is_told_from_what_is_made_once(tmp_path):
    trace = [entry("alloc", 1, 500, "weights")]
    for step in range(20):
        trace += [entry("alloc", 1000 + step, 64, "keep_losses"), entry("alloc", 5000, 128, "work")]
        trace.append(entry("free_completed", 5000, 128, "work"))
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [trace]}))
    (leak,) = read_snapshot(path).growing
    assert leak.where == "/home/me/keep_losses.py:7 keep_losses"
    assert (leak.blocks, leak.size_bytes) == (20, 20 * 64)
