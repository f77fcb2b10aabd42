"""The one place where torch is patched: what a script asks of CUDA, answered for a GPU that is not there.

Only while a rehearsal lasts, and, but for ``oomless.programs`` inside a program of one's own, only in a child process. Each
entry says what a script would notice without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from oomless.memory.virtual_gpu import VirtualGPU


@contextlib.contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, and put back what was there."""
    before = [(owner, name, owner.__dict__.get(name, _MISSING)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_MISSING = object()


class _Stream:
    """A stream or an event: nothing runs, so nothing waits."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: 0.001 if name == "elapsed_time" else name == "query"

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...


def changes(gpu: VirtualGPU, count: int) -> list[tuple[Any, str, Any]]:
    """Return what is to be patched so that ``gpu``, the first of ``count``, is there as far as a script can see."""
    capability = gpu.compute_capability or (8, 0)
    properties = SimpleNamespace(
        name=gpu.name,
        total_memory=gpu.capacity_bytes,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=40,
        warp_size=32,
        gcnArchName="",
        is_integrated=False,
        uuid="rehearsed",
    )

    def counted(name: str) -> Callable[..., int]:
        return lambda device=None: getattr(gpu.usage(), name)

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def stats(device: Any = None) -> dict[str, int]:
        return gpu.allocator.statistics.memory_stats()

    def state(device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    cuda = torch.cuda
    return [
        # What is there: without these a script trains on the CPU, or stops.
        (cuda, "is_available", lambda: True),
        (cuda, "is_initialized", lambda: True),
        (cuda, "init", nothing),
        (cuda, "_lazy_init", nothing),
        (cuda, "device_count", lambda: count),
        (cuda, "current_device", lambda: 0),
        (cuda, "set_device", nothing),
        (cuda, "device", lambda index: contextlib.nullcontext()),
        (cuda, "get_device_name", lambda device=None: gpu.name),
        (cuda, "get_device_capability", lambda device=None: capability),
        (cuda, "get_device_properties", lambda device=None: properties),
        (cuda, "get_arch_list", lambda: [f"sm_{capability[0]}{capability[1]}"]),
        (cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)),
        (torch.version, "cuda", "13.0"),
        (torch.backends.cuda, "is_built", lambda: True),
        (torch.accelerator, "is_available", lambda check_available=False: True),
        (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        (torch.accelerator, "device_count", lambda: count),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "set_device_index", nothing),
        (torch.accelerator, "current_stream", _Stream),
        (torch.accelerator, "synchronize", nothing),
        (torch.accelerator, "empty_cache", gpu.empty_cache),
        # Memory, as the simulated allocator has it: scripts print it and adapt to it.
        (cuda, "memory_allocated", counted("allocated_bytes")),
        (cuda, "max_memory_allocated", counted("peak_allocated_bytes")),
        (cuda, "memory_reserved", counted("reserved_bytes")),
        (cuda, "max_memory_reserved", counted("peak_reserved_bytes")),
        (cuda, "memory_stats", stats),
        (cuda, "memory_summary", lambda *args, **kwargs: ""),
        (cuda, "mem_get_info", lambda device=None: (gpu.allocator.free_bytes, gpu.capacity_bytes)),
        (cuda, "reset_peak_memory_stats", lambda device=None: gpu.reset_peak()),
        (cuda, "reset_max_memory_allocated", lambda device=None: gpu.reset_peak()),
        (cuda, "empty_cache", gpu.empty_cache),
        (cuda, "ipc_collect", nothing),
        # Time and chance: nothing runs, so nothing waits, and no number is drawn.
        (cuda, "synchronize", nothing),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Stream),
        (cuda, "stream", lambda stream: contextlib.nullcontext()),
        (cuda, "current_stream", _Stream),
        (cuda, "default_stream", _Stream),
        (cuda, "manual_seed", nothing),
        (cuda, "manual_seed_all", nothing),
        (cuda, "initial_seed", lambda: 0),
        *(
            (owner, name, answer)
            for owner in (cuda, cuda.random)
            for name, answer in (
                ("get_rng_state", state),
                ("get_rng_state_all", lambda: [state()]),
                ("set_rng_state", nothing),
                ("set_rng_state_all", nothing),
            )
        ),
    ]
