"""What each technique saves and costs, and what they reach together.

    python bench/memory_table.py [--no-time] [--rounds 9]

Memory is rehearsed on the GPU that is named, at one block of 2,048 tokens (or as said): no GPU is needed. Time is real, on
this CPU, with a small Llama: the median over the rounds of the step's time to the step without the technique, which take
turns. What only a GPU's bus would show has no time here; ``bench/gpu.py`` measures there. Writes
``results/memory_table.md``, which docs/techniques.md shows and a test rehearses again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.blank import blank_batch

from against_trainer import make_model
from oomless.config import TrainConfig
from oomless.memory.device import Device
from oomless.models.spec import resolve
from oomless.planning.plan import Plan, plan_training
from oomless.training.assemble import Assembly, assemble
from oomless.units import GiB, format_bytes
from provenance import RESULTS, provenance

LLAMA, LLAMA_8B, GEMMA = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "google/gemma-7b"
CHECKPOINTING = {"gradient_checkpointing": True}
SMALLEST_ACTIVATIONS = CHECKPOINTING | {"offload_activations": True, "cheap_recompute": True, "mlp_tiles": 8}
IN_BACKWARD = {"optimizer_in_backward": True}
ADAM = {"optimizer": "adamw_8bit", "weight_precision": "correction"}
ADAFACTOR = {"optimizer": "adafactor", "weight_precision": "stochastic"}
LEAN = ADAFACTOR | IN_BACKWARD


@dataclass(frozen=True)
class Technique:
    """One way to save, alone, beside the same training without it."""

    name: str
    settings: dict[str, Any]
    without: dict[str, Any] = field(default_factory=dict)
    timed: bool = True

    @property
    def beside(self) -> str:
        """What stands in both columns, in words."""
        if LEAN.items() <= self.without.items():
            return "Adafactor in backward, fp16 rounded stochastically"
        return "LoRA" if self.without.get("trainable") == "lora" else "AdamW, fp16 with fp32 masters"


@dataclass(frozen=True)
class Bar:
    """What must be reached together."""

    name: str
    limit_bytes: int
    settings: dict[str, Any]
    model: str = LLAMA
    gpu: str = "T4"
    max_seq_length: int = 2048


TECHNIQUES = [
    Technique("fp16 with fp32 masters, instead of fp32", {}, {"dtype": "fp32"}, timed=False),
    Technique("8-bit Adam", {"optimizer": "adamw_8bit"}),
    Technique("Adafactor", {"optimizer": "adafactor"}),
    Technique("APOLLO-Mini", {"optimizer": "apollo_mini"}),
    Technique("8 bits of correction instead of masters", {"weight_precision": "correction"}),
    Technique("stochastic rounding instead of masters", {"weight_precision": "stochastic"}),
    Technique("optimizer in backward, with checkpointing", CHECKPOINTING | IN_BACKWARD, CHECKPOINTING),
    Technique("checkpointing", LEAN | CHECKPOINTING, LEAN),
    Technique("checkpointing of half the layers", LEAN | CHECKPOINTING | {"checkpointed_layers": 0.5}, LEAN),
    Technique("cheap recomputation", LEAN | {"cheap_recompute": True}, LEAN),
    Technique("MLP in 8 tiles", LEAN | {"mlp_tiles": 8}, LEAN),
    Technique("MLP in 8 tiles, with checkpointing", LEAN | CHECKPOINTING | {"mlp_tiles": 8}, LEAN | CHECKPOINTING),
    Technique(
        "offload of activations, with checkpointing",
        LEAN | CHECKPOINTING | {"offload_activations": True},
        LEAN | CHECKPOINTING,
        timed=False,
    ),
    Technique("offload of the optimizer", {"offload_optimizer": True}, timed=False),
    Technique("lm_head and embed_tokens only", {"trainable": "lm_head+embed_tokens"}),
    Technique("lm_head only, untied", {"trainable": "lm_head", "tied_weights": "untied"}),
    Technique(
        "NF4, beside LoRA",
        {"trainable": "lora", "quantization": "nf4"},
        {"trainable": "lora"},
    ),
    Technique(
        "8-bit weights, beside LoRA",
        {"trainable": "lora", "quantization": "int8"},
        {"trainable": "lora"},
    ),
]
GEMMA_PARTS = {
    "trainable": "lora+lm_head+embed_tokens",
    "tied_weights": "shared",
    "lora_r": 64,
    "quantization": "nf4",
    **CHECKPOINTING,
}
BARS = [
    Bar("all parameters, 8-bit Adam with correction", 7 * GiB, ADAM | CHECKPOINTING | IN_BACKWARD),
    Bar("all parameters, Adafactor, 16-bit weights", int(3.2 * GiB), ADAFACTOR | SMALLEST_ACTIVATIONS | IN_BACKWARD),
    Bar(
        "the same, 8,192 tokens",
        4 * GiB,
        ADAFACTOR | SMALLEST_ACTIVATIONS | IN_BACKWARD | {"mlp_tiles": 16},
        max_seq_length=8192,
    ),
    Bar("NF4, LoRA of rank 64, tied matrix; 8-bit Adam with correction", int(11.5 * GiB), GEMMA_PARTS | ADAM, GEMMA),
    Bar(
        "the same, Adafactor, everything that saves",
        int(9.5 * GiB),
        GEMMA_PARTS | ADAFACTOR | SMALLEST_ACTIVATIONS | IN_BACKWARD,
        GEMMA,
    ),
    Bar(
        "all parameters, Adafactor, 16-bit weights",
        20 * GiB,
        ADAFACTOR | CHECKPOINTING | IN_BACKWARD,
        LLAMA_8B,
        "RTX 4090",
    ),
    Bar("NF4, lm_head only, 8-bit Adam", 8 * GiB, {"trainable": "lm_head", "quantization": "nf4"} | ADAM, LLAMA_8B),
    Bar(
        "lm_head only, untied, 8-bit Adam",
        int(4.2 * GiB),
        {"trainable": "lm_head", "tied_weights": "untied"} | ADAM,
    ),
    Bar(
        "lm_head only, the shared matrix, 8-bit Adam",
        int(3.7 * GiB),
        {"trainable": "lm_head", "tied_weights": "shared"} | ADAM | SMALLEST_ACTIVATIONS,
    ),
]


def planned(model: str, gpu: str, max_seq_length: int, settings: dict[str, Any]) -> Plan:
    """Return the plan of a training; half of the layers is written as ``checkpointed_layers: 0.5``."""
    if settings.get("checkpointed_layers") == 0.5:
        settings = settings | {"checkpointed_layers": 8}
    common = {"model": model, "data": "-", "output_dir": "-", "gpu": gpu, "max_seq_length": max_seq_length}
    return plan_training(TrainConfig.from_mapping(common | settings))


def reached(bar: Bar) -> tuple[int, int]:
    """Return the bytes allocated and reserved at the peak."""
    profile = planned(bar.model, bar.gpu, bar.max_seq_length, bar.settings).profile
    return profile.peak_allocated_bytes, profile.peak_reserved_bytes


class Stopwatch:
    """Times steps of a small Llama on this CPU."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.rounds = rounds
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.model = make_model(folder, 8192, tie_word_embeddings=True, **shape)
        self.device = Device()

    def ratio(self, technique: Technique) -> float:
        """Return the median of the step's time to that without the technique."""
        sides = [technique.without, technique.without | technique.settings]
        dtype = "bf16" if "weight_precision" in sides[1] else "fp32"
        both = [self._assembly({"dtype": dtype} | side) for side in sides]
        batch = [blank_batch(1, (512, 512), self.device)]
        # Of blank ones the loss may become 0, and what is left of gradients subnormal, which a CPU computes 20 times as slowly.
        for tokens in (batch[0].input_ids, batch[0].labels):
            tokens.random_(1, 8192)
        ratios = []
        for _ in range(self.rounds + 1):
            seconds = []
            for parts in both:
                began = time.perf_counter()
                parts.step.run(batch)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[1] / seconds[0])
        return statistics.median(ratios[1:])

    def _assembly(self, settings: dict[str, Any]) -> Assembly:
        if settings.get("checkpointed_layers") == 0.5:
            settings = settings | {"checkpointed_layers": 2}
        common = {"model": str(self.model), "data": "-", "output_dir": "-", "max_seq_length": 1024, "gpu": "cpu"}
        config = TrainConfig.from_mapping(common | settings)
        return assemble(resolve(str(self.model)), config, self.device, fill=True)


def technique_rows(stopwatch: Stopwatch | None) -> list[str]:
    rows = [
        f"{LLAMA.split('/')[1]} on a T4, 2,048 tokens, everything trains unless said:",
        "",
        "| technique | beside | without | with | saves | step's time, ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for technique in TECHNIQUES:
        sides = [
            technique.without,
            technique.settings if technique.without.get("dtype") else technique.without | technique.settings,
        ]
        before, after = (planned(LLAMA, "T4", 2048, side).profile.peak_allocated_bytes for side in sides)
        measured = stopwatch is not None and technique.timed
        time_ratio = f"{stopwatch.ratio(technique):.2f}" if stopwatch and measured else "needs a GPU"
        rows.append(
            f"| {technique.name} | {technique.beside} | {format_bytes(before)} | {format_bytes(after)} | {format_bytes(before - after)} "
            f"| {time_ratio} |"
        )
        print(rows[-1], flush=True)
    return rows


def bar_rows() -> list[str]:
    rows = [
        "Together (2,048 tokens unless said):",
        "",
        "| model | GPU | what trains | peak allocated | bar | reserved above it |",
        "|---|---|---|---:|---:|---:|",
    ]
    for bar in BARS:
        allocated, reserved = reached(bar)
        rows.append(
            f"| {bar.model.split('/')[1]} | {bar.gpu} | {bar.name} | {format_bytes(allocated)} "
            f"| {format_bytes(bar.limit_bytes)} | {reserved / allocated - 1:.1%} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-time", action="store_true", help="rehearse only, and write nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = technique_rows(None if options.no_time else Stopwatch(Path(folder), options.rounds))
    rows += ["", *bar_rows()]
    if options.no_time:
        return
    facts = provenance()
    rows += [
        "",
        f"Rehearsed with torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}; times on "
        f"{facts['device']}, a Llama of 7 M parameters, bf16 where the technique is about 16 bits and fp32 elsewhere.",
    ]
    path = RESULTS / "memory_table.md"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
