"""How soon `oomless explain` says something: its first line, what asked for the memory, and the last cure, one process a case.

Seconds are those on the wall and, as another may use the machine, those of the processor that the process had used until then.
What asked is said first from the size, where it has one meaning or more, and then by where a rehearsal stops. Both are counted.
Before them every report that the tests have (``tests/diagnosis/reports``) is read, in this process, for the one that takes longest.

python bench/explain_speed.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from oomless.diagnosis.first_answer import first_answer
from provenance import write

MESSAGE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size}. GPU 0 has a total capacity of {gpu} of which 1.00 GiB is free."
LIMITS_S = {"first_line": 1, "first_attribution": 15, "last_cure": 60}
CASES = {
    "message alone": ("1.00 GiB", "14.74 GiB", ""),
    "0.5 B, bf16": ("1.16 GiB", "7.66 GiB", "--model Qwen/Qwen2.5-0.5B --dtype bf16 --max-seq-length 2048"),
    "0.5 B, nothing known": ("1.16 GiB", "7.66 GiB", "--model Qwen/Qwen2.5-0.5B"),
    "1 B, TRL": ("1.96 GiB", "14.74 GiB", "--model Llama-3.2-1B --tool trl --dtype fp16 --max-seq-length 2048 --per-device-train-batch-size 2"),
    "3 B, checkpointing": ("7.83 GiB", "23.64 GiB", "--model Llama-3.2-3B --dtype bf16 --max-seq-length 4096 --per-device-train-batch-size 4 --gradient-checkpointing"),
    "4 B, LoRA": ("2.32 GiB", "15.70 GiB", "--model Qwen/Qwen3-4B --dtype bf16 --trainable lora --max-seq-length 1024 --per-device-train-batch-size 4"),
    "7 B, instruct, T4": ("1.00 GiB", "14.74 GiB", "--model Qwen/Qwen2.5-7B-Instruct"),
    "8 B, QLoRA": ("1.96 GiB", "14.74 GiB", "--model Llama-3.1-8B --trainable lora --quantization nf4 --max-seq-length 4096"),
    "8 B, full": ("112.00 MiB", "79.15 GiB", "--model Llama-3.1-8B --dtype bf16 --max-seq-length 4096"),
    "14 B, LoRA": ("4.64 GiB", "79.15 GiB", "--model Qwen/Qwen2.5-14B --dtype bf16 --trainable lora --max-seq-length 8192"),
    "experts": ("384.00 MiB", "79.15 GiB", "--model Qwen/Qwen3-30B-A3B --dtype bf16 --trainable lora --max-seq-length 2048"),
    "latent attention": ("800.00 MiB", "44.53 GiB", "--model deepseek-ai/DeepSeek-V2-Lite --dtype bf16 --trainable lora --max-seq-length 2048"),
}  # fmt: skip


def timed(size: str, gpu: str, options: str) -> dict[str, dict[str, float]]:
    """Return when the first line, the first attribution, that by a rehearsal and the last cure were printed, and the end."""
    message = MESSAGE.format(size=size, gpu=gpu)
    command = [sys.executable, "-m", "oomless", "explain", "--message", message, *options.split()]
    began = time.perf_counter()
    found: dict[str, dict[str, float]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = {"seconds": round(time.perf_counter() - began, 2), "of_processor": processor_seconds(process.pid)}
            found.setdefault("first_line", now)
            if line.startswith("What asked"):
                found.setdefault("first_attribution", now)
            if line.startswith(("What held the rest", "What holds the memory")):
                found.setdefault("rehearsed", now)
            if ". fits: " in line or line.startswith("  not enough: "):
                found["last_cure"] = now
    return found | {"end": {"seconds": round(time.perf_counter() - began, 2)}}


def readings() -> dict[str, Any]:
    """Return how many reports are read, and which takes most of the processor's time, in seconds; what is imported is there already."""
    reports = [
        report
        for path in sorted((Path(__file__).parents[1] / "tests" / "diagnosis" / "reports").glob("*.yaml"))
        for report in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    first_answer(reports[0]["text"])
    took = {}
    for report in reports:
        began = time.process_time()
        first_answer(report["text"], report.get("given"))
        took[report["name"]] = round(time.process_time() - began, 3)
    longest = max(took, key=took.__getitem__)
    return {"reports": len(reports), "longest": longest, "of_processor": took[longest]}


def processor_seconds(pid: int) -> float:
    """Return what the process has used of the processor, its kernel's work with it."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    results: dict[str, Any] = {"limits_seconds": LIMITS_S, "readings": readings()}
    print("readings", results["readings"], flush=True)
    for name, case in CASES.items():
        results[name] = timed(*case)
        print(name, results[name], flush=True)
    write("explain_speed", results)


if __name__ == "__main__":
    main()
