"""What a trial takes when it repeats layers, against one that runs them all: the same rehearsal both ways, in turns, in one process.

python bench/repeated_layers.py
"""

from __future__ import annotations

import statistics
import time

from oomless.config import TrainConfig
from oomless.models.spec import resolve_for_plan
from oomless.planning.rehearse import rehearse, virtual_device
from provenance import write

PAIRS = 5
CASES = {
    "Llama-3.2-1B, full": {"model": "Llama-3.2-1B"},
    "Llama-3.1-8B, full": {"model": "Llama-3.1-8B", "optimizer": "adafactor"},
    "Llama-3.1-8B, NF4 and LoRA": {"model": "Llama-3.1-8B", "quantization": "nf4", "trainable": "lora"},
}


def seconds(settings: dict[str, str], *, run_all_layers: bool) -> float:
    common = {"data": "-", "output_dir": "-", "max_seq_length": 2048, "dtype": "bf16"}
    config = TrainConfig.from_mapping({**common, **settings})
    began = time.process_time()
    rehearse(
        resolve_for_plan(config.model),
        config,
        virtual_device(),
        steps=1,
        whole=False,
        run_all_layers=run_all_layers,
    )
    return time.process_time() - began


def main() -> None:
    results = {}
    for name, settings in CASES.items():
        seconds(settings, run_all_layers=True)
        pairs = [[seconds(settings, run_all_layers=both) for both in (False, True)] for _ in range(PAIRS)]
        ratio = statistics.median(some / all_layers for some, all_layers in pairs)
        results[name] = {"median_ratio": ratio, "processor_seconds_some_and_all": pairs}
        print(f"{name}: {ratio:.2f} times the processor time of all layers (median of {PAIRS} pairs)", flush=True)
    print(f"written to {write('repeated_layers', results)}")


if __name__ == "__main__":
    main()
