"""How long a rehearsal takes, and how much host memory: one fresh process for each model.

python bench/rehearsal_speed.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from provenance import write

CASES = {"Llama-3.2-1B": 5, "Llama-3.1-8B": 10, "Llama-3.3-70B-Instruct": 60}
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from oomless.config import DataSource, TrainConfig
from oomless.models.spec import resolve_for_plan
from oomless.planning.rehearse import rehearse, virtual_device
config = TrainConfig(model=sys.argv[1], data=(DataSource(path="-"),), output_dir="-", max_seq_length=2048, dtype="bf16")
spec = resolve_for_plan(config.model)
began = time.perf_counter()
found = rehearse(spec, config, virtual_device())
seconds = time.perf_counter() - began
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
print(json.dumps({"seconds": seconds, "host_peak_bytes": peak, "predicted_bytes": found.profile.peak_allocated_bytes}))
"""


def main() -> None:
    results: dict[str, Any] = {}
    for name, limit in CASES.items():
        runs = []
        for _ in range(3):
            process = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True)
            runs.append(json.loads(process.stdout.splitlines()[-1]))
        best = min(runs, key=lambda run: run["seconds"])
        results[name] = {"limit_seconds": limit, "best_of_three": best, "all_seconds": [run["seconds"] for run in runs]}
        print(
            f"{name}: {best['seconds']:.1f} s (limit {limit} s), host peak {best['host_peak_bytes'] / 2**30:.2f} GiB, "
            f"predicted {best['predicted_bytes'] / 2**30:.2f} GiB"
        )
    print(f"written to {write('rehearsal_speed', results)}")


if __name__ == "__main__":
    main()
