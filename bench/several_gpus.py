"""What the planner picks for several GPUs and several machines, and how long its search takes.

    python bench/several_gpus.py [NUMBER ...]

Needs no GPU. Makes the rows with these numbers, by default all, as ``oomless plan`` does with nothing kept from earlier searches; Ctrl-C ends
the search of a row with the best that it has found, and the table says so. Writes ``results/several_gpus.json`` and, of all
rows that stand there, ``results/several_gpus.md``, which docs/several_gpus.md shows.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from oomless.planning.choose import choose_training
from oomless.planning.given import host_size
from oomless.planning.strategies import in_words
from oomless.report.choice import lacking, rejected_rows, speed_in_words
from oomless.units import format_bytes
from provenance import RESULTS, provenance

LENGTH = 2048
QLORA, LORA, FULL = {"trainable": "lora", "quantization": "nf4"}, {"trainable": "lora"}, {"trainable": "full"}
EIGHT, SEVENTY, LARGE = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-405B"
ROWS: list[tuple[str, dict[str, str], str, str | None]] = [
    (EIGHT, QLORA, "2xT4", None),
    (EIGHT, QLORA, "2xRTX 3060 12GB", None),
    (EIGHT, FULL, "2xRTX4090", None),
    (EIGHT, FULL, "4xRTX4090", None),
    (EIGHT, FULL, "8xA100-80G", None),
    (EIGHT, FULL, "2x8xH100", None),
    (SEVENTY, QLORA, "2xRTX4090", None),
    (SEVENTY, QLORA, "4xRTX3090", None),
    (SEVENTY, QLORA, "A100-80G", None),
    (LARGE, LORA, "8xH200", None),
    ("Qwen/Qwen3-235B-A22B", LORA, "8xH200", None),
    (EIGHT, FULL, "2xRTX4090", "64GiB"),
]
HEAD = "| model | trains | GPUs | pick | how | each needs | tokens/s | rehearsals | search, s | of cores, s |"


def cpu_seconds() -> float:
    """Return the seconds that this process and those that it has waited for computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def searched(model: str, trains: dict[str, str], gpu: str, host: str | None) -> dict[str, Any]:
    """Return what the search of a row found, with so much ``host`` memory on each machine, and what it took."""
    began, computed = time.perf_counter(), cpu_seconds()
    given = {"model": model, "gpu": gpu, "max_seq_length": LENGTH, **trains}
    choice = choose_training(given, host_bytes=host_size(host), keep_trials=False)
    took = {"seconds": round(time.perf_counter() - began), "cpu_seconds": round(cpu_seconds() - computed)}
    found: dict[str, Any] = {
        "model": model,
        "trains": " ".join(trains.values()),
        "gpu": choice.target.name + (f", {host} of host memory" if host else ""),
    }
    found |= {"trials": choice.trials, "stopped": choice.stopped, **took}
    picked = choice.picked
    if picked is None:
        nearest = rejected_rows(choice)[0]
        return found | {
            "pick": "nothing fits",
            "how": f"{nearest.quality}: {lacking(choice, nearest)}",
            "needs": "",
            "speed": "",
        }
    left = format_bytes(choice.target.usable_bytes - picked.needed_bytes)
    return found | {
        "pick": str(picked.quality),
        "how": in_words(picked.settings),
        "needs": f"{format_bytes(picked.needed_bytes)} ({left} left)",
        "speed": speed_in_words(picked),
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    seconds = f"{row['seconds']}{', stopped' if row['stopped'] else ''}"
    cells = (row["model"].split("/")[1], row["trains"], row["gpu"], row["pick"], row["how"], row["needs"], row["speed"])
    return f"| {' | '.join((*cells, str(row['trials']), seconds, str(row['cpu_seconds'])))} |"


def main() -> None:
    path = RESULTS / "several_gpus.json"
    for number in map(int, sys.argv[1:] or range(len(ROWS))):
        row = searched(*ROWS[number])
        print(line(row), flush=True)
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
        known["rows"][str(number)] = row
        known["provenance"] = facts = provenance()
        known["rows"] = dict(sorted(known["rows"].items(), key=lambda item: int(item[0])))
        path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        closing = (
            f"Blocks of {LENGTH:,} tokens; tokens/s are of all GPUs together, predicted and not measured; 12 GiB of each machine's memory, where nothing "
            f"is said of it, and its network are assumed. Rehearsed with torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}, two "
            f"processes on two cores of {facts['device'].partition(',')[0]} beside other work: search is by the clock, of cores what was computed."
        )
        rows = [line(row) for row in known["rows"].values()]
        table = [HEAD, "|---|---|---|---|---|---|---:|---:|---:|---:|", *rows, "", closing]
        (RESULTS / "several_gpus.md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
