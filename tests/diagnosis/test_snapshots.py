"""Snapshots: what they say, and that no file can run anything."""

import contextlib
import os
import pickle
import random

import pytest
import torch

from oomless.diagnosis.snapshots import load_snapshot, read_snapshot
from oomless.errors import DataError
from oomless.memory.allocator_settings import AllocatorSettings
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


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
@pytest.mark.parametrize("seed", range(4))
def test_a_dump_is_walked_back_to_the_moment_that_memory_ran_out(tmp_path, settings, seed):
    """What was held then, in whole bytes, though the dump is made after nearly everything was freed."""
    chance = random.Random(seed)
    device = VirtualGPU(200 * MiB, settings=AllocatorSettings.parse(settings), snapshot_history=True)
    with device.active():
        kept = []
        for _ in range(chance.randrange(150, 250)):
            if kept and chance.random() < 0.4:
                kept.pop(chance.randrange(len(kept)))
            if chance.random() < 0.02:
                device.empty_cache()
            size = chance.choice(
                [chance.randrange(1, 3000), chance.randrange(1, 3 * MiB), chance.randrange(1, 12 * MiB)]
            )
            with contextlib.suppress(torch.OutOfMemoryError):
                kept.append(torch.zeros(size, dtype=torch.uint8))
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(201 * MiB, dtype=torch.uint8)
        then = device.usage()
        free_then = max(
            (b.size_bytes for s in device.allocator.segments() for b in s.blocks if b.state == "inactive"), default=0
        )
        del kept[3:]
        device.empty_cache()
        kept.append(torch.zeros(MiB, dtype=torch.uint8))
        write_snapshot(device.allocator, tmp_path / "s.pickle")
    found = read_snapshot(tmp_path / "s.pickle")
    assert found.moment == "out of memory"
    assert found.reserved_bytes == then.reserved_bytes
    # An event of the history names what was asked for; a block that kept a remainder (of at most 1 MiB) is larger.
    assert free_then <= found.largest_cached_bytes <= free_then + 2 * MiB
    assert then.allocated_bytes - 20 * MiB < found.allocated_bytes <= then.allocated_bytes
    assert found.out_of_memory.words == "oom event of 201.00 MiB in the snapshot"
    assert found.out_of_memory.requested.text == "201.00 MiB"


def test_without_a_failure_the_peak_is_shown_and_without_a_history_the_end(tmp_path):
    for history, moment, mebibytes in ((True, "peak", 90), (False, "end", 30)):
        device = VirtualGPU(200 * MiB, snapshot_history=history)
        with device.active():
            kept = [torch.zeros(30 * MiB, dtype=torch.uint8) for _ in range(3)]
            del kept[1:]
            write_snapshot(device.allocator, tmp_path / "s.pickle")
        found = read_snapshot(tmp_path / "s.pickle")
        assert (found.moment, found.allocated_bytes) == (moment, mebibytes * MiB)


def test_a_stack_without_the_users_python_names_the_node_or_the_operator(tmp_path):
    def frames(*names):
        return [{"filename": "??", "line": 0, "name": name} for name in names]

    plumbing = (
        "torch::unwind::unwind()",
        "torch::CapturedTraceback::gather(bool, bool, bool)",
        "torch::cuda::(anonymous namespace)::gather_with_cpp()",
        "c10::cuda::CUDACachingAllocator::Native::NativeCachingAllocator::allocate(unsigned long)",
    )
    operator = "at::_ops::bmm::redispatch(c10::DispatchKeySet, at::Tensor const&, at::Tensor const&)"
    node = "torch::autograd::generated::BmmBackward0::apply(std::vector<at::Tensor, std::allocator<at::Tensor> >&&)"
    python = [{"filename": "/home/me/train.py", "line": 3, "name": "step"}]
    stacks = {
        "BmmBackward0 in the backward pass": frames(*plumbing, operator, node),
        "aten::bmm": frames(*plumbing, operator),
        "/home/me/train.py:3 step": frames(*plumbing, operator) + python,
        "??:0 at::detail::empty_cuda()": frames(*plumbing, "at::detail::empty_cuda()"),
        "": frames(*plumbing),
    }
    blocks = [{"state": "active_allocated", "size": 512, "frames": stack} for stack in stacks.values()]
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [{"total_size": 2 * MiB, "blocks": blocks}]}))
    assert {holder.where for holder in read_snapshot(path).holders} == set(stacks)


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
