"""What was asked for once is asked for again: the same bytes, without the operators."""

import pytest
import torch

from oomless.memory.virtual_gpu import VirtualGPU

MiB = 1 << 20


def stretch(device, kept, calls):
    """Three tensors, two at once at most, and one labelled; ``kept`` gets the last."""

    def run():
        calls.append(1)
        first = torch.empty(4 * MiB, dtype=torch.uint8)
        device.label([first], "optimizer state")
        second = first + 1
        del first
        third = second + 1
        kept[:] = [third][: len(kept)]

    return run


def device_of(capacity_bytes, *, fake=True):
    return VirtualGPU(capacity_bytes, record_history=True, fake=fake)


def test_a_repetition_is_the_same_in_the_books():
    calls, device = [], device_of(64 * MiB)
    with device.active():
        for _ in range(3):
            device.repeating("key", stretch(device, [], calls))
    assert len(calls) == 1
    timeline = device.profile(max_points=None).timeline
    thirds = [timeline.allocated_bytes[start : start + 6] for start in (0, 6, 12)]
    assert thirds == [(4 * MiB, 8 * MiB, 4 * MiB, 8 * MiB, 4 * MiB, 0)] * 3
    assert timeline.bytes_by_category["optimizer state"][::6] == (4 * MiB,) * 3
    assert timeline.bytes_by_category["optimizer state"][5::6] == (0,) * 3


def test_a_third_in_a_row_is_left_out_where_it_is_asked_to_skim():
    calls, device = [], device_of(64 * MiB)
    device.skim = True
    with device.active():
        for _ in range(5):
            device.repeating("key", stretch(device, [], calls))
        assert device.usage().peak_allocated_bytes == 8 * MiB
    assert len(calls) == 1
    assert device.profile().event_count == 2 * 6


def test_what_is_held_between_ends_the_row():
    calls, device = [], device_of(64 * MiB)
    device.skim = True
    with device.active():
        for _ in range(3):
            device.repeating("key", stretch(device, [], calls))
        held = torch.empty(30 * MiB, dtype=torch.uint8)
        device.repeating("key", stretch(device, [], calls))
        assert device.usage().peak_allocated_bytes == 38 * MiB
        del held


def test_in_a_larger_cache_it_is_asked_for_again():
    calls, device = [], device_of(64 * MiB)
    device.skim = True
    with device.active():
        for _ in range(3):
            device.repeating("small", stretch(device, [], calls))
        reserved = device.usage().reserved_bytes
        for _ in range(2):
            device.repeating("large", lambda: torch.empty(40 * MiB, dtype=torch.uint8))
        device.repeating("small", stretch(device, [], calls))
    assert device.usage().reserved_bytes > reserved
    assert device.profile().event_count == 2 * 6 + 2 * 2 + 6


def test_what_leaves_something_behind_is_run_again():
    calls, kept, device = [], [None], device_of(64 * MiB)
    with device.active():
        for _ in range(2):
            device.repeating("key", stretch(device, kept, calls))
    assert len(calls) == 2
    assert device.usage().allocated_bytes == 4 * MiB


def test_real_tensors_are_always_computed():
    calls, device = [], device_of(64 * MiB, fake=False)
    with device.active():
        for _ in range(2):
            device.repeating("key", stretch(device, [], calls))
    assert len(calls) == 2


def test_a_repetition_can_run_out_and_leaves_nothing():
    calls, device = [], device_of(24 * MiB)
    with device.active():
        device.repeating("key", stretch(device, [], calls))
        held = torch.empty(14 * MiB, dtype=torch.uint8)
        before = device.usage().allocated_bytes
        with pytest.raises(torch.OutOfMemoryError):
            device.repeating("key", stretch(device, [], calls))
        assert device.usage().allocated_bytes == before
        assert len(calls) == 1
        del held
