"""How long searches take: the processor's seconds, to the first answer and to the last, and the host memory; one fresh process each.

python bench/search_speed.py [--beside COMMIT] [--only MODEL@GPU ...]

With ``--beside`` every search is also made by the code of that commit, in turn with today's, so that a ratio holds on a busy machine.
``results/search_speed.json`` keeps the last measurement beside each commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import RESULTS, provenance

CASES = {
    "Llama-3.2-1B@T4": 8,
    "Llama-3.2-1B@2xT4": 8,
    "Llama-3.2-3B@RTX4090": 8,
    "gemma-2-2b@T4": 8,
    "pythia-2.8b@T4": 8,
    "gemma-3-4b-it@T4": 25,
    "Phi-4-mini-instruct@RTX3060": 25,
    "Qwen3-4B@2xT4": 25,
    "gemma-7b@T4": 25,
    "Llama-3.1-8B@T4": 25,
    "Llama-3.1-8B@RTX4090": 25,
    "gpt-oss-20b@T4": 60,
    "gemma-4-31B@RTX4090": 60,
    "Qwen3-30B-A3B@A100-80G": 60,
    "Mixtral-8x7B-v0.1@H200": 60,
    "Llama-3.3-70B-Instruct@H200": 60,
}
"""And the seconds that a search is to take on two cores."""

PROGRAM = """
import json, resource, sys, time
began = time.perf_counter()
from oomless.planning.choose import choose_training
first = None
def progress(text, share):
    global first
    if first is None and "so far" in text:
        first = time.perf_counter() - began
model, gpu = sys.argv[1].split("@")
found = choose_training(
    {"model": model, "gpu": gpu, "max_seq_length": 2048}, host_bytes=48 << 30, keep_trials=False, progress=progress
)
wall = time.perf_counter() - began
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({
    "processor_seconds": sum(one.ru_utime + one.ru_stime for one in used),
    "wall_seconds": wall,
    "first_answer_seconds": first,
    "host_peak_bytes_of_the_largest_process": max(one.ru_maxrss for one in used) << 10,
    "trials": found.trials,
    "pick": None if found.picked is None else str(found.picked.quality),
}))
"""


def one(case: str, source: Path) -> dict[str, Any]:
    """Make one search with the code of ``source``."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case], capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make the searches, print a line of each, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", help="a commit whose code is measured in turn with today's")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="MODEL@GPU")
    given = parser.parse_args()
    here = Path(__file__).parents[1]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        if given.beside:
            subprocess.run(["git", "worktree", "add", "-q", "--detach", before, given.beside], check=True, cwd=here)
        try:
            for case in given.only:
                results[case] = {"limit_seconds": CASES[case], "now": one(case, here)}
                if given.beside:
                    results[case]["before"] = one(case, before)
                print(case, json.dumps(results[case]), flush=True)
        finally:
            if given.beside:
                subprocess.run(["git", "worktree", "remove", "--force", before], check=True, cwd=here)
    path = RESULTS / "search_speed.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    known["beside"][str(given.beside)] = {"provenance": provenance(), "searches": results}
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
