"""Where nothing fits: the smallest change that would make it fit.

A pin that can be dropped, a shorter sequence, more host memory, a larger GPU, a smaller model of the family. Each is rehearsed
before it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from oomless import catalogue
from oomless.config import TrainConfig
from oomless.errors import UserError
from oomless.models.build import parameter_count
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.choice import Choice
from oomless.planning.plan import HOST_SHARE, Target, target_for, usable_host_bytes
from oomless.planning.row import Row
from oomless.planning.search import search
from oomless.planning.strategies import Settings
from oomless.units import GiB, format_bytes

PINS_OF_TECHNIQUE = (
    *("per_device_train_batch_size", "gradient_checkpointing", "weight_precision", "optimizer", "quantization"),
    *("max_grad_norm", "dtype", "trainable"),
)
"""What may be dropped of what the user gave, what costs least first."""

SHORTEST = 128

T = TypeVar("T")


def smallest_changes(spec: ModelSpec, choice: Choice, results: Path | None) -> Iterator[str]:
    """Yield, for a ``choice`` without a pick, changes after which there is one: at most one of each kind."""
    given, target = choice.given, choice.target

    def found(changed: Settings, on: Target = target, model: ModelSpec = spec) -> Row | None:
        try:
            return search(model, changed, on, results=results).picked
        except UserError:
            return None

    for pin in PINS_OF_TECHNIQUE:
        if pin in given and (row := found({key: value for key, value in given.items() if key != pin})):
            yield f"without --{pin.replace('_', '-')} {given[pin]}: {row.quality}"
            break
    for needed in sorted({row.host_bytes for row in choice.rows if row.host_bytes}):
        size = -(-int(needed / HOST_SHARE) // GiB)
        if row := found(given, replace(target, host_bytes=usable_host_bytes(size * GiB) // target.gpus_of_machine)):
            yield f"with {size} GiB of host memory (--host-memory {size}GiB): {row.quality}"
            break
    length = given.get("max_seq_length", TrainConfig.max_seq_length) // 2
    while length >= SHORTEST:
        if row := found({**given, "max_seq_length": length}):
            yield f"with --max-seq-length {length}: {row.quality}"
            break
        length //= 2
    larger = sorted(catalogue.gpus(), key=lambda gpu: gpu.usable_bytes)
    names = [gpu.name for gpu in larger if gpu.usable_bytes > target.capacity_bytes]
    if best := first_with(names, lambda name: found(given, target_for(name))):
        name, row = best
        yield f"on a larger GPU, {name} ({format_bytes(target_for(name).usable_bytes)} usable): {row.quality}"
    own = parameter_count(spec)
    smaller = [name for name in catalogue.models_of(str(spec.config.model_type)) if catalogue.parameters(name) < own]
    if best := first_with(smaller, lambda name: found({**given, "model": name}, target, resolve_for_plan(name))):
        name, row = best
        yield f"with a smaller model, {name}: {row.quality}"


def first_with(names: Sequence[str], answer: Callable[[str], T | None]) -> tuple[str, T] | None:
    """Return the first of ``names`` to which there is an ``answer``, and it; there is one to all after it too."""
    best: tuple[str, T] | None = None
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        found = answer(names[middle])
        if found is None:
            low = middle + 1
        else:
            best, high = (names[middle], found), middle
    return best
