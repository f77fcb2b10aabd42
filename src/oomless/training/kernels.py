"""Whether a run's updates are fused kernels: asked for, possible on its device, and right there."""

from __future__ import annotations

import time

import torch

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.operators import SMALLEST_CAPABILITY
from oomless.optim.base import MemoryLeanOptimizer

SLOW_S = 2.0


def choose(optimizer: MemoryLeanOptimizer, config: TrainConfig, device: Device) -> tuple[str, ...]:
    """Settle whether ``optimizer`` is fused; return what a person should know of it.

    On a real GPU the kernels are made and tried first. A virtual one stands for a GPU on which they work.

    Raises:
        ConfigError: fused kernels are asked for and cannot be had.
    """
    optimizer.fused = False
    if config.kernels == "plain":
        return ()
    reason = none_here(device)
    if reason is None and device.torch_device.type == "cuda":
        before = time.perf_counter()
        try:
            optimizer.try_fused()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, a driver, a package that is not there
            reason = f"they do not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        else:
            optimizer.fused = True
            took_s = time.perf_counter() - before
            return (f"fused updates were made and tried in {took_s:.0f} s",) if took_s > SLOW_S else ()
    optimizer.fused = reason is None
    if reason is None or (config.kernels == "auto" and device.compute_capability is None):
        return ()
    if config.kernels == "fused":
        raise ConfigError(f"kernels: fused cannot be had: {reason}; remove it", "kernels")
    return (f"updates are not fused: {reason}. They are slower and take up to 64 MiB",)


def none_here(device: Device) -> str | None:
    """Return why there are no fused kernels for ``device``, in words; ``None`` where there are."""
    if device.compute_capability is None:
        return "they are for GPUs"
    if device.compute_capability < SMALLEST_CAPABILITY:
        asked, has = (".".join(map(str, pair)) for pair in (SMALLEST_CAPABILITY, device.compute_capability))
        return f"they need compute capability {asked}, and {device.name} has {has}"
    return None
