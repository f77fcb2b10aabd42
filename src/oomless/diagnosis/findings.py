"""What a message says by itself, before any rehearsal: other processes, fragmentation, limits, leaks, other memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oomless.diagnosis.logs import Reading
from oomless.diagnosis.messages import OutOfMemory
from oomless.diagnosis.run import LARGEST_CONTEXT_BYTES
from oomless.diagnosis.snapshots import SnapshotReading
from oomless.units import GiB, MiB, counted, format_bytes

Topic = Literal[
    "other processes",
    "fragmentation",
    "larger than the device",
    "limit",
    "leak",
    "late",
    "small request",
    "library",
    "not GPU memory",
    "private pools",
    "free memory",
    "sharded",
]
LATE_STEPS = 20
CONTEXT_BYTES = GiB // 2
"""A usual CUDA context with its libraries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that the message or the log shows."""

    topic: Topic
    text: str
    size_bytes: int = 0

    def to_dict(self) -> dict[str, str | int]:
        """Return plain values for JSON."""
        return {"topic": self.topic, "text": self.text, "bytes": self.size_bytes}


def find(reading: Reading, snapshot: SnapshotReading | None, outside_bytes: int | None) -> list[Finding]:
    """Return what ``reading`` shows; ``outside_bytes`` is what lies outside of this process's allocator."""
    found: list[Finding] = []
    if reading.first is not None:
        message = reading.first.message
        for finding in (
            _other_memory(message),
            _too_large(message),
            _others(message, outside_bytes),
            _fragmented(message),
            _limited(message),
            _pools(message),
            _free(message),
            _small(message),
        ):
            if finding is not None:
                found.append(finding)
    leak = _leak(reading, snapshot)
    if leak is not None:
        found.append(leak)
    elif reading.first is not None and (reading.steps_done or 0) >= LATE_STEPS:
        found.append(
            Finding(
                topic="late",
                text=f"It ran for {counted(reading.steps_done or 0, 'step')} before. A run whose steps are all alike fails in its first "
                "two, so either a batch was longer than any before, something else began (an evaluation, a save, another "
                "process), or memory grows from step to step.",
            )
        )
    sharded = [name for name in reading.settings.beside if name in ("deepspeed", "fsdp")]
    if sharded:
        found.append(
            Finding(
                topic="sharded",
                text=f"The log names {' and '.join(sharded)}. What is said below of weights, gradients and optimizer state "
                "is for one GPU that holds all of them.",
            )
        )
    return found


def _other_memory(message: OutOfMemory) -> Finding | None:
    if message.kind == "kernel":
        return Finding(
            topic="not GPU memory",
            text=f"This is no shortage of GPU memory. A Triton kernel wants {_said(message.requested)} of a "
            f"multiprocessor's shared memory, and this GPU has {_said(message.capacity)}. Smaller blocks or fewer stages "
            "of that kernel, or another kernel, help; a smaller batch does not.",
        )
    if message.kind == "host":
        return Finding(
            topic="not GPU memory",
            text=f"The host's memory (RAM) ran out, not the GPU's: {message.source} asked for {_said(message.requested)}. "
            "Loading a model first on the CPU in fp32, a dataset held as a list, and data-loader workers that each copy "
            "it are the usual reasons. oomless loads tensor by tensor and streams text.",
        )
    if message.kind == "killed":
        return Finding(
            topic="not GPU memory",
            text=f"The process was killed ({message.source}), which is how a host that runs out of its own memory (RAM) ends "
            "one: no GPU error has this form. Look at the host's memory while the model loads and while data is read.",
        )
    if message.kind == "library" or (message.kind == "driver" and message.source == "Triton"):
        return Finding(
            topic="library",
            text=f"{message.source} takes memory beside PyTorch's allocator and found none left: PyTorch had cached or filled "
            "the GPU. The cures are those of any other shortage.",
        )
    return None


def _said(size: object) -> str:
    return getattr(size, "text", None) or "more than there is"


def _too_large(message: OutOfMemory) -> Finding | None:
    if message.requested is None or message.capacity is None or message.requested.low <= message.capacity.high:
        return None
    return Finding(
        topic="larger than the device",
        text=f"One tensor of {message.requested.text} is more than the whole GPU has ({message.capacity.text}). Freeing "
        "memory cannot help: this tensor must become smaller, or never be made.",
        size_bytes=message.requested.low,
    )


def others_bytes(message: OutOfMemory, outside_bytes: int | None) -> int:
    """Return what processes other than the one that failed hold of the GPU, as far as the message says it."""
    sizes = [size.middle for _, size in message.processes]
    if message.in_use is not None:
        return sum(sizes)
    reserved = message.reserved_bytes
    if len(sizes) > 1 and reserved is not None:
        own = min((s for s in sizes if s >= reserved.low), key=lambda s: s - reserved.low, default=max(sizes))
        return sum(sizes) - own
    if outside_bytes is not None and message.allowed is None and outside_bytes > LARGEST_CONTEXT_BYTES:
        return outside_bytes - CONTEXT_BYTES
    return 0


def _others(message: OutOfMemory, outside_bytes: int | None) -> Finding | None:
    held = others_bytes(message, outside_bytes)
    if held < 64 * MiB:
        return None
    numbers = ", ".join(str(number) for number, _ in message.processes)
    return Finding(
        topic="other processes",
        text=f"Other processes hold {format_bytes(held)} of this GPU"
        + (f" (numbers in the message: {numbers})." if numbers else ", as what the message leaves unexplained shows."),
        size_bytes=held,
    )


def _fragmented(message: OutOfMemory) -> Finding | None:
    reserved, allocated, requested = message.reserved_bytes, message.allocated, message.requested
    if message.unallocated is not None:
        cached = message.unallocated.low
    elif reserved is not None and allocated is not None:
        cached = reserved.low - allocated.high
    else:
        return None
    if requested is None or cached < requested.high or cached < 32 * MiB:
        return None
    return Finding(
        topic="fragmentation",
        text=f"PyTorch holds {format_bytes(cached)} that no tensor uses, more than the {requested.text} that were asked for, "
        "but in pieces none of which is large enough.",
        size_bytes=cached,
    )


def _limited(message: OutOfMemory) -> Finding | None:
    if message.allowed is None or (message.capacity is not None and message.allowed.high >= message.capacity.low):
        return None
    return Finding(
        topic="limit",
        text=f"The process may take {message.allowed.text} only: a limit that was set for it "
        "(torch.cuda.set_per_process_memory_fraction), not the size of the GPU.",
        size_bytes=message.allowed.middle,
    )


def _pools(message: OutOfMemory) -> Finding | None:
    pools = message.private_pools
    if pools is None or message.allocated is None or pools.middle < message.allocated.middle // 10:
        return None
    return Finding(
        topic="private pools",
        text=f"{pools.text} lie in private pools, which CUDA graphs keep to themselves (torch.compile with "
        "mode='reduce-overhead').",
        size_bytes=pools.middle,
    )


def _free(message: OutOfMemory) -> Finding | None:
    free, requested = message.free, message.requested
    if free is None or requested is None or free.low <= requested.high or message.allowed is not None:
        return None
    return Finding(
        topic="free memory",
        text=f"The GPU had {free.text} free when {requested.text} were refused. Memory was given back in between, or by "
        "another process; what ran out may not be what is shown.",
        size_bytes=free.middle,
    )


def _small(message: OutOfMemory) -> Finding | None:
    if message.requested is None or message.exact or message.requested.high > 20.005 * MiB:
        return None
    return Finding(
        topic="small request",
        text=f"{message.requested.text} is the size in which PyTorch takes memory for small tensors. What asked was the last "
        "drop; what matters is what held the rest.",
    )


def _leak(reading: Reading, snapshot: SnapshotReading | None) -> Finding | None:
    if snapshot is not None and snapshot.growing:
        first = snapshot.growing[0]
        return Finding(
            topic="leak",
            text=f"Memory grows: {first.where} left {first.blocks} blocks, {format_bytes(first.size_bytes)}, behind, some in "
            "every part of the history. Tensors kept in a list (losses without .item(), outputs with their graph) do this.",
            size_bytes=first.size_bytes,
        )
    sizes = [size for _, size in reading.held]
    if len(sizes) < 5:
        return None
    rises = sum(later > earlier for earlier, later in zip(sizes, sizes[1:], strict=False))
    half = len(sizes) // 2
    grown = sizes[-1] - sizes[0]
    if rises < 0.8 * (len(sizes) - 1) or grown < max(16 * MiB, sizes[0] // 50) or sizes[-1] - sizes[half] < grown // 5:
        return None
    steps = reading.held[-1][0] - reading.held[0][0]
    return Finding(
        topic="leak",
        text=f"Memory grows from step to step: from {format_bytes(sizes[0])} to {format_bytes(sizes[-1])}, "
        f"{format_bytes(grown // max(1, steps))} each. Tensors kept in a list (losses without .item(), outputs with "
        "their graph) do this; no setting cures it.",
        size_bytes=grown,
    )
