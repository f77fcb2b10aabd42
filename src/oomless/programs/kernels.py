"""A script's own Triton kernels: launched they ask for no memory, and tuned for one buffer. What they write is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oomless.programs.stand_ins import StandIns

TUNING_BYTES = 256 << 20
"""What Triton's driver for CUDA clears between two trials, so that none finds the last one's data in the cache."""


def changes(stand_ins: StandIns) -> list[tuple[Any, str, Any]]:
    """Return what is to be patched in Triton, where it is installed."""
    try:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor):
                stand_ins.forget(argument)

    def trial(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        cleared = torch.empty(TUNING_BYTES // 4, dtype=torch.int, device="cuda")
        call()
        del cleared
        return [0.0 for _ in quantiles]

    def always_tuned(tuner: Any, key: Any, configs: Any, tune: Callable[[], None]) -> bool:
        tune()
        return False

    return [
        (JITFunction, "run", launch),
        (InterpretedFunction, "run", launch),  # where the environment says TRITON_INTERPRET
        (Autotuner, "do_bench", property(lambda tuner: trial)),
        (Autotuner, "check_disk_cache", always_tuned),
    ]
