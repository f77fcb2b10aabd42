"""How soon `oomless explain` says something: its first line, what asked for the memory, and the last cure, one process a case.

python bench/explain_speed.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from provenance import write

MESSAGE = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size}. GPU 0 has a total capacity of {gpu} of which 1.00 GiB is free."
LIMITS_S = {"first_line": 1, "first_attribution": 15, "end": 60}
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
    "latent attention": ("384.00 MiB", "39.39 GiB", "--model deepseek-ai/DeepSeek-V2-Lite --dtype bf16 --trainable lora --max-seq-length 2048"),
}  # fmt: skip


def timed(size: str, gpu: str, options: str) -> dict[str, float | None]:
    command = [
        sys.executable,
        "-m",
        "oomless",
        "explain",
        "--message",
        MESSAGE.format(size=size, gpu=gpu),
        *options.split(),
    ]
    began = time.perf_counter()
    found: dict[str, float | None] = dict.fromkeys(LIMITS_S)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter() - began
            found["first_line"] = found["first_line"] or now
            if line.startswith("What asked"):
                found["first_attribution"] = found["first_attribution"] or now
    found["end"] = time.perf_counter() - began
    return found


def main() -> None:
    results: dict[str, Any] = {"limits_seconds": LIMITS_S}
    for name, case in CASES.items():
        results[name] = timed(*case)
        print(name, results[name], flush=True)
    write("explain_speed", results)


if __name__ == "__main__":
    main()
