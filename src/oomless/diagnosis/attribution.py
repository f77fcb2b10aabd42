"""What asked for the memory: the printed size, held against every tensor that model and settings can make.

The size in a message is that of the segment which PyTorch's allocator wanted, so each candidate goes through the
allocator's own rounding before it is compared. What fits is ranked by what supports it: the phase and the module of the
stack frames, the code they show, the request at which a rehearsal of the same settings stops, and how usual it is. Where
the length is not known it is solved for, and round numbers of tokens count for more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomless import catalogue
from oomless.diagnosis.frames import Place
from oomless.diagnosis.messages import OutOfMemory
from oomless.diagnosis.sizes import ByteRange
from oomless.diagnosis.tensors import DEEPSPEED, Dimensions, Tensor, of_activations
from oomless.memory.allocator import CachingAllocator
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.units import MiB

if TYPE_CHECKING:
    from oomless.memory.profile import Request

SHOWN = 5
LONGEST_ODD = 8192
"""A length that is solved for is believed above this only where it is a power of two."""

LONGEST_TOKENS = 1 << 20
_UNSLOTH = "roundup_power2_divisions:[32:256,64:128,256:64,>:32]"
_ROUNDINGS = (("", AllocatorSettings()), (f", rounded up by {_UNSLOTH}", AllocatorSettings.parse(_UNSLOTH)))
_SHARED_SEGMENTS = (2 * MiB, 20 * MiB)
"""Segments that many sizes share, so that their size says little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A tensor that may have asked, and what speaks for it."""

    tensor: Tensor
    tokens: int | None
    """Tokens in a block, where the size depends on them."""

    solved: bool
    """Whether the tokens were found from the size."""

    size_bytes: int
    score: float
    support: tuple[str, ...]
    model: str | None = None
    """A model of the catalogue, where none was named."""

    rounding: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "kind": self.tensor.kind,
            "of": self.tensor.of,
            "shape": self.tensor.describe(self.tokens),
            "bytes": self.size_bytes,
            "tokens": self.tokens,
            "tokens_solved_for": self.solved,
            "score": round(self.score, 2),
            "support": list(self.support),
            "model": self.model,
        }


class Sizes:
    """Which sizes are printed as one range: the request itself, or the segment that the allocator wanted for it."""

    def __init__(self, requested: ByteRange, *, exact: bool, unsloth: bool) -> None:
        self.requested, self.exact = requested, exact
        named = _ROUNDINGS[::-1] if unsloth else _ROUNDINGS
        self.allocators = [(text, CachingAllocator(1 << 50, settings)) for text, settings in named]

    @property
    def says_little(self) -> bool:
        """Whether this is a segment that requests of many sizes share."""
        return not self.exact and any(size in self.requested for size in _SHARED_SEGMENTS)

    def match(self, size_bytes: int) -> str | None:
        """Return how a request of ``size_bytes`` is printed so: as it is (empty) or rounded; ``None`` if it is not."""
        if size_bytes <= 0:
            return None
        if self.exact:
            return "" if size_bytes in self.requested or size_bytes + -size_bytes % 512 in self.requested else None
        for text, allocator in self.allocators:
            if allocator.segment_size(allocator.round_size(size_bytes)) in self.requested:
                return text
        return None

    def tokens(self, tensor: Tensor, at_most: int) -> int | None:
        """Return the roundest number of tokens for which ``tensor`` is printed so; ``None`` if there is none."""
        low = self._first(tensor, self.requested.low - 2 * MiB - 512)
        high = self._first(tensor, self.requested.high + 1) - 1
        most = min(high, at_most)
        most = min(most, self._first(tensor, tensor.size_bytes(most)))  # a size that grows no more is looked at once
        fitting = range(max(2, low), most + 1)
        for power in range(20, -1, -1):
            step = 1 << power
            for tokens in range(-(-fitting.start // step) * step, fitting.stop, step):
                if self.match(tensor.size_bytes(tokens)) == "":
                    return tokens
        return None

    @staticmethod
    def _first(tensor: Tensor, size_bytes: int) -> int:
        """Return the least tokens whose tensor has at least ``size_bytes``."""
        low, high = 0, LONGEST_TOKENS + 1
        while low < high:
            middle = (low + high) // 2
            if tensor.size_bytes(middle) >= size_bytes:
                high = middle
            else:
                low = middle + 1
        return low


def roundness(tokens: int) -> float:
    """Return how much a number of tokens speaks for itself: powers of two most, odd numbers not at all."""
    if tokens & (tokens - 1) == 0:
        return 2.0 if tokens >= 128 else 0.5
    trailing = tokens & -tokens
    return 1.0 if trailing >= 256 else 0.5 if trailing >= 64 else -0.5


def is_believable(tokens: int) -> bool:
    """Whether a number of tokens that was solved for may be one that somebody chose."""
    return roundness(tokens) >= 2 or tokens <= LONGEST_ODD


def suspects(
    message: OutOfMemory,
    place: Place,
    tensors: Iterable[Tensor],
    *,
    tokens: int | None,
    positions: int | None = None,
    unsloth: bool = False,
    stopped_at: Request | None = None,
) -> list[Suspect]:
    """Return the tensors whose size is that of ``message``, the likeliest first; none against which more speaks than for it.

    Args:
        message: the error.
        place: where it arose.
        tensors: everything that could have asked.
        tokens: in a block; ``None`` solves for them.
        positions: the most tokens that the model takes.
        unsloth: whether that tool's rounding of the allocator is in force.
        stopped_at: where a rehearsal of the same settings ran out.
    """
    if message.requested is None:
        return []
    sizes = Sizes(message.requested, exact=message.exact, unsloth=unsloth)
    found: list[Suspect] = []
    for tensor in tensors:
        length = tokens
        if tensor.of_tokens is not None and place.phase in ("load", "save"):
            continue  # no text is there yet, or any more
        if tensor.of_tokens is not None and tokens is None:
            if sizes.says_little:
                continue
            length = sizes.tokens(tensor, min(positions or LONGEST_TOKENS, LONGEST_TOKENS))
            if length is None or not (is_believable(length) or (place.generating and _hint(tensor, place))):
                continue
        size_bytes = tensor.size_bytes(length or 0)
        rounding = sizes.match(size_bytes)
        if rounding is None:
            continue
        solved = tensor.of_tokens is not None and tokens is None
        score, support = _judge(tensor, place, size_bytes, stopped_at)
        if sizes.says_little:
            score += math.log2(1 + size_bytes / (20 * MiB))
        if solved and length is not None:
            score += roundness(length)
        elif place.phase is None and tensor.of_tokens is None and tokens is None:
            score += 2.0  # a size that a matrix of the model has needs no length to be solved for
        if rounding:
            score -= 0.0 if unsloth else 1.0
        found.append(
            Suspect(
                tensor=tensor,
                tokens=length if tensor.of_tokens is not None else None,
                solved=solved,
                size_bytes=size_bytes,
                score=score,
                support=support,
                rounding=rounding,
            )
        )
    return _distinct(sorted((s for s in found if s.score > 0), key=lambda suspect: -suspect.score))


def _judge(tensor: Tensor, place: Place, size_bytes: int, stopped_at: Request | None) -> tuple[float, tuple[str, ...]]:
    score, support = tensor.prior, []
    phase = place.phase
    if phase is not None:
        loss_in_forward = phase in ("forward", "loss") and bool(tensor.phases & {"forward", "loss"})
        recomputed = place.recomputing and "forward" in tensor.phases
        if phase in tensor.phases or recomputed:
            score += 3
            support.append(f"the stack is in the {phase} phase")
        elif loss_in_forward and tensor.of_tokens is not None:
            score += 0.5
        else:
            score -= 3
    if place.module is not None:
        if place.module in tensor.modules:
            score += 2
            support.append(f"the stack is in {place.module}")
        elif tensor.modules:
            score -= 1.5
    if place.frames and "/runtime/zero/" in place.frames[-1].path and tensor.of != DEEPSPEED:
        score -= 2
    hint = _hint(tensor, place)
    if hint is not None:
        score += 2
        support.append(f"the code says {hint}")
    if stopped_at is not None and stopped_at.size_bytes == size_bytes:
        rehearsed = phase_of_request(stopped_at)
        agrees = rehearsed in tensor.phases or (
            rehearsed in ("forward", "loss") and tensor.phases & {"forward", "loss"}
        )
        in_module = not tensor.modules or not stopped_at.module or any(m in stopped_at.module for m in tensor.modules)
        elsewhere = place.module is not None and stopped_at.module and place.module not in stopped_at.module
        made_so = any(stopped_at.operation.startswith(operation) for operation in tensor.operations)
        # Where the code says what made it.
        told = place.code.endswith(".float()") and "aten._to_copy" not in tensor.operations
        if agrees and in_module and not elsewhere and not told and (made_so or not tensor.operations):
            score += 2 + made_so + (rehearsed in tensor.phases) + bool(tensor.modules and stopped_at.module)
            where = f" in {stopped_at.module}" if stopped_at.module else ""
            support.append(f"a rehearsal of these settings stops here, at {stopped_at.operation}{where}")
    return score, tuple(support)


def _hint(tensor: Tensor, place: Place) -> str | None:
    """Return the piece of the innermost code that makes ``tensor``; ``None`` where there is none."""
    codes = (place.code, *(frame.code for frame in place.frames[-1:]))
    return next((hint for hint in tensor.hints if any(hint in code for code in codes)), None)


def phase_of_request(request: Request) -> str:
    """Return the phase of a rehearsed request; the loss's own part of the backward pass is backward."""
    return "backward" if request.phase == "loss" and "_backward" in request.operation else request.phase


def _distinct(found: list[Suspect]) -> list[Suspect]:
    kept: dict[tuple[str, str, int | None], Suspect] = {}
    for suspect in found:
        kept.setdefault((suspect.tensor.kind, suspect.tensor.shape, suspect.tokens), suspect)
    return list(kept.values())


def suspects_in_the_catalogue(
    message: OutOfMemory, place: Place, *, unsloth: bool, tokens: int | None = None
) -> list[Suspect]:
    """Return suspects for a model that nobody named: logits over known vocabularies with ``tokens``, or a round number of them.

    Where several vocabularies would do, or the phase is not known, none is named.
    """
    if message.requested is None or place.phase is None:
        return []
    best: list[Suspect] = []
    for name, vocabulary, hidden in _vocabularies():
        shape = Dimensions(
            vocabulary=vocabulary, hidden=hidden, mlp=0, heads=0, key_heads=0, head_width=0, positions=None
        )
        logits = [t for t in of_activations(shape, 1, 2) if t.of == "lm_head" and "shifted" not in t.kind]
        for suspect in suspects(message, place, logits, tokens=None, unsloth=unsloth):
            length = suspect.tokens or 0
            if length == tokens or (tokens is None and roundness(length) >= 2):
                best.append(_with_model(suspect, name))
    vocabularies = {suspect.tensor.shape.split(" x ")[1] for suspect in best}
    return _distinct(sorted(best, key=lambda suspect: -suspect.score)) if len(vocabularies) < 3 else []


def _with_model(suspect: Suspect, name: str) -> Suspect:
    values: dict[str, Any] = {field: getattr(suspect, field) for field in Suspect.__slots__}
    return Suspect(**{**values, "model": name})


_WELL_KNOWN = ("meta-llama/", "Qwen/", "mistralai/", "google/", "microsoft/")


def _vocabularies() -> Iterator[tuple[str, int, int]]:
    seen = set()
    latest_first = catalogue.models()[::-1]
    for name in sorted(latest_first, key=lambda name: not name.startswith(_WELL_KNOWN)):
        config = catalogue.model_config(name)
        text = config.get("text_config", config)
        vocabulary, hidden = text.get("vocab_size"), text.get("hidden_size") or text.get("n_embd")
        if vocabulary and hidden and (vocabulary, hidden) not in seen:
            seen.add((vocabulary, hidden))
            yield name, int(vocabulary), int(hidden)
