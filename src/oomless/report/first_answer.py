"""The first answer on the terminal: what the error says, what follows from it, and what to try."""

from __future__ import annotations

from oomless.diagnosis.attribution import Suspect
from oomless.diagnosis.findings import outside_bytes
from oomless.diagnosis.first_answer import FirstAnswer
from oomless.diagnosis.messages import OutOfMemory
from oomless.report.paper import Teller
from oomless.report.pictures import made_of
from oomless.units import format_bytes

SUSPECTS = 3
TITLES = {
    "allocator": "the GPU is full",
    "driver": "the driver refused",
    "library": "the GPU is full",
    "kernel": "a kernel wants more than a multiprocessor has",
    "host": "the host is full",
    "killed": "the process was killed",
    "engine": "no room for the engine's cache",
    "placement": "not all layers found room on the GPU",
}
FROM = {"given": "given", "log": "from the text", "tool": "the tool's default", "default": "by default"}


def print_first_answer(screen: Teller, answer: FirstAnswer) -> None:
    """Print what can be said at once."""
    _print_error(screen, answer)
    _print_numbers(screen, answer)
    _print_known(screen, answer)
    for finding in answer.findings:
        screen.say((f"{finding.topic}:", "bold yellow"), f" {finding.text}")
        if finding.remedy:
            screen.say("do: ", (finding.remedy, "cyan"), indent=2)
    print_suspects(screen, answer, answer.suspects)


def print_remedies(screen: Teller, answer: FirstAnswer) -> None:
    """Print what to try, of which nothing is rehearsed."""
    if not answer.remedies:
        return
    screen.title("What to try, in this order (from the reading alone, not rehearsed)")
    for number, remedy in enumerate(answer.remedies, 1):
        screen.say((f"{number}. ", "bold"), (remedy.title, "bold"), indent=2)
        screen.say((remedy.how, "cyan"), indent=5)


def print_why_not(screen: Teller, answer: FirstAnswer, why: str) -> None:
    """Print why nothing is rehearsed."""
    if answer.situation.reading.first is not None:
        screen.say((f"\nNothing is rehearsed: {why.rstrip('.')}.", "dim"))


def print_missing(screen: Teller, missing: tuple[str, ...]) -> None:
    """Print what would make the answer better."""
    if missing:
        screen.title("What would make this more certain")
        for line in missing:
            screen.say(line, indent=2)


def _print_error(screen: Teller, answer: FirstAnswer) -> None:
    reading = answer.situation.reading
    first = reading.first
    if first is None:
        known = answer.situation.model is not None
        screen.title("No out-of-memory error is in the text")
        if not known:
            screen.say(
                "Paste the error itself with the traceback above it, or give --model and --gpu and the settings of the run."
            )
        return
    message, place = first.message, first.place
    what = "managed memory was refused" if place.in_managed_memory else TITLES[message.kind]
    screen.title(f"{message.source}: {what}")
    screen.say(" ".join(message.words.split())[:600], style="dim")
    if first.count > 1:
        ranks = f", on ranks {', '.join(map(str, first.ranks))}" if first.ranks else ""
        screen.say(f"it stands {first.count} times in the text{ranks}")
    for other in reading.others[:3]:
        screen.say(f"also in the text: {' '.join(other.message.words.split())[:150]}", style="dim")
    if place.phase is None and place.code:
        screen.say("at ", (place.code, "cyan"))
    elif place.phase is not None:
        where = f", in {place.module}" if place.module else ""
        again = " (computing a checkpointed forward again)" if place.recomputing else ""
        screen.say(
            f"phase: {'generation' if place.generating else place.phase}{where}{again}",
            *((", at ", (place.code, "cyan")) if place.code else ()),
        )


def _print_numbers(screen: Teller, answer: FirstAnswer) -> None:
    first = answer.situation.reading.first
    if first is None or first.message.kind != "allocator":
        return
    rows = list(_numbers(first.message))
    if first.place.asked_bytes is not None:
        rows.insert(0, ("the code asks for", format_bytes(first.place.asked_bytes)))
    if len(rows) < 2:
        return
    screen.rows(rows)
    screen.draw(lambda: _filled(first.message))


def _filled(message: OutOfMemory) -> str:
    """Return what filled the GPU and what was asked for beyond it as a bar; empty where the message does not say."""
    if message.capacity is None or message.allocated is None or message.requested is None:
        return ""
    sizes = [
        ("held by tensors", message.allocated.middle),
        ("cached by PyTorch, unused", _cached_bytes(message) or 0),
        ("not PyTorch's here", outside_bytes(message) or 0),
        ("asked for", message.requested.middle),
    ]
    return made_of("What filled the GPU, by the message", sizes, [("the GPU has", message.capacity.middle)])


def _cached_bytes(message: OutOfMemory) -> int | None:
    if message.unallocated is not None:
        return message.unallocated.middle
    if message.reserved_bytes is None or message.allocated is None:
        return None
    return max(0, message.reserved_bytes.middle - message.allocated.middle)


def _numbers(message: OutOfMemory) -> list[tuple[str, str]]:
    sizes = [("asked for", message.requested), ("the GPU has", message.capacity), ("free", message.free)]
    sizes += [("allowed to this process", message.allowed), ("held by tensors", message.allocated)]
    rows = [(name, size.text) for name, size in sizes if size is not None]
    cached = _cached_bytes(message)
    if cached is not None:
        said = format_bytes(cached) if message.unallocated is None else message.unallocated.text
        rows.append(("cached by PyTorch, unused", said))
    outside = outside_bytes(message)
    if outside is not None and message.source in ("CUDA", "HIP"):
        rows.append(("not PyTorch's here", format_bytes(outside)))
    return rows


def _print_known(screen: Teller, answer: FirstAnswer) -> None:
    situation = answer.situation
    parts = [
        f"{name} {value}"
        for name, value in (("tool", situation.tool), ("model", situation.model), ("GPU", situation.gpu))
        if value
    ]
    if situation.method is not None:
        parts.append(f"method {situation.method}")
    for name, value in situation.values.items():
        source = situation.sources.get(name, "log")
        if source == "default":
            continue
        parts.append(f"{name} {value}" + (f" ({FROM[source]})" if source == "tool" else ""))
    if situation.mixed_precision is not None:
        parts.append(f"cast to {situation.mixed_precision}")
    if situation.attention is not None:
        parts.append(f"{situation.attention} attention")
    parts += [
        name.replace("_", " ") if value is True else f"{name} {value}"
        for name, value in situation.others.items()
        if name != "vllm"
    ]
    if parts:
        screen.say("the run, as far as it is told: ", ", ".join(parts))
    for note in situation.notes:
        screen.say(note, style="dim")


def print_suspects(
    screen: Teller, answer: FirstAnswer, suspects: tuple[Suspect, ...], by: str = "what has this size"
) -> None:
    """Print which tensors are of the size that was asked for, told ``by`` this."""
    first = answer.situation.reading.first
    if not suspects or first is None:
        return
    message = first.message
    asked = message.requested.text if message.requested is not None else ""
    screen.title(f"What asked for {asked}: {by}")
    alike: dict[tuple[str, int | None, tuple[str, ...]], list[str]] = {}
    for suspect in suspects:
        alike.setdefault(_same(suspect), []).append(suspect.tensor.kind)
    shown = list({_same(suspect): suspect for suspect in reversed(suspects)}.values())[::-1]
    for number, suspect in enumerate(shown[:SUSPECTS]):
        solved = f", if a sequence has {suspect.tokens:,} tokens" if suspect.solved else ""
        model = f", of {suspect.model} and models alike (a guess from the size alone)" if suspect.model else ""
        screen.say(
            (" or ".join(dict.fromkeys(alike[_same(suspect)])), "bold" if number == 0 else ""),
            f": {suspect.tensor.describe(suspect.tokens)} = {suspect.size_bytes:,} bytes ({suspect.tensor.of}{model})",
            f"{solved}{suspect.rounding}",
            indent=2,
        )
        for support in suspect.support:
            screen.say(support, indent=6, style="dim")


def _same(suspect: Suspect) -> tuple[str, int | None, tuple[str, ...]]:
    """Return what makes two suspects one line."""
    return suspect.tensor.describe(suspect.tokens), suspect.tokens, suspect.support
