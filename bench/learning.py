"""Does it still learn? Every optimizer at its own tuned rate, and 16-bit weights every way, beside fp32 AdamW.

    python bench/learning.py optimizers|precisions [--steps 300] [--work folder]

A Llama of 4.2 M parameters, 1,024 tokens a step, on one CPU. Two halves:

optimizers   It learns the source code of Python's standard library from nothing, in fp32, each optimizer at the best of
             the rates given here. AdamW's, which the others are measured by, go on until both neighbours of the best are
             worse; the others' are those that were best of three or more in earlier runs of 100 steps.
precisions   Continued pretraining, where 16 bits are hard: the model that fp32 AdamW made goes on to learn Python's
             reference manual at the small rates that are usual there, where an update is smaller than half the distance
             between neighbouring 16-bit numbers. fp16's neighbours are eight times as close as bf16's, and its rate is
             the smaller for it. Every way sees the same blocks in the same order. Their matrix products are made as
             tensor cores make them (``tensor_cores.py``), the same for every row.

What is already in ``--work`` is not run again. A half writes ``bench/results/learning_<half>.json`` and draws the curves of
both, ``docs/learning.svg``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from against_trainer import make_model
from oomless.config import DataSource, TrainConfig
from oomless.demo import collect_text
from oomless.errors import TrainingError
from oomless.training import audit
from oomless.training.loop import train
from provenance import RESULTS, write
from tensor_cores import TensorCores

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
HELD_OUT_CHARACTERS = 3000
PICTURE = Path(__file__).parents[1] / "docs" / "learning.svg"


@dataclass(frozen=True)
class Route:
    """One way to train."""

    name: str
    settings: dict[str, Any]
    rates: tuple[float, ...]
    """All are tried, and the best is shown."""

    beside: str = "adamw"
    allowed: float | None = 0.02
    """How far its loss may lie above that of ``beside``; None for what is there to be worse."""


START_RATE = 2e-3
OPTIMIZERS = [
    Route("adamw", {"optimizer": "adamw"}, (5e-4, 1e-3, START_RATE)),
    Route("adamw_8bit", {"optimizer": "adamw_8bit"}, (1e-3,)),
    Route("adafactor", {"optimizer": "adafactor"}, (2e-3,)),
    Route("apollo", {"optimizer": "apollo"}, (1e-3, 2e-3)),
    Route("apollo_mini", {"optimizer": "apollo_mini"}, (1e-3,)),
    Route("galore", {"optimizer": "galore"}, (1e-3,)),
    Route("muon", {"optimizer": "muon"}, (5e-3,)),
    Route("sgd", {"optimizer": "sgd"}, (0.3,)),
]
CONTINUED_RATES = {"bf16": 5e-5, "fp16": 5e-6}
WAYS: dict[str, float | None] = {"master": 0.005, "plain": None, "correction": 0.005, "stochastic": 0.005}
PRECISIONS = [
    Route(
        f"{dtype} {way}",
        {"optimizer": "adamw", "dtype": dtype, "weight_precision": way},
        (rate,),
        f"{dtype} master",
        allowed,
    )
    for way, allowed in WAYS.items()
    for dtype, rate in CONTINUED_RATES.items()
]


@dataclass
class Bench:
    """The folder with text, models and finished runs."""

    work: Path
    evaluations: int = 10
    """Of each run."""

    def prepare(self) -> None:
        """Make text and the untrained model, where they are not there yet."""
        if (self.work / "model" / "model.safetensors").is_file():
            return
        text = self.work / "text"
        collect_text(text)
        for path in text.glob("*-held-out.jsonl"):
            documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({"text": text[:HELD_OUT_CHARACTERS]}) + "\n" for text in documents))
        make_model(self.work / "model", VOCABULARY, **SHAPE)

    def run(self, route: Route, rate: float, steps: int) -> dict[str, Any]:
        """Return the held-out loss at the end and the curve of one run from nothing on code."""
        return self._run(_name(route, rate, steps), route, rate, steps, "model", "code")

    def continued(self, route: Route, rate: float, steps: int) -> dict[str, Any]:
        """Return the same of one run on the manual from the model that fp32 AdamW made in as many steps."""
        return self.continued_from(route, rate, steps, steps)

    def continued_from(self, route: Route, rate: float, steps: int, start_steps: int) -> dict[str, Any]:
        """Return the same, from the model that fp32 AdamW made in ``start_steps``."""
        self.run(OPTIMIZERS[0], START_RATE, start_steps)
        start = f"{_name(OPTIMIZERS[0], START_RATE, start_steps)}/model"
        return self._run(_name(route, rate, steps), route, rate, steps, start, "manual")

    def _run(self, name: str, route: Route, rate: float, steps: int, model: str, text: str) -> dict[str, Any]:
        folder = self.work / name
        result = folder / "result.json"
        if not result.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            settings = {"dtype": "fp32", "warmup_ratio": 0.1, "weight_decay": 0.01} | route.settings
            config = TrainConfig(
                model=str(self.work / model),
                data=(DataSource(path=str(self.work / "text" / f"{text}.jsonl"), name="text"),),
                eval_data=(DataSource(path=str(self.work / "text" / f"{text}-held-out.jsonl"), name="text"),),
                output_dir=str(folder),
                cache_dir=str(self.work / "token-cache"),
                max_seq_length=SEQUENCE,
                per_device_train_batch_size=BLOCKS,
                max_steps=steps,
                eval_steps=max(1, steps // self.evaluations),
                learning_rate=rate,
                gpu="cpu",
                **settings,
            )
            began = time.perf_counter()
            # A plain run would be stopped: its norms never move.
            patience = patch.object(audit, "PATIENCE_STEPS", steps + 1)
            try:
                with patience, TensorCores() if config.dtype != "fp32" else nullcontext():
                    train(config)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                curve = [[line["step"], line["eval_loss/text"]] for line in lines if "eval_loss/text" in line]
            except TrainingError:
                curve = []
            last = curve[-1][1] if curve else math.inf
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            result.write_text(json.dumps({"loss": last, "curve": curve}))
            seconds = time.perf_counter() - began
            print(f"{route.name} at {rate:g}, {steps} steps: {last:.4f} in {seconds:.0f} s", flush=True)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _name(route: Route, rate: float, steps: int) -> str:
    return f"{route.name.replace(' ', '-')}-{rate:g}-{steps}"


def measure(
    routes: list[Route], run: Callable[[Route, float, int], dict[str, Any]], steps: int
) -> dict[str, dict[str, Any]]:
    """Return for each route its best rate with loss and curve, and the losses at all."""
    runs = {}
    for route in routes:
        found = {rate: run(route, rate, steps) for rate in route.rates}
        best = min(found, key=lambda rate: found[rate]["loss"])
        tried = {f"{rate:g}": tried["loss"] for rate, tried in found.items()}
        runs[route.name] = {"learning_rate": best, "tried": tried, **found[best]}
    return runs


def compare(routes: list[Route], runs: dict[str, dict[str, Any]]) -> None:
    """Add to each run how far its loss lies above that of its measure and how much of its measure's fall it has."""
    for route in routes:
        run, measure = runs[route.name], runs[route.beside]
        fall = [other["curve"][0][1] - other["loss"] for other in (run, measure)]
        run |= {"beside": route.beside, "above": run["loss"] / measure["loss"] - 1, "allowed": route.allowed}
        run["share_of_fall"] = fall[0] / fall[1]
        mark = "  too far" if route.allowed is not None and run["above"] > route.allowed else ""
        print(
            f"{route.name:16} {run['learning_rate']:g}  {run['loss']:.4f}  {run['above']:+.2%} of {route.beside}, "
            f"{run['share_of_fall']:.1%} of its fall{mark}"
        )


def draw(path: Path) -> None:
    """Draw the curves of both halves: optimizers, then each 16-bit type."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "oomless", "svg.fonttype": "none"}
    from matplotlib import pyplot

    runs: dict[str, dict[str, Any]] = {}
    for half in HALVES:
        runs |= json.loads((RESULTS / f"learning_{half}.json").read_text())["runs"]
    figure, places = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    panels = {"code from nothing, fp32": OPTIMIZERS}
    for dtype, rate in CONTINUED_RATES.items():
        title = f"on to the manual in {dtype} at {rate:g}"
        panels[title] = [route for route in PRECISIONS if route.settings["dtype"] == dtype]
    for place, (title, routes) in zip(places, panels.items(), strict=True):
        for route in (route for route in routes if route.name in runs):
            curve, loss = runs[route.name]["curve"], runs[route.name]["loss"]
            style = "--" if route.allowed is None else "-"
            place.plot(*zip(*curve, strict=True), style, label=f"{route.name}: {loss:.3f}", marker=".")
        place.set(title=title, xlabel="step")
        place.legend(fontsize=8)
        place.grid(alpha=0.3)
    places[0].set(ylabel="held-out loss, nats a token", ylim=(None, 6.5))
    figure.savefig(path, metadata={"Date": None})


HALVES = {"optimizers": OPTIMIZERS, "precisions": PRECISIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(options.work)
    bench.prepare()
    run = bench.run if options.half == "optimizers" else bench.continued
    runs = measure(HALVES[options.half], run, options.steps)
    compare(HALVES[options.half], runs)
    facts = {"steps": options.steps, "tokens_per_step": SEQUENCE * BLOCKS}
    write(f"learning_{options.half}", facts | {"runs": runs})
    if all((RESULTS / f"learning_{half}.json").is_file() for half in HALVES):
        draw(PICTURE)


if __name__ == "__main__":
    main()
