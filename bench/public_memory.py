"""Memory measured by others on real GPUs, beside its rehearsal: operators, whole steps and whole runs.

python bench/public_memory.py FOLDER [--only operators peft litgpt t4] [--litgpt CLONE]

FOLDER holds points.json and t4_qlora.csv, figures with their sources; CLONE is one of LitGPT's repository. Rows are kept one by one in
results/public_memory.json: what is there for the installed versions is not made again. results/public_memory.md is drawn from it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import public_litgpt
import public_operators
import public_peft
import public_t4
from provenance import RESULTS, provenance

KEPT = RESULTS / "public_memory.json"
MIB = 1 << 20

Figures = dict[str, int]
Row = tuple[str, Figures, Callable[[], Figures]]
"""Its name, what was measured, and what rehearses it."""


def operators(asked: argparse.Namespace) -> Iterator[Row]:
    for point in _points(asked.folder):
        settings, measured = point["settings"], {"allocated": point["measured"]}
        if point["kind"] != "op, allocated":
            continue
        if "kernel" in settings:
            name = f"{settings['kernel']} {settings['mode']}, {settings['x_name']} {settings['x']}, {settings['gpu']}"
            yield name, measured, lambda settings=settings: public_operators.rehearse(settings)
        else:
            name = f"loss of a head, backward alone, {settings['tokens']} x {settings['vocabulary']}, {settings['gpu']}"
            yield name, measured, lambda settings=settings: public_operators.rehearse_loss(settings)


def peft(asked: argparse.Namespace) -> Iterator[Row]:
    methods: dict[str, Figures] = {}
    for point in _points(asked.folder):
        method = Path(point["source"].split()[-1]).stem
        if method in public_peft.METHODS:
            measure = "reserved" if "reserved" in point["kind"] else "allocated"
            methods.setdefault(method, {})[measure] = point["measured"]
    for method, measured in methods.items():
        yield method, measured, lambda method=method: public_peft.rehearse(method)


def litgpt(asked: argparse.Namespace) -> Iterator[Row]:
    for point in _points(asked.folder):
        if point["kind"].startswith("LitGPT"):
            of = point["settings"]
            name = f"{of['model']}, {of['trainable']}, {of['batch']} x {of['tokens']}, {of['gpu']}"
            measured = {"allocated": point["measured"]}
            yield (
                name,
                measured,
                lambda point=point: public_litgpt.rehearse(point["settings"], point["source"], asked.litgpt),
            )


def t4(asked: argparse.Namespace) -> Iterator[Row]:
    with open(asked.folder / "t4_qlora.csv", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            name = f"{row['model']}, {row['base']}, rank {row['lora_r']}, {row['batch']} x {row['seq']}, {row['attn']}, {row['session']}"
            columns = {"resident": "resident", "allocated": "peak_alloc", "reserved": "peak_reserved"}
            columns |= {"forward": "peak_forward", "optimizer": "peak_optimizer"}
            measured = {measure: round(float(row[f"{column}_mib"]) * MIB) for measure, column in columns.items()}
            yield name, measured, lambda row=row: public_t4.rehearse(row)


SOURCES: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[Row]], str]] = {
    "operators": (
        "Operators and modules",
        operators,
        "Measured by the authors of github.com/linkedin/Liger-Kernel, benchmark/data/all_benchmark_data.csv at ead96b61: PyTorch's own "
        "operators and transformers' modules on an A100, H100, B200 and RTX 4090, 2024 to 2026. The loss of a head: by the authors of "
        "github.com/apple/ml-cross-entropy, README, with torch 2.4.1.",
    ),
    "peft": (
        "PEFT's methods on an L40S",
        peft,
        "Measured by the authors of github.com/huggingface/peft, method_comparison/MetaMathQA at 5d602fdb, with torch 2.13, "
        "transformers 5.13.1 and peft 0.19.2.dev0: allocated after a step, on average, and the most reserved in a whole run. The longest "
        f"batch is not published: {public_peft.LONGEST} tokens, fitted once for all.",
    ),
    "litgpt": (
        "LitGPT's steps on an A100 and an A10G",
        litgpt,
        "Measured by the authors of github.com/Lightning-AI/litgpt, tutorials/resource-tables.md and config_hub/finetune/README.md, in October "
        "2023, April and September 2024, and printed to 0.01 GB (0.1 % of the smallest).",
    ),
    "t4": (
        "Steps on a Tesla T4",
        t4,
        "Measured by the author of github.com/Anassbzdd/fitcheck, data/measurements, with torch 2.10 and 2.14, transformers 5.0 and 5.17, "
        "peft 0.19 and 0.20.",
    ),
}


def _points(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    return found


def make(asked: argparse.Namespace, source: str, kept: dict[str, Any]) -> None:
    """Rehearse the rows of ``source`` that are not there, and keep each when it is."""
    made, before = provenance(), kept.get(source, {"made": {}, "rows": {}})
    here = kept[source] = {
        "made": made,
        "rows": before["rows"] if before["made"].get("versions") == made["versions"] else {},
    }
    for name, measured, rehearse in SOURCES[source][1](asked):
        if name not in here["rows"]:
            found = rehearse()
            here["rows"][name] = {measure: [found[measure], value] for measure, value in measured.items()}
            print(name, here["rows"][name], flush=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            gc.collect()


def summary(rows: dict[str, dict[str, list[int]]]) -> dict[str, tuple[int, float, float]]:
    """Return for each measure the number of rows, and the median and the worst error."""
    errors: dict[str, list[float]] = {}
    for row in rows.values():
        for measure, (found, measured) in row.items():
            errors.setdefault(measure, []).append(abs(found - measured) / measured)
    return {name: (len(values), statistics.median(values), max(values)) for name, values in errors.items()}


def drawn(kept: dict[str, Any]) -> str:
    """Return the page: a summary of all, then each source."""
    head = ["| source | measure | rows | median error | worst error |", "|---|---|---|---|---|"]
    sections: list[str] = []
    for source, (title, _, about) in SOURCES.items():
        if source not in kept:
            continue
        rows, made = kept[source]["rows"], kept[source]["made"]
        measures = summary(rows)
        head += [f"| {title} | {m} | {n} | {median:.3%} | {worst:.3%} |" for m, (n, median, worst) in measures.items()]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        sections += [
            "",
            f"## {title}",
            "",
            about,
            f"Rehearsed on {made['date']} at {made['commit']} with {versions}.",
            "",
        ]
        sections += [f"| MiB, rehearsed / measured | {' | '.join(measures)} |", "|---|" + "---|" * len(measures)]
        sections += [f"| {name} | {' | '.join(_cell(row, m) for m in measures)} |" for name, row in rows.items()]
    return "\n".join(["# Memory measured by others, and rehearsed", "", *head, *sections, ""])


def _cell(row: dict[str, list[int]], measure: str) -> str:
    if measure not in row:
        return ""
    found, measured = row[measure]
    return f"{found / MIB:,.3f} / {measured / MIB:,.3f} ({(found - measured) / measured:+.3%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*SOURCES], default=[*SOURCES])
    parser.add_argument("--litgpt", type=Path, metavar="CLONE")
    asked = parser.parse_args()
    if "litgpt" in asked.only and asked.litgpt is None:
        parser.error("litgpt needs --litgpt CLONE, or name the others with --only")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    for source in asked.only:
        make(asked, source, kept)
        Path(RESULTS, "public_memory.md").write_text(drawn(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
