"""Text to packed blocks, beside ``datasets.map`` and TRL's packing: how long it takes, how much memory, and how full the blocks are.

    python bench/packing_beside_trl.py                          # writes results/packing_beside_trl.json
    python bench/packing_beside_trl.py --megabytes 4 --dry      # less, and nothing is written

One file of JSON lines, of documents from 200 characters to 20,000, is made blocks of 1,024 tokens of, each way in a process of its own, one
after the other, in ``--rounds`` rounds, of which the fastest of each counts: other work on a machine only adds. Theirs is measured twice: as
``SFTTrainer`` calls ``map``, a document at a time, and with ``batched=True``, which is faster. Memory is the process's peak resident bytes
over those before (VmHWM, reset through clear_refs). ``filled`` is the share of the positions of the blocks that predict a token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_memory import chunks, resident, tokenizer
from provenance import write

LENGTH = 1024
WAYS = ("oomless", "trl, as SFTTrainer", "trl, batched")
STRATEGIES = {"best_fit": "bfd_split", "documents": "wrapped"}
"""oomless' packing, and TRL's that is nearest to it."""


def make(path: Path, megabytes: int) -> None:
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for text in chunks(megabytes * 10**6):
            begin = 0
            while begin < len(text):
                size = int(200 * 100 ** generator.random())
                file.write(json.dumps({"text": text[begin : begin + size]}) + "\n")
                begin += size


def by_oomless(data: Path, tokens_of: Any, packing: str, place: Path) -> tuple[int, int]:
    """Return the number of blocks and of the tokens that they predict."""
    from oomless.config import TrainConfig
    from oomless.data.prepare import prepare

    config = TrainConfig.from_mapping(
        {
            "model": "-",
            "output_dir": "-",
            "data": str(data),
            "cache_dir": str(place / "cache"),
            "max_seq_length": LENGTH,
            "packing": packing,
            "eval_fraction": 0,
        }
    )
    (blocks,) = prepare(config, tokens_of).train.sources
    return len(blocks), blocks.targets


def by_trl(data: Path, tokens_of: Any, packing: str, place: Path, *, batched: bool) -> tuple[int, int]:
    """Return the same."""
    from datasets import load_dataset
    from trl import pack_dataset

    loaded = load_dataset("json", data_files=str(data), split="train", cache_dir=str(place / "datasets"))

    def one(record: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokens_of(record["text"] + tokens_of.eos_token)["input_ids"]}

    def several(records: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokens_of([text + tokens_of.eos_token for text in records["text"]])["input_ids"]}

    mapped = loaded.map(several if batched else one, batched=batched, remove_columns=loaded.column_names)
    packed = pack_dataset(mapped, LENGTH, STRATEGIES[packing])
    if "seq_lengths" in packed.column_names:
        return len(packed), sum(length - 1 for lengths in packed["seq_lengths"] for length in lengths)
    return len(packed), sum(len(ids) - 1 for ids in packed["input_ids"])


def measure(way: str, packing: str, data: Path, tokenizer_folder: Path, place: Path) -> dict[str, float]:
    """Pack in this process, in which everything is imported."""
    from transformers import PreTrainedTokenizerFast

    if way == "oomless":
        import oomless.data.prepare  # noqa: F401
    else:
        import datasets
        import trl.data_utils  # noqa: F401

        datasets.disable_progress_bars()
    tokens_of = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    Path("/proc/self/clear_refs").write_text("5")
    before, processor, started = resident("VmRSS"), time.process_time(), time.perf_counter()
    if way == "oomless":
        blocks, predicted = by_oomless(data, tokens_of, packing, place)
    else:
        blocks, predicted = by_trl(data, tokens_of, packing, place, batched=way.endswith("batched"))
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "peak_extra_bytes": resident("VmHWM") - before,
        "blocks": blocks,
        "filled": round(predicted / (blocks * LENGTH), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, packing, *places = options.measure
        print(json.dumps(measure(way, packing, *map(Path, places))))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make(root / "text.jsonl", options.megabytes)
        tokenizer().save_pretrained(root / "tokenizer")
        for packing in STRATEGIES:
            rounds = [{way: run(way, packing, root) for way in WAYS} for _ in range(options.rounds)]
            best = {way: min((one[way] for one in rounds), key=lambda found: found["seconds"]) for way in WAYS}
            ours = best["oomless"]
            beside = {
                way: {
                    "times_as_long": round(best[way]["seconds"] / ours["seconds"], 2),
                    "times_the_processor": round(best[way]["processor_seconds"] / ours["processor_seconds"], 2),
                    "times_the_memory": round(best[way]["peak_extra_bytes"] / ours["peak_extra_bytes"], 2),
                }
                for way in WAYS[1:]
            }
            results[packing] = {"trl_strategy": STRATEGIES[packing], **best, "beside_oomless": beside}
            print(packing, json.dumps(results[packing], indent=2))
        size = (root / "text.jsonl").stat().st_size
    if not options.dry:
        import trl

        load = round(os.getloadavg()[0], 1)
        result = {"file_bytes": size, "length": LENGTH, "trl": trl.__version__, "load": load, "packings": results}
        print(write("packing_beside_trl", result))


def run(way: str, packing: str, root: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=root) as place:
        command = [sys.executable, __file__, "--measure", way, packing, root / "text.jsonl", root / "tokenizer", place]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
