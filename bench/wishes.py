"""Twenty wishes as people have them (this model, this GPU, this text, this weekend): what `oomless plan` answers, and a judgement.

    python bench/wishes.py [NUMBER ...]

Runs the command itself, one case after the other; the cases that are named take their place among those that ran before. Needs no GPU.
Writes ``results/wishes.json`` and from it ``results/wishes.md``. The judgements are written by hand, of the answers that stand there.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomless.planning.strategies import in_words
from oomless.report.choice import NAMES, hours_in_words
from oomless.units import format_bytes
from provenance import RESULTS, provenance, write


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One wish."""

    wish: str
    model: str
    gpu: str
    tokens: str
    hours: str
    prefer: str = "balanced"
    host: str | None = None
    """Memory of the machine; by default what the plan assumes."""

    judgement: str = ""
    """What an experienced person would run instead, and whether this is better, as good, or absurd."""

    def arguments(self) -> list[str]:
        """Return the command."""
        said = ["--model", self.model, "--gpu", self.gpu, "--max-seq-length", "2048"]
        said += ["--tokens", self.tokens, "--hours", self.hours]
        said += [] if self.prefer == "balanced" else ["--prefer", self.prefer]
        return ["plan", *said, *([] if self.host is None else ["--host-memory", self.host])]


CASES = (
    Case(
        wish="Continue a small base model on a small corpus, on a free notebook, over a weekend",
        model="meta-llama/Llama-3.2-1B",
        gpu="T4",
        tokens="50M",
        hours="48",
        judgement=(
            "As good as what an experienced person would run: everything trains, 8-bit AdamW, 16 blocks a step, "
            "done in 8 of the 48 hours at most. LoRA would be 1.3 times as fast for a fifth less."
        ),
    ),
    Case(
        wish="Tune a 7 B model with a vocabulary of 256,000 on a free notebook, in one session",
        model="google/gemma-7b",
        gpu="T4",
        tokens="5M",
        hours="12",
        judgement=(
            "Most people would run QLoRA, which stands there as the fastest at 1.5 times the speed. As there is "
            "time for both, the hours are spent on the embeddings and on 8 bits: 94 % against 90 %, on thin "
            "evidence. It fits to the margin, which is little on a shared notebook; `--prefer fast` is the "
            "cautious answer."
        ),
    ),
    Case(
        wish="Instructions for a 3 B model, done before lunch",
        model="meta-llama/Llama-3.2-3B-Instruct",
        gpu="T4",
        tokens="5M",
        hours="4",
        prefer="fast",
        judgement=(
            "What an experienced person would run: 16-bit LoRA without checkpointing, in an hour or two. QLoRA is "
            "no faster here and rightly not taken. That full training fits the same four hours few would expect."
        ),
    ),
    Case(
        wish="QLoRA of an 8 B model on a free notebook",
        model="meta-llama/Llama-3.1-8B-Instruct",
        gpu="T4",
        tokens="5M",
        hours="12",
        judgement=(
            "QLoRA, which people mean, is there as the fastest, at 1.1 times the speed; the pick is LoRA on 8 "
            "bits, with the table of embeddings on the host, for 2 % more. Good. Two matrices of 128,256 rows, "
            "for 1 % more yet, are left to --prefer quality."
        ),
    ),
    Case(
        wish="A 4 B model on the two T4 of a free notebook, in one session",
        model="Qwen/Qwen3-4B",
        gpu="2xT4",
        tokens="20M",
        hours="12",
        host="29GiB",
        judgement=(
            "Full training of a 4 B model on two T4 is more than most people expect of a free notebook, and the "
            "pick's slowest end (10.9 hours) nearly fills the twelve. Most would run LoRA, a copy on each GPU, "
            "which is the fastest, at 1.7 to 2.7 times the speed, for 85 to 88 %. Whose session may end early "
            "takes `--prefer fast`."
        ),
    ),
    Case(
        wish="An 8 B model on two T4, in a week's quota",
        model="meta-llama/Llama-3.1-8B",
        gpu="2xT4",
        tokens="10M",
        hours="30",
        host="29GiB",
        judgement=(
            "QLoRA with a copy on each GPU, which people run, is the fastest and done in 4 hours. The pick spends "
            "up to 7.7 of the 30 on 94 % instead of 90, on thin evidence, and rests on the link to the host, so "
            "that its range is a factor of 3.5. A careful person would take the row with 8 bits instead: the same "
            "share, from 419 tokens/s, and nothing streamed. Asked before balance weighed hours that are left "
            "over, with which the answer would be another row: LoRA on 8 bits."
        ),
    ),
    Case(
        wish="Continue a 1.5 B model on a corpus of its own, on a 12 GB card",
        model="Qwen/Qwen2.5-1.5B",
        gpu="RTX 3060 12GB",
        tokens="200M",
        hours="96",
        host="32GiB",
        judgement=(
            "What an experienced person would run who knew that it fits: everything trains with nothing given up, "
            "in 60 of 96 hours at most. LoRA is a third faster, and of so much text would learn two thirds."
        ),
    ),
    Case(
        wish="The best that a 12 GB card can do for a 4 B model in a weekend",
        model="microsoft/Phi-4-mini-instruct",
        gpu="RTX 3060 12GB",
        tokens="20M",
        hours="48",
        prefer="quality",
        host="32GiB",
        judgement=(
            "Most people would run QLoRA, the fastest here. The pick is better by quality and predicted 11 to 26 % slower: the frozen "
            "16-bit layers come over the link while the GPU computes, embeddings and head train, and 1.1 GiB stay "
            "free. Full training is short by 3.4 GiB at least."
        ),
    ),
    Case(
        wish="Too much text for a 7 B model on a 12 GB card in a weekend",
        model="mistralai/Mistral-7B-v0.3",
        gpu="RTX 3060 12GB",
        tokens="300M",
        hours="48",
        host="32GiB",
        judgement=(
            "Nobody reads this text with this card in a weekend, and the answer says so: 17 to 33 % of it is "
            "read. The pick is QLoRA, as most would run it, with embeddings and head beside it at 98 % of its "
            "speed. Right; the honest advice, a part of the text or a smaller model, is left to the reader."
        ),
    ),
    Case(
        wish="QLoRA of an 8 B model on a 12 GB card, overnight",
        model="Qwen/Qwen3-8B",
        gpu="RTX 4070",
        tokens="10M",
        hours="10",
        host="32GiB",
        judgement=(
            "QLoRA, the fastest, is what people run. The pick has 16-bit weights come over the link for 93 % "
            "against 90, and is done within the night at its slowest end (6.9 of 10 hours); it rests on a link "
            "that the machine may not have (a factor of 3). Not absurd; `--prefer fast` is the cautious answer."
        ),
    ),
    Case(
        wish="A 4 B model with a large vocabulary, a new language, on a 12 GB card",
        model="google/gemma-3-4b-pt",
        gpu="RTX 4070",
        tokens="100M",
        hours="120",
        host="64GiB",
        judgement=(
            "A new language asks for embeddings and head to train, and they do, in a third of the hours at most. "
            "An experienced person would look for full training, too: short by 3.6 GiB at least."
        ),
    ),
    Case(
        wish="Continue an 8 B model on the papers of a field, on a 24 GB card",
        model="meta-llama/Llama-3.1-8B",
        gpu="RTX 4090",
        tokens="100M",
        hours="72",
        host="64GiB",
        judgement=(
            "Better than the QLoRA that most would run: 16-bit weights, embeddings and head train, in the same "
            "hours, in a quarter of the 72. It fills the card to the margin, which is little on a desktop that "
            "draws its screen with it."
        ),
    ),
    Case(
        wish="Teach a 3 B model a language, a week on a 24 GB card",
        model="meta-llama/Llama-3.2-3B",
        gpu="RTX 4090",
        tokens="500M",
        hours="168",
        prefer="quality",
        host="64GiB",
        judgement=(
            "What an experienced person would run: everything trains, nothing given up, in a third of the week. "
            "LoRA would learn 58 % of so much text."
        ),
    ),
    Case(
        wish="The largest model that people tune on a 24 GB card",
        model="Qwen/Qwen2.5-32B",
        gpu="RTX 4090",
        tokens="5M",
        hours="24",
        host="64GiB",
        judgement=(
            "What people run: QLoRA, here with its table of embeddings on the host, in 5 of the 24 hours at most. "
            "Training embeddings and head too would be 2 % more at 60 % of the speed, and is left to --prefer "
            "quality."
        ),
    ),
    Case(
        wish="A 14 B model on a 32 GB card",
        model="Qwen/Qwen3-14B",
        gpu="RTX 5090",
        tokens="50M",
        hours="48",
        host="96GiB",
        judgement=(
            "Reasonable: 16-bit weights come over the link, embeddings and head train, 8 GiB stay free, done in "
            "half the hours at most. Whose link is slow would rather have the row with 8 bits, LoRA alone: twice "
            "the speed at the low end for 4 % less."
        ),
    ),
    Case(
        wish="A mixture of experts on a 32 GB card, soon done",
        model="openai/gpt-oss-20b",
        gpu="RTX 5090",
        tokens="10M",
        hours="12",
        prefer="fast",
        host="96GiB",
        judgement=(
            "What people run, in 140 minutes at most. It packs the experts anew in NF4; the model's own files "
            "have them in MXFP4, which `--quantization mxfp4` keeps without rounding again, and which the search "
            "does not try by itself."
        ),
    ),
    Case(
        wish="Continue an 8 B model on a billion tokens, two weeks on a rented GPU",
        model="meta-llama/Llama-3.1-8B",
        gpu="A100-80G",
        tokens="1B",
        hours="336",
        prefer="quality",
        host="200GiB",
        judgement=(
            "Asked for quality, and it is: full training with nothing given up, in 5 of 14 days. On a rented GPU "
            "an experienced person would take 8-bit AdamW on the card, which is the balanced answer: 99 % for two "
            "thirds of the hours."
        ),
    ),
    Case(
        wish="A mixture of experts of 30 B on a rented GPU",
        model="Qwen/Qwen3-30B-A3B",
        gpu="A100-80G",
        tokens="50M",
        hours="48",
        host="200GiB",
        judgement=(
            "As an experienced person would: 16-bit experts, which are faster than 4-bit ones that have to be "
            "unpacked for few tokens each, with embeddings and head. It fits with 1 GiB left; QLoRA leaves 36."
        ),
    ),
    Case(
        wish="Continue a 32 B model on a rented GPU, two days",
        model="Qwen/Qwen2.5-32B",
        gpu="H100",
        tokens="50M",
        hours="48",
        host="200GiB",
        judgement=(
            "Good: 16-bit weights, embeddings and head train, at 85 % of the speed of the fastest. 8 bits would "
            "be 14 % faster for 1 %. Asked before balance weighed hours that are left over, with which 8 bits "
            "would be the answer."
        ),
    ),
    Case(
        wish="QLoRA of a 70 B model on one rented GPU, a day",
        model="meta-llama/Llama-3.3-70B-Instruct",
        gpu="H100",
        tokens="10M",
        hours="24",
        host="200GiB",
        judgement=(
            "As an experienced person would, or better: 4 bits, with embeddings and head trained beside the "
            "adapters, in 3.6 hours at most; QLoRA alone is 1.2 times as fast for 2 % less. Before this case was "
            "judged the pick streamed 16-bit weights for up to 14 of the 24 hours, as balance took hours within "
            "the limit for free."
        ),
    ),
)


TEACH_LESS = ("APOLLO", "Adafactor", "no clipping")
"""Of what misses, these would not be preferred to what fits."""


def answer(case: Case) -> dict[str, Any]:
    """Return what the plan says of ``case``, with where and when it said so."""
    arguments = case.arguments()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "oomless", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{shlex.join(arguments)} ended with {done.returncode}")
    said = json.loads(done.stdout)
    facts = provenance()
    return {
        "command": shlex.join(["oomless", *arguments]),
        "usable_bytes": said["usable_bytes"] - said["margin_bytes"],
        "wish": said["wish"],
        "strategies": [_kept(row) for row in said["strategies"]],
        "trials": said["trials"],
        "wall_seconds": round(time.perf_counter() - began),
        "commit": facts["commit"],
        "date": facts["date"],
    }


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("strategy", "fits", "picked", "named", "needed_bytes", "reason")}
    if not row["fits"]:
        return kept
    speed = {name: round(row["speed"][f"tokens_per_second{name}"], 1) for name in ("_low", "", "_high")}
    return kept | {
        "how": in_words(row["settings"]),
        "tokens_per_second": list(speed.values()),
        "hours": row["hours"],
        "share": round(row["share"], 3),
        "given_up": [f"{one['name']} {one['share']:.2f}" for one in row["given_up"]],
    }


def page(results: dict[str, Any]) -> str:
    """Return the answers as Markdown."""
    facts = provenance()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers"))
    head = (
        f"Of each wish the answer of `oomless plan`, and a judgement by hand. Speeds are predicted, not measured; rehearsed with {versions}.\n"
        "► is the pick; learns: what a token teaches beside full training.\n"
    )
    if len(results) < len(CASES):
        head += f"Asked so far: {len(results)} of {len(CASES)}.\n"
    parts = [
        _part(number, case, results[str(number)]) for number, case in enumerate(CASES, 1) if str(number) in results
    ]
    return "\n".join(["# Twenty wishes, judged", "", head, *parts])


def _part(number: int, case: Case, found: dict[str, Any]) -> str:
    model = case.model.split("/")[1]
    rows = found["strategies"]
    picked = next((row for row in rows if row["picked"]), None)
    lines = [
        f"## {number}. {model} on {case.gpu}: {case.tokens} tokens, {case.hours} hours, {case.prefer}",
        "",
        f"{case.wish}.",
        "",
        f"    {found['command']}",
        "",
    ]
    if picked is None:
        lines += ["Nothing fits.", ""]
    else:
        lines += [
            "| | choice | how | memory | tokens/s | all of the text | learns | given up |",
            "|---|---|---|---:|---:|---:|---:|---|",
        ]
        shown = [picked, *(row for row in rows if row["fits"] and not row["picked"])]
        lines += [_row(row) for row in sorted(shown, key=lambda row: (not row["picked"], not row["named"]))] + [""]
    lines += [f"What would change it: {'; '.join(_would_change(found, picked)) or 'nothing that it looked at'}.", ""]
    lines += [f"**Judged:** {case.judgement}", ""] if case.judgement else []
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    name = ", ".join(NAMES[name] for name in row["named"]) or "also fits"
    low, _, high = row["tokens_per_second"]
    return (
        f"| {'►' if row['picked'] else ''} {name} | {row['strategy']} | {row['how']} | {format_bytes(row['needed_bytes'])} "
        f"| {low:,.0f}-{high:,.0f} | {hours_in_words(row['hours'])} | {row['share']:.0%} | {', '.join(row['given_up']) or 'nothing'} |"
    )


def _would_change(found: dict[str, Any], picked: dict[str, Any] | None) -> list[str]:
    """Return what the answer says of memory, hours and preference that would give another."""
    rows, said = found["strategies"], []
    better = rows[: rows.index(picked)] if picked else rows
    missed = [row for row in better if not row["fits"] and not any(word in row["strategy"] for word in TEACH_LESS)]
    for row in sorted(missed, key=lambda row: row["needed_bytes"])[:1]:
        short = row["needed_bytes"] - found["usable_bytes"]
        more = (
            f"more than {format_bytes(short)} more of the GPU's"
            if short > 0
            else f"more of the host's ({row['reason']})"
        )
        said.append(f"with memory, {more}: {row['strategy']}")
    if picked:
        hours, wished = picked["hours"], found["wish"]["hours"]
        if hours[1] > wished:
            least = "may not" if hours[0] <= wished else "do not"
            said.append(f"{wished:g} hours {least} suffice for the whole text: it takes {hours_in_words(hours)}")
        for row in rows:
            if row["fits"] and row["named"] and not row["picked"]:
                said.append(f"--prefer {row['named'][0]}: {row['strategy']}")
    return said


def main() -> None:
    """Ask for each case and write the results after each."""
    path = Path(RESULTS) / "wishes.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    for number in map(int, sys.argv[1:] or range(1, len(CASES) + 1)):
        results[str(number)] = answer(CASES[number - 1])
        results = dict(sorted(results.items(), key=lambda item: int(item[0])))
        write("wishes", {"cases": results})
        (RESULTS / "wishes.md").write_text(page(results), encoding="utf-8")
        print(f"{number}: {results[str(number)]['wall_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
