"""What a text says by itself, before any rehearsal, and what to do about each: other processes, limits, leaks, other memories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from oomless.diagnosis.arithmetic import fixed
from oomless.diagnosis.elsewhere import elsewhere
from oomless.diagnosis.frames import Place
from oomless.diagnosis.messages import ON_GPU, OutOfMemory
from oomless.diagnosis.several import WORDS
from oomless.diagnosis.sharing import of_sharing
from oomless.diagnosis.situation import Situation
from oomless.diagnosis.sizes import ByteRange
from oomless.units import GiB, MiB, counted, format_bytes

if TYPE_CHECKING:
    from oomless.diagnosis.snapshots import SnapshotReading

Topic = Literal[
    "other processes",
    "unexplained",
    "fragmentation",
    "larger than the device",
    "more than the device",
    "limit",
    "leak",
    "late",
    "small request",
    "library",
    "driver",
    "not GPU memory",
    "engine",
    "private pools",
    "free memory",
    "several GPUs",
    "method",
    "too large for this GPU",
    "several errors",
    "evaluation",
]
ADAMW_BY_DEFAULT = ("trainer", "trl", "llamafactory", "ms-swift", "axolotl")
"""Tools that take AdamW where they are not told."""

LATE_STEPS = 20
CONTEXT_BYTES = GiB // 2
"""A usual CUDA context with its libraries."""

LARGEST_CONTEXT_BYTES = 2 * GiB
"""More outside of PyTorch's allocator than this is not one process's CUDA context and libraries."""

MUCH = 0.02
"""Cached memory that no tensor uses is worth a word from this share of the GPU on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that the message or the log shows, and what to do about it."""

    topic: Topic
    text: str
    remedy: str = ""
    size_bytes: int = 0

    def to_dict(self) -> dict[str, str | int]:
        """Return plain values for JSON."""
        return {"topic": self.topic, "text": self.text, "remedy": self.remedy, "bytes": self.size_bytes}


def find(situation: Situation, snapshot: SnapshotReading | None = None) -> list[Finding]:
    """Return what ``situation`` shows."""
    reading, found = situation.reading, list[Finding]()
    if reading.first is not None:
        message = reading.first.message
        place = reading.first.place
        topic, text, remedy = elsewhere(message, place, situation)
        if text:
            found.append(Finding(topic=topic, text=text, remedy=remedy))  # type: ignore[arg-type]
        found += [
            *_engine(situation),
            *_too_large(message),
            *_others(message, situation),
            *_more_than_there_is(message),
            *_fragmented(message, situation),
            *_limited(message),
            *_pools(message),
            *_free(message),
            *_small(message),
            *_kept(place),
        ]
    if reading.first is None or reading.first.message.kind in ON_GPU:
        found += [*_several(situation), *_method(situation), *_fixed(situation), *_leak(situation, snapshot)]
    return found


def _too_large(message: OutOfMemory) -> Iterator[Finding]:
    if (
        message.requested is not None
        and message.capacity is not None
        and message.requested.low > message.capacity.high
        and message.kind == "allocator"
    ):
        yield Finding(
            topic="larger than the device",
            text=f"One tensor of {message.requested.text} is more than the whole GPU has ({message.capacity.text}). Freeing "
            "memory cannot help.",
            remedy="this tensor must become smaller, or never be made: fewer tokens or sequences at once, or an attention or a "
            "loss that does not hold it whole",
            size_bytes=message.requested.low,
        )


def outside_bytes(message: OutOfMemory) -> int | None:
    """Return what lies on the GPU outside of this process's allocator, as far as the message's numbers say it."""
    reserved, capacity = message.reserved_bytes, message.capacity
    if message.kind != "allocator" or capacity is None:
        return None
    if message.allowed is not None and message.allowed.middle < capacity.middle:
        return capacity.middle - message.allowed.middle
    if message.free is None or reserved is None:
        return None
    return max(0, capacity.middle - message.free.middle - reserved.middle)


def others_bytes(message: OutOfMemory) -> int:
    """Return what processes other than the one that failed hold of the GPU, as far as the message says it."""
    sizes = [size.middle for _, size in message.processes]
    if message.in_use is not None:
        return sum(sizes)
    reserved = message.reserved_bytes
    if len(sizes) > 1 and reserved is not None:
        own = min((s for s in sizes if s >= reserved.low), key=lambda s: s - reserved.low, default=max(sizes))
        return sum(sizes) - own
    return 0


def _others(message: OutOfMemory, situation: Situation) -> Iterator[Finding]:
    held, count = others_bytes(message), len(message.processes) - (message.in_use is None)
    if held >= 64 * MiB:
        each = held // max(1, count)
        text = f"Other processes hold {format_bytes(held)} of this GPU ({counted(count, 'process').replace('processs', 'processes')})."
        if situation.several.many and each < 1.5 * GiB:
            yield Finding(
                topic="other processes",
                text=f"{text} About {format_bytes(each)} each is what a CUDA context takes: it seems that the other ranks opened "
                "this GPU too.",
                remedy='each process takes its own GPU first: torch.cuda.set_device(int(os.environ["LOCAL_RANK"])), '
                'device_map={"": local_rank}, and torch.load(..., map_location="cpu")',
                size_bytes=held,
            )
        else:
            numbers = ", ".join(str(number) for number, _ in message.processes[:6])
            engine = "; the text names vLLM, whose engine may be one of them" if situation.others.get("vllm") else ""
            if _in_engine(situation):
                engine = "; it is vLLM's engine that failed, so the training beside it may be one of them"
            yield Finding(
                topic="other processes",
                text=f"{text[:-1]}; numbers in the message: {numbers}{engine}.",
                remedy="nvidia-smi shows what they are; end those that are yours (a notebook that was not shut down, a run that "
                "was killed), or take another GPU with CUDA_VISIBLE_DEVICES",
                size_bytes=held,
            )
        return
    yield from _unexplained(message, situation)


def _in_engine(situation: Situation) -> bool:
    first = situation.reading.first
    return first is not None and first.place.in_engine


def _engine(situation: Situation) -> Iterator[Finding]:
    if _in_engine(situation):
        yield Finding(
            topic="engine",
            text="It is vLLM's engine that asked, not the training: it takes its share of the whole GPU, for its weights and its key-value "
            "cache, whatever else is on it.",
            remedy="a smaller share (gpu_memory_utilization), or a GPU on which nothing trains: one process fewer than there are GPUs, and "
            "vLLM as a server on the last",
        )


def _unexplained(message: OutOfMemory, situation: Situation) -> Iterator[Finding]:
    outside, reserved = outside_bytes(message), message.reserved_bytes
    if outside is None or reserved is None or message.allowed is not None or message.source not in ("CUDA", "HIP"):
        return
    own = message.in_use or (message.processes[0][1] if len(message.processes) == 1 else None)
    beside = max(0, own.middle - reserved.middle) if own is not None and own.middle >= reserved.low else None
    rest = outside if beside is None else outside - beside
    engine = situation.others.get("vllm")
    if beside is not None and beside > (2 if situation.several.many else 1) * LARGEST_CONTEXT_BYTES:
        guess = (
            "vLLM's engine, which the text names"
            if engine
            else "libraries with memory of their own (NCCL, vLLM, bitsandbytes)"
        )
        yield Finding(
            topic="unexplained",
            text=f"This process holds {format_bytes(beside)} of this GPU beside PyTorch's allocator; a CUDA context takes about half a GiB. "
            f"Likely {guess}; this is a guess, the message does not say.",
            remedy="give vLLM less of the GPU (gpu_memory_utilization)" if engine else "",
            size_bytes=beside,
        )
    if rest > (2 if situation.several.many else 1) * LARGEST_CONTEXT_BYTES:
        guess = (
            "vLLM beside the training is likely, as the text names it (a guess)"
            if engine
            else "it may be another process that the driver does not name, as in containers and WSL (a guess)"
        )
        yield Finding(
            topic="unexplained",
            text=f"{format_bytes(rest)} are in use on this GPU and not PyTorch's in this process; the message does not say whose: {guess}.",
            remedy="nvidia-smi on the machine itself shows it"
            + ("; give vLLM less: gpu_memory_utilization" if engine else ""),
            size_bytes=rest,
        )


def _more_than_there_is(message: OutOfMemory) -> Iterator[Finding]:
    held, capacity = message.reserved_bytes or message.allocated, message.capacity
    if (
        message.kind == "allocator"
        and message.source != "MPS"
        and held is not None
        and capacity is not None
        and held.low > capacity.high
    ):
        yield Finding(
            topic="more than the device",
            text=f"PyTorch holds {format_bytes(held.middle)}, which is more than the GPU has ({capacity.text}): the driver has put a "
            "part into the machine's own memory, as Windows and WSL do. That is very slow, long before it fails.",
            remedy='NVIDIA control panel, "CUDA - Sysmem Fallback Policy": prefer no fallback; then make the run fit',
            size_bytes=held.middle,
        )


def _fragmented(message: OutOfMemory, situation: Situation) -> Iterator[Finding]:
    reserved, allocated, requested = message.reserved_bytes, message.allocated, message.requested
    if message.unallocated is not None:
        cached = message.unallocated.low
    elif reserved is not None and allocated is not None:
        cached = reserved.low - allocated.high
    else:
        return
    capacity = message.capacity
    if requested is None or cached < requested.high or cached < 32 * MiB:
        return
    if capacity is not None and (
        cached < MUCH * capacity.middle or (reserved is not None and reserved.low > capacity.high)
    ):
        return
    on = situation.others.get("expandable")
    sleeps = situation.others.get("vllm_sleeps") and not situation.others.get("vllm_server")
    alone = (
        "; not with vLLM's sleep mode in the same process"
        if situation.others.get("vllm") or situation.tool == "verl"
        else ""
    )
    yield Finding(
        topic="fragmentation",
        text=f"PyTorch holds {format_bytes(cached)} that no tensor uses, more than the {requested.text} that were asked for, "
        "but in pieces none of which is large enough.",
        remedy="expandable_segments is on already; batches of one padded length leave fewer holes"
        if on
        else "batches of one padded length leave fewer holes; expandable_segments is not for a process in which vLLM sleeps, as here"
        if sleeps
        else "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set before Python starts; it changes no number of the training "
        f"(not on Windows{alone})",
        size_bytes=cached,
    )


def _limited(message: OutOfMemory) -> Iterator[Finding]:
    if message.allowed is None or (message.capacity is not None and message.allowed.high >= message.capacity.low):
        return
    if message.source == "MPS":
        yield Finding(
            topic="limit",
            text=f"Metal lets PyTorch take {message.allowed.text} of the Mac's memory, which the rest of the system shares.",
            remedy="a smaller or quantised model, shorter blocks, a batch of 1; close other programs. "
            "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 takes the limit away, but the Mac may then swap or freeze",
            size_bytes=message.allowed.middle,
        )
        return
    yield Finding(
        topic="limit",
        text=f"The process may take {message.allowed.text} only: a limit that was set for it, not the size of the GPU.",
        remedy="torch.cuda.set_per_process_memory_fraction (or the tool's setting that calls it) sets it: raise it",
        size_bytes=message.allowed.middle,
    )


def _pools(message: OutOfMemory) -> Iterator[Finding]:
    pools = message.private_pools
    if pools is not None and message.allocated is not None and pools.middle >= message.allocated.middle // 10:
        yield Finding(
            topic="private pools",
            text=f"{pools.text} lie in private pools, which CUDA graphs keep to themselves.",
            remedy="torch.compile without mode='reduce-overhead'; with vLLM, enforce_eager=True",
            size_bytes=pools.middle,
        )


def _free(message: OutOfMemory) -> Iterator[Finding]:
    free, requested = message.free, message.requested
    if free is None or requested is None or free.low <= requested.high or message.allowed is not None:
        return
    yield Finding(
        topic="free memory",
        text=f"The GPU had {free.text} free when {requested.text} were refused. Memory was given back in between, or by "
        "another process, or a limit is set; what ran out may not be what is shown.",
        remedy="look at nvidia-smi for others that come and go; in a container or with MIG, for the limit that it sets",
        size_bytes=free.middle,
    )


def _small(message: OutOfMemory) -> Iterator[Finding]:
    if message.requested is None or message.exact or message.requested.high > 20.005 * MiB:
        return
    yield Finding(
        topic="small request",
        text=f"{message.requested.text} is the size in which PyTorch takes memory for small tensors. What asked was the last "
        "drop; what matters is what held the rest.",
    )


def _kept(place: Place) -> Iterator[Finding]:
    if place.keeps_outputs:
        yield Finding(
            topic="evaluation",
            text="The evaluation keeps the outputs (logits) of all its batches on the GPU, and puts each batch's to those before: what it holds "
            "grows with the number of examples, and a smaller batch changes nothing in it.",
        )


def _several(situation: Situation) -> Iterator[Finding]:
    several, reading = situation.several, situation.reading
    gpus = reading.failed_gpus
    ranks = sorted({rank for o in reading.occurrences for rank in o.ranks})
    if not several.many and len(gpus) < 2:
        return
    count = "" if several.gpus is None else f"{'at least ' if several.at_least else ''}{several.gpus} GPUs"
    how = WORDS[several.sharing] if several.sharing is not None else "how they share the work, the text does not say"
    failed = ""
    if ranks:
        failed = f" Rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))} failed."
    elif gpus:
        failed = f" GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus[:8]))} failed."
    yield Finding(
        topic="several GPUs", text=f"{count}{', ' if count else ''}{how}.{failed}", remedy=of_sharing(situation)
    )


def _method(situation: Situation) -> Iterator[Finding]:
    method, reference = (
        situation.method,
        "a copy of the weights as reference (none where LoRA trains: the base is the reference)",
    )
    texts = {
        "dpo": f"DPO runs the chosen and the rejected answer together, so a batch of 1 is two sequences, and keeps {reference}.",
        "kto": f"KTO keeps {reference}, and runs each batch twice, for the KL term.",
        "orpo": "ORPO and SimPO run the chosen and the rejected answer together, so a batch of 1 is two sequences; there is no reference model.",
        "grpo": "GRPO generates several answers to each prompt and then computes the log-probabilities of all their tokens: logits of "
        f"batch x length x vocabulary. Beside the training lie {reference}, unless beta is 0 (as in today's TRL where it is not told), and vLLM's share of the GPU where it is used.",
        "ppo": f"PPO holds the policy, a value model, {reference} and often a reward model, and generates in between.",
        "reward model": "A reward model runs the chosen and the rejected answer together, so a batch of 1 is two sequences; there are no logits over the vocabulary.",
        "gkd": "GKD holds a teacher beside the student, and logits over the whole vocabulary of both, several times over. "
        "TRL's DistillationTrainer computes the same loss in chunks, on answers that the student generates.",
        "distillation": "Distillation holds a teacher beside the student, and logits over the whole vocabulary of both.",
    }
    if method in texts:
        yield Finding(topic="method", text=texts[method])


def _fixed(situation: Situation) -> Iterator[Finding]:
    held, capacity = fixed(situation), situation.capacity_bytes
    if held is None or capacity is None:
        return
    first = situation.reading.first
    loading = first is not None and first.place.phase == "load"
    parts = [("weights", held.weights_bytes)]
    if not loading:
        parts += [("gradients", held.gradients_bytes), ("optimizer state", held.state_bytes)]
    total = sum(size for _, size in parts)
    if total <= 0.9 * capacity:
        return
    said = ", ".join(f"{format_bytes(size)} of {name}" for name, size in parts if size)
    least = "at least " if held.at_least else ""
    assumed = _assumed(situation, loading)
    start = f"If {' and '.join(assumed)} (the text does not say), each" if assumed else "By arithmetic each"
    end = " Then no batch size and no length can help." if assumed else " No batch size and no length can help."
    yield Finding(
        topic="too large for this GPU",
        text=f"{start} GPU holds {least}{said}: {format_bytes(total)} of {format_bytes(capacity)}, before any activation."
        + (end if total > capacity else ""),
        size_bytes=total,
    )


def _assumed(situation: Situation, loading: bool) -> list[str]:
    """Return what the arithmetic takes for granted of the training, in words."""
    whole = situation.mixed_precision is not None and "dtype" not in situation.values
    fp32 = ["the weights are in fp32"] if whole and not (situation.several.sharing or "").startswith("zero") else []
    if loading or not situation.trains_all:
        return fp32
    optimizer = str(situation.values.get("optimizer", "adamw")).replace("adamw", "AdamW").replace("_8bit", " in 8 bits")
    said = [
        ("trainable" in situation.values, "all weights train"),
        ("optimizer" in situation.values or situation.tool in ADAMW_BY_DEFAULT, f"the optimizer is {optimizer}"),
    ]
    return [words for known, words in said if not known] + fp32


def _leak(situation: Situation, snapshot: SnapshotReading | None) -> Iterator[Finding]:
    reading = situation.reading
    remedy = "look for tensors that are kept from step to step: losses without .item(), outputs with their graph; no setting cures it"
    if snapshot is not None and snapshot.growing:
        first = snapshot.growing[0]
        yield Finding(
            topic="leak",
            text=f"Memory grows: {first.where} left {first.blocks} blocks, {format_bytes(first.size_bytes)}, behind, some in "
            "every part of the history.",
            remedy=remedy,
            size_bytes=first.size_bytes,
        )
        return
    grown = _grown([size for _, size in reading.held])
    if grown:
        sizes = [size for _, size in reading.held]
        steps = reading.held[-1][0] - reading.held[0][0]
        yield Finding(
            topic="leak",
            text=f"Memory grows from step to step: from {format_bytes(sizes[0])} to {format_bytes(sizes[-1])}, "
            f"{format_bytes(grown // max(1, steps))} each.",
            remedy=remedy,
            size_bytes=grown,
        )
    elif (
        reading.first is not None
        and (reading.steps_done or 0) >= LATE_STEPS
        and reading.first.place.phase not in ("evaluation", "save")
    ):
        yield Finding(
            topic="late",
            text=f"It ran for {counted(reading.steps_done or 0, 'step')} before. A run whose steps are all alike fails in its first "
            "two, so either a batch was longer than any before, something else began (an evaluation, a save, another "
            "process), or memory grows from step to step.",
            remedy="set the longest length that a batch may have, so that the first steps show what the run needs; watch "
            "torch.cuda.memory_allocated() over some steps",
        )


def _grown(sizes: list[int]) -> int:
    """Return by how much the sizes grow, if they grow from beginning to end; else 0."""
    if len(sizes) < 5:
        return 0
    rises = sum(later > earlier for earlier, later in zip(sizes, sizes[1:], strict=False))
    half, grown = len(sizes) // 2, sizes[-1] - sizes[0]
    if rises < 0.8 * (len(sizes) - 1) or grown < max(16 * MiB, sizes[0] // 50) or sizes[-1] - sizes[half] < grown // 5:
        return 0
    return grown


def said(size: ByteRange | None) -> str:
    """Return the printed size, or words for one that is not said."""
    return size.text if size is not None else "more than there is"
