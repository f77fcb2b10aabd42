"""What counting the work of a step adds to a rehearsal: the same one with and without it, in turns, in one process.

python bench/counting_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from oomless.config import TrainConfig
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve_for_plan
from oomless.planning.rehearse import rehearse, virtual_device
from provenance import write

PAIRS = 21


def main() -> None:
    settings = {"model": "Llama-3.2-1B", "data": "-", "output_dir": "-", "max_seq_length": 2048, "dtype": "bf16"}
    config = TrainConfig.from_mapping(settings)
    spec = resolve_for_plan(config.model)
    counting: Any = VirtualGPU.count_work
    ways: dict[str, Callable[..., None]] = {"counted": counting, "not counted": lambda device, on: None}

    def seconds(way: str) -> float:
        VirtualGPU.count_work = ways[way]  # type: ignore[method-assign]
        began = time.process_time()
        rehearse(spec, config, virtual_device(), steps=1, whole=False)
        return time.process_time() - began

    for way in ways:
        seconds(way)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(PAIRS):
        for way in ways:
            found[way].append(seconds(way))
    ratio = statistics.median(a / b for a, b in zip(*found.values(), strict=True))
    print(f"median of {PAIRS} pairs: {ratio:.3f} times the processor time without counting")
    print(f"written to {write('counting_cost', {'median_ratio': ratio, 'processor_seconds': found})}")


if __name__ == "__main__":
    main()
