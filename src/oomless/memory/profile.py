"""``MemoryProfile``: what a run held, when, and for what; and the rules that say what a byte was for.

Every allocation has exactly one category for its whole life, so that the categories sum to what is allocated
at every event. It is decided by the first of these that applies:

1. What it was labelled as, the last label if there are several: by ``Device.label``, or by ``Device.watch``
   (parameters and buffers are weights, a gradient is labelled the moment it is accumulated, what
   ``optimizer.state`` holds is optimizer state). So a buffer that autograd made in a backward pass and that
   became ``.grad`` is a gradient from its birth.
2. Born in the loss phase, or in a backward pass by a node made in the loss phase: logits and loss.
3. Alive when the phase in which it was born ends: weights (load), saved activations (forward), optimizer
   state (optimizer). Alive when a module that a backward pass recomputed (checkpointing) ends: saved
   activations.
4. Anything else: temporaries.

An inner phase owns what is born in it; the outer one resumes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from oomless.memory.device import Category, Phase

CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One allocation that was asked for."""

    event: int
    """Which event of the run this is, from 0."""
    phase: Phase
    operation: str
    """The operator, such as ``aten.mm.default``."""
    module: str
    """Dotted path of the module whose forward, recomputation or backward it was; empty outside of all."""
    size_bytes: int
    """What was asked for, before the allocator rounded it."""
    segment_bytes: int = 0
    """What the allocator would have taken from the GPU for it; 0 where it did not have to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Allocations of one name that were held at a moment."""

    name: str
    """Of a tensor of the model, its gradient or its state; else the operator and the module that asked; empty for all the others."""
    allocations: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePeak:
    """The most that was allocated and reserved while a phase was running."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What was held after some events of a run, in their order; all sequences have one length."""

    events: tuple[int, ...]
    phases: tuple[Phase, ...]
    allocated_bytes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    bytes_by_category: Mapping[Category, tuple[int, ...]]
    """These sum to ``allocated_bytes`` at every event."""
    operations: tuple[str, ...]
    """Which operator asked for memory there; empty where none did."""
    modules: tuple[str, ...]
    """In which module it was, as of a ``Request``."""
    tensors: tuple[str, ...]
    """What it was asked for, where that has a name: a tensor of the model, its gradient or its state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryProfile:
    """What one run on one device held, in whole bytes."""

    device: str
    capacity_bytes: int
    outside_bytes: int
    """Taken outside the caching allocator: the context, libraries."""
    event_count: int
    """Allocations, frees, and changes of phase."""
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    phases: Mapping[Phase, PhasePeak]
    """In the order in which they were first entered."""
    peak: Request | None
    """The allocation that first reached ``peak_allocated_bytes``; ``None`` if there was none."""
    peak_bytes_by_category: Mapping[Category, int]
    """At that moment; they sum to ``peak_allocated_bytes``."""
    peak_holders: Mapping[Category, tuple[Holder, ...]]
    """Of each category that was held then, the largest and the rest."""
    cached_bytes: int
    """Reserved but not allocated at that moment."""
    failures: tuple[Request, ...]
    """The allocations that raised ``torch.OutOfMemoryError``."""
    timeline: Timeline

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> MemoryProfile:
        """Return the profile that ``to_dict`` wrote, also after a round trip through JSON.

        Raises:
            ValueError: the fields are not those of a profile.
        """
        try:
            timeline = plain["timeline"]
            fields = dict(plain) | {
                "phases": {name: PhasePeak(**peak) for name, peak in plain["phases"].items()},
                "peak": None if plain["peak"] is None else Request(**plain["peak"]),
                "peak_holders": {
                    name: tuple(Holder(**holder) for holder in holders)
                    for name, holders in plain["peak_holders"].items()
                },
                "failures": tuple(Request(**failure) for failure in plain["failures"]),
                "timeline": Timeline(
                    **dict(timeline, bytes_by_category={})
                    | {key: tuple(timeline[key]) for key in timeline if key != "bytes_by_category"}
                    | {
                        "bytes_by_category": {
                            name: tuple(values) for name, values in timeline["bytes_by_category"].items()
                        }
                    }
                ),
            }
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a memory profile has the fields that to_dict writes; {error}") from error
