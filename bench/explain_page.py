"""The five answers of docs/explain.md, as `oomless explain` prints them today on 80 columns.

python bench/explain_page.py          writes them into the page; run it on a quiet machine, as the last cures take their time
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explain.md"
REHEARSED = "A message with the model and the settings given: attributed, and cured by rehearsal."
ANSWERS = {
    REHEARSED: None,
    "LLaMA-Factory's YAML and the end of a traceback (--budget 0).": ("tools", "llamafactory yaml lora"),
    "Five GPUs, ZeRO-3, and ranks that opened GPU 0 (--budget 0).": ("several", "contexts of all ranks on gpu 0"),
    "A run that SLURM killed.": ("host", "slurm step"),
    "An error of the driver that is not the GPU's.": ("engines", "cuda error pinned"),
}
"""Titles, and where among the tests' reports the text of each is."""

MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 14.74 GiB of which 1.10 GiB is free."
)
OPTIONS = "--model meta-llama/Llama-3.2-1B-Instruct --tool trl --dtype fp16 --max-seq-length 2048 --per-device-train-batch-size 2"


def said(title: str) -> str:
    """Return what is printed under ``title``."""
    place = ANSWERS[title]
    if place is None:
        short = MESSAGE.replace("CUDA out of memory. ", "... ").replace("of which 1.10 GiB is free.", "...")
        return f'$ oomless explain --message "{short}" {OPTIONS}\n{_printed("--message", MESSAGE, *OPTIONS.split())}'
    reports = yaml.safe_load(
        (ROOT / "tests" / "diagnosis" / "reports" / f"{place[0]}.yaml").read_text(encoding="utf-8")
    )
    return _printed("-", "--budget", "0", text=next(report["text"] for report in reports if report["name"] == place[1]))


def written(title: str) -> str:
    """Return what the page shows under ``title``."""
    found = re.search(rf"^\*\*{re.escape(title)}\*\*\n\n```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return "" if found is None else found[1]


def _printed(*arguments: str, text: str = "") -> str:
    command = [sys.executable, "-m", "oomless", "explain", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    return "\n".join(line.rstrip() for line in done.stdout.strip().split("\n")) + "\n"


if __name__ == "__main__":
    for answer in ANSWERS:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(written(answer), said(answer)), encoding="utf-8")
