"""Which parts of a run are fused kernels: asked for, possible on its device, and right there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.operators import SMALLEST_CAPABILITY

UPDATES, LOSS = "updates", "the loss"
DOCUMENTS = "attention to packed documents"
SLOW_S = 2.0


def choose(
    config: TrainConfig, device: Device, tries: Mapping[str, Callable[[], None]]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Settle which parts of a run are fused; return them, and what a person should know of it.

    On a real GPU each part's kernels are made and tried first. A virtual one stands for a GPU on which they work.

    Args:
        config: says what is asked for.
        device: where the run is.
        tries: for each part what makes its kernels and raises where they do not do what they should.

    Raises:
        ConfigError: fused kernels are asked for and cannot be had.
    """
    if config.kernels == "plain":
        return frozenset(), ()
    reason = none_here(device)
    if reason is not None:
        missing = {} if config.kernels == "auto" and device.compute_capability is None else {reason: list(tries)}
        return frozenset(), _without(config, missing)
    if device.torch_device.type != "cuda":
        return frozenset(tries), ()
    before = time.perf_counter()
    faults = {part: fault for part, make in tries.items() if (fault := _fault(make)) is not None}
    took_s = time.perf_counter() - before
    by_fault = {fault: [part for part in faults if faults[part] == fault] for fault in faults.values()}
    took = (f"fused kernels were made and tried in {took_s:.0f} s",) if took_s > SLOW_S else ()
    return frozenset(tries.keys() - faults.keys()), (*took, *_without(config, by_fault))


def _fault(make: Callable[[], None]) -> str | None:
    try:
        make()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a driver, a package that is not there
        return f"they do not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
    return None


def _without(config: TrainConfig, missing: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return what is to be said of parts that are not fused, by the reason."""
    if missing and config.kernels == "fused":
        raise ConfigError(f"kernels: fused cannot be had: {next(iter(missing))}; remove it", "kernels")
    return tuple(
        f"no fused kernels for {' and '.join(parts)}: {reason}. Without them a run is slower and takes more memory"
        for reason, parts in missing.items()
    )


def are_wanted(config: TrainConfig, device: Device) -> bool:
    """Return whether a run on ``device`` has fused kernels where they work."""
    return config.kernels != "plain" and none_here(device) is None


def none_here(device: Device) -> str | None:
    """Return why there are no fused kernels for ``device``, in words; ``None`` where there are."""
    if device.compute_capability is None:
        return "they are for GPUs"
    if device.compute_capability < SMALLEST_CAPABILITY:
        asked, has = (".".join(map(str, pair)) for pair in (SMALLEST_CAPABILITY, device.compute_capability))
        return f"they need compute capability {asked}, and {device.name} has {has}"
    return None
