"""The model card: what was trained on what, with which settings, and how it was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from oomless import __version__
from oomless.config import TrainConfig
from oomless.training.run_folder import Metrics
from oomless.units import counted

if TYPE_CHECKING:
    from oomless.export.plan import Plan

NAME = "README.md"
_NOT_OF_THE_MODEL = ("output_dir", "cache_dir", "resume", "report_to")


def write(plan: Plan, folder: Path) -> None:
    """Write the card of ``plan`` to ``folder``."""
    (folder / NAME).write_text(text(plan), encoding="utf-8")


def text(plan: Plan) -> str:
    """Return the card of ``plan``: the Hub's front matter, then prose."""
    source = plan.source
    base = source.began_with
    front: dict[str, Any] = {"base_model": base, "library_name": _library(plan), "tags": ["oomless"]}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {_title(plan)}", ""]
    if source.run is None:
        lines += [f"Made of `{base}` by oomless {__version__}.", ""]
    else:
        lines += [*_training(source.run, plan), ""]
    lines += ["## Form", "", f"{_form(plan)} Numbers: {plan.files.dtype}.", ""]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    if plan.source.run is not None:
        return Path(plan.source.run.output_dir).name
    return f"{plan.source.folder.name}, exported"


def _library(plan: Plan) -> str:
    return {"safetensors": "transformers", "adapter": "peft", "gguf": "llama.cpp"}[plan.to]


def _form(plan: Plan) -> str:
    if plan.to == "adapter":
        return "An adapter of peft: it is loaded beside the base model."
    merged = "" if plan.source.kind == "model" else " What was trained is merged into the base model's own weights."
    return {
        "safetensors": "Safetensors, for transformers and what reads its files.",
        "gguf": "GGUF, for llama.cpp and Ollama.",
    }[plan.to] + merged


def _training(run: TrainConfig, plan: Plan) -> list[str]:
    saved = plan.source.saved
    state = {} if saved is None else json.loads((saved.folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    after = ""
    if saved is not None:
        after = f", {counted(saved.step, 'step')} and {counted(state['tokens'], 'token')}"
    settings = {name: value for name, value in run.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    lines = [f"`{run.model}`, trained by oomless {__version__} ({run.trainable}{after}).", "", "## Text", ""]
    lines += [f"- `{source.path}`" for source in run.data]
    metrics = _losses(plan)
    if metrics:
        lines += ["", "## Held-out loss", "", *(f"- {name}: {loss:.4f}" for name, loss in metrics.items())]
    return [*lines, "", "## Settings", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```"]


def _losses(plan: Plan) -> dict[str, float]:
    saved = plan.source.saved
    if saved is None:
        return {}
    return Metrics(saved.folder.parent / "metrics.jsonl", lambda said: None).evaluated(saved.step)
