"""Tokenise gigabytes of text and see how much memory it takes.

    python bench/data_memory.py                           2 GB of text; writes results/data_memory.json
    python bench/data_memory.py --megabytes 120 --dry     less, and nothing is written

Each kind is made in a temporary folder of words drawn at random by their frequency in the standard library, then given
to ``open_store`` in a fresh process. Measured are the process's peak resident bytes over those before the call
(VmHWM, reset through clear_refs) and megabytes (10^6) of text per second. Fails where memory exceeds the bound.

``records``   half as files of 200 kB, half as JSON lines of 5 kB
``one file``  one text
``parquet``   one file in a single row group
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oomless.config import DataSource
from oomless.data.encode import Encoder
from oomless.data.store import open_store
from provenance import write

BOUND_BYTES = 500 * 10**6
KINDS = ("records", "one file", "parquet")
VOCABULARY = 32_000
CHUNK = 1 << 20


def library() -> str:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def chunks(total_bytes: int) -> Iterator[str]:
    """Yield about a megabyte of lines at a time, never the same twice."""
    counts = Counter(re.findall(r"\s*\S+", library()))
    words, weights = list(counts), list(counts.values())
    generator = random.Random(0)
    made = 0
    while made < total_bytes:
        text = "".join(generator.choices(words, weights, k=CHUNK // 8)) + "\n"
        made += len(text.encode())
        yield text


def make(kind: str, folder: Path, total_bytes: int) -> Path:
    folder.mkdir()
    if kind == "records":
        with (folder / "records.jsonl").open("w", encoding="utf-8") as records:
            for number, text in enumerate(chunks(total_bytes)):
                size = 200_000 if number % 2 else 5_000
                parts = [text[start : start + size] for start in range(0, len(text), size)]
                for index, part in enumerate(parts):
                    if number % 2:
                        (folder / f"{number:05}-{index}.txt").write_text(part, encoding="utf-8")
                    else:
                        records.write(json.dumps({"text": part}) + "\n")
    elif kind == "one file":
        with (folder / "all.txt").open("w", encoding="utf-8") as file:
            file.writelines(chunks(total_bytes))
    else:
        rows = [text[start : start + 5_000] for text in chunks(total_bytes) for start in range(0, len(text), 5_000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "all.parquet", row_group_size=len(rows))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    made.train_from_iterator(library().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def measure(folder: Path, tokenizer_folder: Path, cache_dir: Path) -> dict[str, float]:
    """Tokenise in this process."""
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    started = time.perf_counter()
    store = open_store(DataSource(path=str(folder)), encoder, cache_dir)
    seconds = time.perf_counter() - started
    return {
        "file_bytes": store.text_bytes,
        "documents": store.documents,
        "tokens": len(store.tokens),
        "peak_extra_bytes": resident("VmHWM") - before,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--megabytes", type=int, default=2000, help="of text in all")
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tokenizer().save_pretrained(root / "tokenizer")
        for kind in options.kinds:
            with tempfile.TemporaryDirectory(dir=root) as place:
                size_bytes = options.megabytes * 10**6 // len(options.kinds)
                folder = make(kind, Path(place) / "text", size_bytes)
                command = [sys.executable, __file__, "--measure", folder, root / "tokenizer", Path(place) / "cache"]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(printed)
            result["megabytes_per_s"] = round(result["file_bytes"] / 1e6 / result["seconds"], 2)
            print(
                f"{kind}: {result['file_bytes'] / 1e6:,.0f} MB, {result['megabytes_per_s']} MB/s, "
                f"{result['peak_extra_bytes'] / 1e6:.0f} MB of memory"
            )
            results[kind] = result
    worst = max(result["peak_extra_bytes"] for result in results.values())
    if worst >= BOUND_BYTES:
        sys.exit(f"tokenising took {worst / 1e6:.0f} MB; the bound is {BOUND_BYTES / 1e6:.0f} MB")
    if not options.dry:
        write("data_memory", {"bound_bytes": BOUND_BYTES, "kinds": results})


if __name__ == "__main__":
    main()
