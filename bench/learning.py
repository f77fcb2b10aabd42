"""Does it still learn? Every optimizer at its own tuned rate, and 16-bit weights every way, beside fp32 AdamW.

    python bench/learning.py [--steps 300] [--tuning-steps 100] [--work folder]

A Llama of 4.2 M parameters learns the source code of Python's standard library from nothing, 1,024 tokens a step. Each
optimizer's rate is the best of its short runs (AdamW's with 32 and 8 bits of state the best of long ones); the long runs start
anew. What is already in ``--work`` is not run again. Writes ``bench/results/learning.json`` and the curves ``docs/learning.svg``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from against_trainer import make_model
from oomless.config import DataSource, TrainConfig
from oomless.demo import collect_text
from oomless.errors import TrainingError
from oomless.training.loop import train
from provenance import write

SEQUENCE, BLOCKS = 256, 4
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096
PICTURE = Path(__file__).parents[1] / "docs" / "learning.svg"


@dataclass(frozen=True)
class Route:
    """One way to train."""

    name: str
    settings: dict[str, Any]
    rates: tuple[float, ...]
    beside: str = "adamw"
    allowed: float = 0.02


OPTIMIZERS = [
    Route("adamw", {"optimizer": "adamw"}, (2e-3, 4e-3)),
    Route("adamw_8bit", {"optimizer": "adamw_8bit"}, (2e-3, 4e-3)),
    Route("adafactor", {"optimizer": "adafactor"}, (2e-3, 5e-3, 1e-2)),
    Route("apollo", {"optimizer": "apollo"}, (2e-3, 5e-3, 1e-2)),
    Route("apollo_mini", {"optimizer": "apollo_mini"}, (3e-4, 1e-3, 3e-3)),
    Route("galore", {"optimizer": "galore"}, (2e-3, 5e-3, 1e-2)),
    Route("muon", {"optimizer": "muon"}, (2e-3, 5e-3, 1e-2)),
    Route("sgd", {"optimizer": "sgd"}, (0.1, 0.3, 1.0)),
]
PRECISIONS = [
    Route(f"bf16 {way}", {"optimizer": "adamw", "dtype": "bf16", "weight_precision": way}, (), "bf16 master", 0.005)
    for way in ("master", "correction", "stochastic")
]


@dataclass
class Bench:
    """The folder with text, model and finished runs."""

    work: Path
    losses: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make text and model, where they are not there yet."""
        if not (self.work / "model" / "model.safetensors").is_file():
            collect_text(self.work / "text")
            make_model(self.work / "model", VOCABULARY, **SHAPE)

    def run(self, route: Route, rate: float, steps: int) -> dict[str, Any]:
        """Return the held-out loss at the end and the curve of one run of ``steps`` steps."""
        result = self.work / f"{route.name.replace(' ', '-')}-{rate:g}-{steps}.json"
        if not result.is_file():
            folder = self.work / "run"
            shutil.rmtree(folder, ignore_errors=True)
            text = self.work / "text"
            config = TrainConfig(
                model=str(self.work / "model"),
                data=(DataSource(path=str(text / "code.jsonl"), name="code"),),
                eval_data=(DataSource(path=str(text / "code-held-out.jsonl"), name="code"),),
                output_dir=str(folder),
                cache_dir=str(self.work / "token-cache"),
                max_seq_length=SEQUENCE,
                per_device_train_batch_size=BLOCKS,
                max_steps=steps,
                eval_steps=max(1, steps // 10),
                learning_rate=rate,
                weight_decay=0.01,
                gpu="cpu",
                **({"dtype": "fp32", "warmup_ratio": 0.1} | route.settings),
            )
            try:
                train(config)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                curve = [[line["step"], line["eval_loss/code"]] for line in lines if "eval_loss/code" in line]
            except TrainingError:
                curve = []
            last = curve[-1][1] if curve else math.inf
            result.write_text(json.dumps({"loss": last, "curve": curve}))
            print(f"{route.name} at {rate:g}, {steps} steps: {last:.4f}", flush=True)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def measure(bench: Bench, steps: int, tuning_steps: int) -> dict[str, dict[str, Any]]:
    """Return for each route the rate, the loss, the curve, and how far its loss lies above that of its measure."""
    best: dict[str, float] = {}
    runs: dict[str, dict[str, Any]] = {}
    for route in OPTIMIZERS:
        length = steps if route.name in ("adamw", "adamw_8bit") else tuning_steps
        best[route.name] = min(route.rates, key=lambda rate: bench.run(route, rate, length)["loss"])
    for route in OPTIMIZERS + PRECISIONS:
        rate = best[str(route.settings["optimizer"])]
        runs[route.name] = {"learning_rate": rate, **bench.run(route, rate, steps)}
    for route in OPTIMIZERS + PRECISIONS:
        run = runs[route.name]
        run |= {"beside": route.beside, "above": run["loss"] / runs[route.beside]["loss"] - 1, "allowed": route.allowed}
    return runs


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the curves: optimizers left, precisions right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "oomless"
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for place, routes, title in zip(
        places, (OPTIMIZERS, PRECISIONS), ("fp32 weights", "AdamW, sixteen-bit weights"), strict=True
    ):
        for route in routes:
            curve = runs[route.name]["curve"]
            label = f"{route.name}: {runs[route.name]['loss']:.3f}"
            place.plot(*zip(*curve, strict=True), label=label, marker=".")
        place.set(title=title, xlabel="step", ylim=(None, 6.5))
        place.legend(fontsize=8)
        place.grid(alpha=0.3)
    places[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tuning-steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(options.work)
    bench.prepare()
    runs = measure(bench, options.steps, options.tuning_steps)
    for name, run in runs.items():
        mark = "" if run["above"] <= run["allowed"] else f"  (more than {run['allowed']:.1%})"
        print(f"{name:16} {run['learning_rate']:g}  {run['loss']:.4f}  {run['above']:+.2%} of {run['beside']}{mark}")
    if not options.dry:
        write("learning", {"steps": options.steps, "tokens_per_step": SEQUENCE * BLOCKS, "runs": runs})
        draw(runs, PICTURE)


if __name__ == "__main__":
    main()
