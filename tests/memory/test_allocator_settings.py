"""The option string, against torch's own reader where the CPU build has it."""

import ctypes
from pathlib import Path

import pytest
import torch

from oomless.errors import ConfigError
from oomless.memory.allocator_settings import AllocatorSettings, AllocatorSettingsError
from oomless.units import MiB


@pytest.fixture
def torch_reads():
    """Torch's parser of the options that concern every accelerator, and its divisions for a size."""
    read = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm"
    if read is None or not hasattr(library, name):
        pytest.skip("this torch does not show its allocator settings")
    divisions = getattr(library, name)
    divisions.argtypes, divisions.restype = [ctypes.c_size_t], ctypes.c_size_t
    # Torch keeps the segment size of the call before; everything else starts from its default.
    read("large_segment_size_mb:20")
    yield read, divisions
    read("large_segment_size_mb:20")


def test_every_option_is_read():
    text = (
        "expandable_segments:True, max_split_size_mb:128,max_non_split_rounding_mb:64,large_segment_size_mb:32,"
        "garbage_collection_threshold:0.8,per_process_memory_fraction:0.5,throw_on_cudamalloc_oom:True,backend:native,"
        "pinned_use_background_threads:True,roundup_power2_divisions:4"
    )
    settings = AllocatorSettings.parse(text)
    assert settings == AllocatorSettings(
        expandable_segments=True,
        max_split_size_bytes=128 * MiB,
        max_non_split_rounding_bytes=64 * MiB,
        large_segment_bytes=32 * MiB,
        garbage_collection_threshold=0.8,
        memory_fraction=0.5,
        refuse_early=True,
        roundup_power2_divisions=(4,) * 16,
    )
    assert AllocatorSettings.parse(settings.to_text()) == settings
    assert AllocatorSettings.parse("") == AllocatorSettings()


@pytest.mark.parametrize(
    "text",
    ["8", "1", "[32:256,64:128,256:64,>:32]", "[64:8,128:2,256:4,512:2,1024:4,>:1]", "[1:4]", "[4:2,>:0]", "[65536:16]"]
    + ["[>:8]", "[2:4,1048576:8]"],
)
def test_divisions_are_those_of_torch(torch_reads, text):
    read, divisions = torch_reads
    read(f"roundup_power2_divisions:{text}")
    settings = AllocatorSettings.parse(f"roundup_power2_divisions:{text}")
    assert [divisions(MiB << power) for power in range(16)] == list(settings.roundup_power2_divisions)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("max_split_size_mb:20", True),
        ("max_split_size_mb:19", False),
        ("max_split_size_mb:20,large_segment_size_mb:21", False),
        ("max_split_size_mb:21,large_segment_size_mb:21", True),
        ("large_segment_size_mb:10", False),
        ("large_segment_size_mb:11", True),
        ("max_non_split_rounding_mb:19", False),
        ("max_non_split_rounding_mb:20", True),
        ("garbage_collection_threshold:0", False),
        ("garbage_collection_threshold:1.0", False),
        ("garbage_collection_threshold:0.999", True),
        ("roundup_power2_divisions:0", False),
        ("roundup_power2_divisions:3", False),
        ("roundup_power2_divisions:[3:4]", False),
        ("roundup_power2_divisions:[4:3]", False),
        ("roundup_power2_divisions:[4:0]", True),
        ("expandable_segments:true", False),
        ("expandable_segments:True,max_split_size_mb:64", True),
    ],
)
def test_what_torch_refuses_is_refused(torch_reads, text, allowed):
    for read, error in (
        (torch_reads[0], (ValueError, RuntimeError)),
        (AllocatorSettings.parse, AllocatorSettingsError),
    ):
        if allowed:
            read(text)
        else:
            with pytest.raises(error):
                read(text)


def test_errors_name_the_rule_what_was_got_and_the_near_miss():
    with pytest.raises(
        ConfigError, match="unknown allocator option 'expandable_segment'. Did you mean 'expandable_segments'"
    ):
        AllocatorSettings.parse("expandable_segment:True")
    with pytest.raises(ConfigError, match="only backend:native.*cudaMallocAsync follows.*got 'cudaMallocAsync'"):
        AllocatorSettings.parse("backend:cudaMallocAsync")
    with pytest.raises(ConfigError, match="key:value pairs joined by commas; got 'max_split_size_mb'"):
        AllocatorSettings.parse("expandable_segments:True,max_split_size_mb")
    with pytest.raises(ValueError, match="per_process_memory_fraction must be from 0 to 1; got 1.5"):
        AllocatorSettings.parse("per_process_memory_fraction:1.5")
    with pytest.raises(ValueError, match="whole number; got '12x'"):
        AllocatorSettings.parse("max_split_size_mb:12x")


def test_which_variable_counts():
    both = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True,per_process_memory_fraction:0.1",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,per_process_memory_fraction:0.5",
    }
    settings = AllocatorSettings.from_environment(both)
    assert settings == AllocatorSettings(expandable_segments=True, memory_fraction=0.5)
    assert AllocatorSettings.from_environment({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}) == AllocatorSettings(
        max_split_size_bytes=64 * MiB
    )
    assert AllocatorSettings.from_environment({}) == AllocatorSettings()
