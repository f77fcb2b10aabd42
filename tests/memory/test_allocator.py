"""Each rule of the allocator on a case small enough to work out by hand, and what always holds on random ones."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from oomless.memory.allocator import CachingAllocator, oom_facts
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.units import GiB, KiB, MiB


def make(text="", capacity=GiB, outside=0, **options):
    return CachingAllocator(capacity, AllocatorSettings.parse(text), outside, **options)


def held(allocator):
    """What is allocated, reserved and inactive in split segments, in bytes."""
    books = allocator.statistics
    return books.allocated.current, books.reserved.current, books.inactive_split.current


def layout(allocator):
    """For each segment its blocks' sizes in KiB, those in use with a plus."""
    return [
        [f"{'+' if block.state != 'inactive' else ''}{block.size_bytes / KiB:g}" for block in segment.blocks]
        for segment in allocator.segments()
    ]


# Sizes


@pytest.mark.parametrize(
    ("asked", "rounded"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MiB + 1, MiB + 512), (10 * MiB, 10 * MiB)],
)
def test_rounding_to_512(asked, rounded):
    allocator = make()
    block = allocator.allocate(asked)
    assert (block.size_bytes, block.requested_bytes) == (rounded, asked)
    assert allocator.statistics.requested.current == asked


@pytest.mark.parametrize(
    ("divisions", "asked", "rounded"),
    [
        ("4", 1200, 1536),  # not above 512 * 4: 512 B steps
        ("4", 2049, 2560),  # 2048, 2560, 3072, 3584, 4096
        ("4", 5 * MiB, 5 * MiB),
        ("4", 5 * MiB + 1, 6 * MiB),
        ("4", 4 * MiB, 4 * MiB),
        ("1", 5 * MiB + 1, 5 * MiB + 512),
        ("[32:256,64:128,256:64,>:32]", int(2.5006 * GiB), int(2.5625 * GiB)),
        ("[4:2,>:0]", 9 * MiB + 1, 9 * MiB + 512),
        ("[4:2,>:8]", 4 * MiB + 1, 6 * MiB),
        ("[4:2,>:8]", 8 * MiB + 1, 9 * MiB),
        ("[4:2,>:0]", 3 * MiB - 1, 3 * MiB),
        ("[4:2,>:0]", 2 * MiB + 1, 3 * MiB),
    ],
)
def test_rounding_to_divisions_of_a_power_of_two(divisions, asked, rounded):
    assert make(f"roundup_power2_divisions:{divisions}").round_size(asked) == rounded


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2 * MiB),
        (MiB, 2 * MiB),
        (MiB + 1, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 1, 12 * MiB),
        (21 * MiB, 22 * MiB),
    ],
)
def test_growth(asked, segment):
    allocator = make()
    allocator.allocate(asked)
    assert allocator.statistics.reserved.current == segment
    assert allocator.statistics.segments.current == allocator.statistics.num_device_alloc == 1


def test_growth_by_another_large_segment():
    allocator = make("large_segment_size_mb:32")
    allocator.allocate(2 * MiB)
    assert layout(allocator) == [["+2048", "30720"]]


def test_nothing_asked_nothing_booked():
    allocator = make()
    allocator.free(allocator.allocate(0))
    assert not any(allocator.statistics.memory_stats().values())
    with pytest.raises(ValueError, match="0 bytes or more; got -1"):
        allocator.allocate(-1)


# Finding, splitting, merging


def test_small_blocks_split_down_to_512_and_count_as_inactive_split():
    allocator = make()
    allocator.allocate(MiB)
    assert held(allocator) == (MiB, 2 * MiB, MiB)
    allocator.allocate(MiB - 512)
    assert layout(allocator) == [["+1024", "+1023.5", "0.5"]]
    assert held(allocator) == (2 * MiB - 512, 2 * MiB, 512)
    allocator.allocate(512)
    assert held(allocator) == (2 * MiB, 2 * MiB, 0)
    assert allocator.statistics.inactive_split_blocks.peak == 1


def test_large_blocks_split_when_more_than_a_mebibyte_remains():
    allocator = make()
    allocator.allocate(11 * MiB + 512)  # 12 MiB segment; 1 MiB - 512 remains
    assert layout(allocator) == [["+12288"]]
    assert allocator.statistics.allocated.current == 12 * MiB
    allocator = make()
    allocator.allocate(11 * MiB)  # exactly 1 MiB would remain
    assert layout(allocator) == [["+12288"]]
    allocator = make()
    allocator.allocate(11 * MiB - 512)
    assert layout(allocator) == [["+11263.5", "1024.5"]]


def test_best_fit_is_the_smallest_and_then_the_lowest():
    allocator = make()
    blocks = [allocator.allocate(size * MiB) for size in (30, 20, 40, 20)]
    addresses = [block.address for block in blocks]
    assert addresses == sorted(addresses)
    assert all(address % (2 * MiB) == 0 for address in addresses)
    for block in reversed(blocks):
        allocator.free(block)
    assert allocator.allocate(18 * MiB).address == addresses[1]
    assert allocator.allocate(20 * MiB).address == addresses[3]
    assert allocator.allocate(20 * MiB).address == addresses[0]


def test_pools_are_apart_by_kind_and_by_stream():
    allocator = make()
    allocator.free(allocator.allocate(20 * MiB, stream=1))
    allocator.allocate(20 * MiB, stream=2)
    allocator.allocate(512, stream=1)
    assert [(view.stream, view.is_large, view.size_bytes) for view in allocator.segments()] == [
        (1, True, 20 * MiB),
        (2, True, 20 * MiB),
        (1, False, 2 * MiB),
    ]


def test_merging_with_both_neighbours():
    allocator = make()
    first, second, third = (allocator.allocate(4 * MiB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)
    assert layout(allocator) == [["4096", "+4096", "12288"]]
    assert held(allocator) == (4 * MiB, 20 * MiB, 16 * MiB)
    assert allocator.statistics.inactive_split_blocks.current == 2
    allocator.free(second)
    assert layout(allocator) == [["20480"]]
    assert held(allocator) == (0, 20 * MiB, 0)
    assert allocator.statistics.inactive_split_blocks.current == 0


def test_a_block_is_freed_once():
    allocator = make()
    block = allocator.allocate(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="freed once"):
        allocator.free(block)


def test_all_statistics_of_a_worked_case():
    allocator = make()
    a = allocator.allocate(3 * MiB - 100)  # 20 MiB segment
    b = allocator.allocate(700)  # 2 MiB segment
    allocator.free(a)
    allocator.allocate(16 * MiB)  # the whole cached segment but 4 MiB
    allocator.free(b)
    wanted = {
        "allocation.all": (1, 2, 3, 2),
        "segment.all": (2, 2, 2, 0),
        "active.all": (1, 2, 3, 2),
        "inactive_split.all": (1, 2, 3, 2),
        "allocated_bytes.all": (16 * MiB, 16 * MiB + 1024, 19 * MiB + 1024, 3 * MiB + 1024),
        "reserved_bytes.all": (22 * MiB, 22 * MiB, 22 * MiB, 0),
        "active_bytes.all": (16 * MiB, 16 * MiB + 1024, 19 * MiB + 1024, 3 * MiB + 1024),
        # 17 MiB behind a; 2 MiB - 1 KiB behind b; 4 MiB behind the last
        "inactive_split_bytes.all": (4 * MiB, 19 * MiB - 1024, 23 * MiB - 1024, 19 * MiB - 1024),
        "requested_bytes.all": (16 * MiB, 16 * MiB + 700, 19 * MiB + 600, 3 * MiB + 600),
    }
    books = allocator.statistics.memory_stats()
    for row, values in wanted.items():
        assert tuple(books[f"{row}.{kind}"] for kind in ("current", "peak", "allocated", "freed")) == values, row
    allocator.reset_peak()
    assert allocator.statistics.allocated.peak == 16 * MiB


def test_a_block_used_by_another_stream_waits():
    allocator = make()
    block = allocator.allocate(MiB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    books = allocator.statistics
    assert (books.allocated.current, books.active.current, books.requested.current) == (0, MiB, MiB)
    assert allocator.segments()[0].blocks[0].state == "active_pending_free"
    assert allocator.allocate(MiB).address == block.address + MiB
    allocator.synchronize()
    assert books.active.current == MiB
    assert layout(allocator) == [["1024", "+1024"]]


def test_the_stream_of_the_allocation_is_no_other_stream():
    allocator = make()
    block = allocator.allocate(MiB, stream=3)
    allocator.record_stream(block, 3)
    allocator.free(block)
    assert allocator.statistics.active.current == 0


# Oversize blocks


def test_oversize_blocks_are_not_split_and_serve_only_oversize_requests():
    allocator = make("max_split_size_mb:64")
    big = allocator.allocate(100 * MiB)
    allocator.free(big)
    assert allocator.statistics.oversize_segments.current == 1
    small = allocator.allocate(30 * MiB)
    assert layout(allocator) == [["102400"], ["+30720"]]
    again = allocator.allocate(81 * MiB)  # 19 MiB of slack
    assert again.address == big.address
    assert again.size_bytes == 100 * MiB
    assert allocator.statistics.oversize_allocations.current == 1
    allocator.free(again)
    allocator.allocate(80 * MiB)  # 20 MiB of slack is too much
    assert allocator.statistics.reserved.current == 210 * MiB
    allocator.free(small)


def test_the_slack_can_be_set():
    allocator = make("max_split_size_mb:64,max_non_split_rounding_mb:40")
    allocator.free(allocator.allocate(100 * MiB))
    assert allocator.allocate(64 * MiB).size_bytes == 100 * MiB


def test_on_failure_one_large_enough_oversize_block_goes_first():
    allocator = make("max_split_size_mb:64", capacity=300 * MiB)
    blocks = [allocator.allocate(size * MiB) for size in (70, 90, 20, 100)]
    for block in blocks:
        allocator.free(block)
    allocator.allocate(65 * MiB)  # 70 is within the slack
    assert allocator.statistics.reserved.current == 280 * MiB
    allocator.allocate(66 * MiB)  # nor 90 nor 100 is; 90 is released
    assert allocator.statistics.reserved.current == 256 * MiB
    assert allocator.statistics.num_alloc_retries == 0
    assert [view.size_bytes // MiB for view in allocator.segments()] == [70, 20, 100, 66]


def test_on_failure_several_oversize_blocks_go_the_largest_first():
    allocator = make("max_split_size_mb:64", capacity=300 * MiB)
    for block in [allocator.allocate(size * MiB) for size in (70, 80, 90, 30)]:
        allocator.free(block)
    allocator.allocate(130 * MiB)
    assert [view.size_bytes // MiB for view in allocator.segments()] == [70, 30, 130]
    assert allocator.statistics.num_alloc_retries == 0


# Running out


def test_on_failure_all_unsplit_cached_blocks_go():
    allocator = make(capacity=64 * MiB)
    kept = allocator.allocate(4 * MiB)
    allocator.free(allocator.allocate(12 * MiB))  # behind kept
    allocator.free(allocator.allocate(24 * MiB))
    allocator.free(allocator.allocate(512))
    assert allocator.statistics.reserved.current == 46 * MiB
    allocator.allocate(30 * MiB)
    assert layout(allocator) == [["+4096", "16384"], ["+30720"]]
    assert allocator.statistics.num_alloc_retries == 1
    assert allocator.statistics.num_ooms == 0
    assert allocator.statistics.num_device_free == 2
    allocator.free(kept)


def test_the_message_and_the_facts():
    allocator = make(capacity=64 * MiB, outside=5 * MiB)
    allocator.allocate(3 * MiB)
    allocator.allocate(20 * MiB + 700)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        allocator.allocate(5 * MiB + 15 * MiB, note="aten.mm")
    assert str(caught.value) == (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 64.00 MiB of which 17.00 MiB is "
        "free. Including non-PyTorch memory, this process has 47.00 MiB memory in use. Of the allocated memory 23.00 MiB is "
        "allocated by PyTorch, and 19.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
        "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
        "Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
        "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
    )
    facts = oom_facts(caught.value)
    assert (facts.requested_bytes, facts.segment_bytes, facts.capacity_bytes) == (20 * MiB, 20 * MiB, 64 * MiB)
    assert (facts.free_bytes, facts.allocated_bytes, facts.reserved_bytes) == (17 * MiB, 23 * MiB + 1024, 42 * MiB)
    assert facts.note == "aten.mm"
    assert allocator.statistics.num_ooms == allocator.statistics.num_alloc_retries == 1
    assert oom_facts(torch.OutOfMemoryError("real")) is None


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 bytes"), (1024, "1024 bytes"), (MiB, "1024.00 KiB"), (GiB, "1024.00 MiB")]
)
def test_sizes_in_messages_are_printed_as_by_torch(size, text):
    with pytest.raises(torch.OutOfMemoryError, match=f"a total capacity of {text} of which {text} is free"):
        make(capacity=size).allocate(2 * GiB)


def test_more_than_an_exabyte():
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to allocate more than 1EB memory.$"):
        make().allocate(1 << 60)


def test_a_failure_changes_nothing_but_the_cache():
    allocator = make(capacity=32 * MiB)
    allocator.allocate(MiB)
    before = layout(allocator)
    with pytest.raises(torch.OutOfMemoryError):
        allocator.allocate(40 * MiB)
    assert layout(allocator) == before
    assert held(allocator) == (MiB, 2 * MiB, MiB)


def test_another_process_takes_memory_and_gives_it_back():
    allocator = make(capacity=64 * MiB)
    allocator.allocate(30 * MiB)
    allocator.set_capacity(20 * MiB)
    assert allocator.free_bytes == 0
    allocator.free(allocator.allocate(0))
    with pytest.raises(torch.OutOfMemoryError, match=r"total capacity of 64.00 MiB of which 0 bytes is free"):
        allocator.allocate(1)
    allocator.set_capacity(64 * MiB)
    allocator.allocate(30 * MiB)


def test_a_share_of_the_memory():
    allocator = make("per_process_memory_fraction:0.5", capacity=100 * MiB)
    allocator.allocate(50 * MiB)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory in use. 50.00 MiB allowed; Of the allocated"):
        allocator.allocate(1)


def test_refused_early_nothing_is_freed_for_it():
    allocator = make("throw_on_cudamalloc_oom:True", capacity=64 * MiB)
    allocator.free(allocator.allocate(40 * MiB))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        allocator.allocate(50 * MiB)
    assert str(caught.value) == (
        "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction "
        "limit. Requested size: 50.00 MiB"
    )
    books = allocator.statistics
    assert (books.num_oom_rejections, books.num_ooms, books.num_alloc_retries) == (1, 0, 0)
    assert books.reserved.current == 40 * MiB


def cached_old_and_young(old_mib, young_mib):
    """170 MiB or less held of 200 allowed; the old block was passed over by seven searches, the young one by none."""
    allocator = make("garbage_collection_threshold:0.5,per_process_memory_fraction:0.8", capacity=250 * MiB)
    old, young, kept = (allocator.allocate(size * MiB) for size in (old_mib, young_mib, 40))
    allocator.free(old)
    for _ in range(7):
        allocator.free(kept)
        kept = allocator.allocate(40 * MiB)
    allocator.free(young)
    return allocator


def test_garbage_collection_takes_what_was_passed_over_longest():
    allocator = cached_old_and_young(60, 30)
    allocator.allocate(70 * MiB)  # 130 held: 30 too many
    assert [view.size_bytes // MiB for view in allocator.segments()] == [30, 40, 70]
    assert allocator.statistics.num_alloc_retries == 0


def test_garbage_collection_goes_on_until_it_has_enough():
    allocator = cached_old_and_young(12, 90)
    allocator.allocate(96 * MiB)  # 142 held: 42 too many, of which the old block has 12
    assert [view.size_bytes // MiB for view in allocator.segments()] == [40, 96]
    assert allocator.statistics.num_alloc_retries == 0


def test_no_garbage_collection_without_a_share():
    allocator = make("garbage_collection_threshold:0.1", capacity=200 * MiB)
    allocator.free(allocator.allocate(50 * MiB))
    allocator.allocate(60 * MiB)
    assert allocator.statistics.num_device_free == 0


# Expandable segments


def test_expandable_segments_grow_by_pages_in_place():
    allocator = make("expandable_segments:True")
    first = allocator.allocate(15 * MiB)
    assert allocator.statistics.reserved.current == 20 * MiB
    second = allocator.allocate(30 * MiB)  # 5 MiB are there, two pages more
    assert second.address == first.address + 15 * MiB
    assert layout(allocator) == [["+15360", "+30720", "15360"]]
    assert allocator.statistics.reserved.current == 60 * MiB
    assert allocator.statistics.inactive_split.current == 0
    assert allocator.statistics.segments.current == 0
    small = allocator.allocate(512)
    assert allocator.statistics.reserved.current == 62 * MiB
    assert [view.is_expandable for view in allocator.segments()] == [True, True]
    allocator.free(small)


def test_expandable_blocks_split_down_to_512():
    allocator = make("expandable_segments:True")
    allocator.allocate(20 * MiB - 512)
    assert layout(allocator) == [["+20479.5", "0.5"]]


def test_expandable_holes_are_filled_before_the_end_is_used():
    allocator = make("expandable_segments:True")
    blocks = [allocator.allocate(20 * MiB) for _ in range(3)]
    allocator.allocate(18 * MiB)  # 2 MiB are free at the end, and can grow
    allocator.free(blocks[1])
    assert allocator.allocate(2 * MiB).address == blocks[1].address


def test_expandable_pages_are_unmapped_and_the_gap_is_mapped_again():
    allocator = make("expandable_segments:True", capacity=100 * MiB)
    first, second, third = (allocator.allocate(size * MiB) for size in (25, 50, 15))
    assert allocator.statistics.reserved.current == 100 * MiB
    allocator.free(second)  # 25 to 75 MiB: of its pages those from 40 to 60 are whole
    allocator.empty_cache()
    assert allocator.statistics.reserved.current == 80 * MiB
    assert layout(allocator) == [["+25600", "15360"], ["15360", "+15360", "10240"]]
    again = allocator.allocate(50 * MiB)
    assert again.address == second.address
    assert layout(allocator) == [["+25600", "+51200", "+15360", "10240"]]
    for block in (first, third, again):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.statistics.reserved.current == 0
    assert allocator.segments() == ()


def test_expandable_pages_are_moved_where_they_are_needed():
    allocator = make("expandable_segments:True", capacity=80 * MiB)
    first = allocator.allocate(40 * MiB)
    allocator.allocate(20 * MiB)
    allocator.free(first)
    allocator.allocate(60 * MiB)  # 40 are in front and 40 behind: a second range
    assert layout(allocator) == [["+20480"], ["+61440"]]
    assert allocator.statistics.num_alloc_retries == 1


def test_expandable_addresses_go_back_with_the_last_page():
    allocator = make("expandable_segments:True")
    first = allocator.allocate(20 * MiB)
    address = first.address
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.allocate(20 * MiB).address > address


def test_expandable_message_names_the_segment_size():
    allocator = make("expandable_segments:True", capacity=30 * MiB)
    allocator.allocate(20 * MiB)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 20.00 MiB. .* of which 10.00 MiB is free"):
        allocator.allocate(2 * MiB)


# What always holds

SIZES = st.one_of(
    st.integers(1, 2 * MiB),
    st.integers(MiB, 30 * MiB),
    st.sampled_from([512, MiB, 10 * MiB, 20 * MiB, 2 * MiB, 64 * MiB, 65 * MiB]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES, st.integers(0, 1)),
        st.tuples(st.just("free"), st.integers(0, 50), st.booleans()),
        st.tuples(st.just("empty_cache"), st.none(), st.none()),
        st.tuples(st.just("synchronize"), st.none(), st.none()),
        st.tuples(st.just("set_capacity"), st.integers(50, 300), st.none()),
    ),
    max_size=60,
)
TEXTS = st.sampled_from(
    [
        "",
        "expandable_segments:True",
        "max_split_size_mb:32",
        "roundup_power2_divisions:4",
        "garbage_collection_threshold:0.4,per_process_memory_fraction:0.9",
        "expandable_segments:True,large_segment_size_mb:14,max_split_size_mb:40",
        "large_segment_size_mb:33,per_process_memory_fraction:0.7",
    ]
)


def run(allocator, steps, check):
    live = []
    for action, first, second in steps:
        if action == "allocate":
            with contextlib.suppress(torch.OutOfMemoryError):
                live.append(allocator.allocate(first, stream=second))
        elif action == "free" and live:
            block = live.pop(first % len(live))
            if second:
                allocator.record_stream(block, 9)
            allocator.free(block)
        elif action in ("empty_cache", "synchronize"):
            getattr(allocator, action)()
        elif action == "set_capacity":
            allocator.set_capacity(first * MiB)
        check(allocator, live)
    return live


def assert_sound(allocator, live):
    books = allocator.statistics
    blocks = [block for view in allocator.segments() for block in view.blocks]
    for view in allocator.segments():
        address = view.address
        for block in view.blocks:
            assert block.address == address
            address += block.size_bytes
        for left, right in zip(view.blocks, view.blocks[1:], strict=False):
            assert not (left.state == right.state == "inactive"), "free neighbours are merged"
    for left, right in zip(blocks, blocks[1:], strict=False):
        assert left.address + left.size_bytes <= right.address
    in_use = {block.address: block for block in blocks if block.state == "active_allocated"}
    assert sorted(in_use) == sorted(block.address for block in live)
    assert sum(block.size_bytes for block in in_use.values()) == books.allocated.current
    assert sum(block.requested_bytes for block in blocks) == books.requested.current
    assert sum(block.size_bytes for block in blocks) == books.reserved.current
    assert sum(block.size_bytes for block in blocks if block.state != "inactive") == books.active.current
    split = [
        block.size_bytes
        for view in allocator.segments()
        for block in view.blocks
        if not view.is_expandable and len(view.blocks) > 1 and block.state == "inactive"
    ]
    assert (sum(split), len(split)) == (books.inactive_split.current, books.inactive_split_blocks.current)
    assert books.reserved.current <= allocator.capacity_bytes
    assert books.reserved.current <= (allocator.allowed_bytes or allocator.capacity_bytes)
    for block in live:
        assert block.requested_bytes <= block.size_bytes


@hypothesis_settings(deadline=None, max_examples=150)
@given(TEXTS, STEPS)
def test_what_always_holds(text, steps):
    allocator = make(text, capacity=200 * MiB)
    live = run(allocator, steps, assert_sound)
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.segments() == ()
    assert held(allocator) == (0, 0, 0)
    assert all(stat == 0 for name, stat in allocator.statistics.memory_stats().items() if name.endswith(".current"))


@hypothesis_settings(deadline=None, max_examples=30)
@given(TEXTS, STEPS)
def test_the_same_requests_give_the_same_books(text, steps):
    runs = [make(text, capacity=200 * MiB, record_history=True) for _ in range(2)]
    for allocator in runs:
        run(allocator, steps, lambda allocator, live: None)
    assert runs[0].statistics.memory_stats() == runs[1].statistics.memory_stats()
    assert runs[0].history == runs[1].history
