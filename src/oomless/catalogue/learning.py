"""How much each thing that a training gives up costs in learning, read from ``learning.yaml``, with what each figure rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from oomless.catalogue._data import read_yaml

Trains = Literal["full", "lora", "embeddings", "rows"]
"""What a learning rate is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a token teaches beside what it would teach, where one thing is given up."""

    name: str
    share: float
    evidence: str
    source: str


def shares(given_up: Mapping[str, str | None], tokens: float) -> list[Share]:
    """Return the share of each of ``given_up`` that is less than whole, with a text of so many ``tokens``.

    ``given_up`` has what was chosen of the kinds in the file, such as ``{"trainable": "lora", "no_clipping": "no_clipping"}``.
    What the file does not know costs nothing that is known.
    """
    return [share for share in _every(given_up, tokens) if share.share < 1]


def _every(given_up: Mapping[str, str | None], tokens: float) -> Iterator[Share]:
    data = read_yaml("learning.yaml")
    for kind, name in given_up.items():
        entry = data[kind] if kind == name else data[kind].get(name)
        if entry is not None:
            share = _at(entry["share"], tokens)
            yield Share(name=str(name), share=share, evidence=entry.get("evidence", ""), source=entry.get("source", ""))


def _at(share: Any, tokens: float) -> float:
    """Return ``share``, between the lengths of text that it is given for in proportion to their logarithm."""
    if not isinstance(share, dict):
        return float(share)
    points = sorted((float(length), float(value)) for length, value in share.items())
    if tokens <= points[0][0]:
        return points[0][1]
    for (shorter, above), (longer, below) in zip(points, points[1:], strict=False):
        if tokens <= longer:
            part = math.log(tokens / shorter) / math.log(longer / shorter)
            return above + part * (below - above)
    return points[-1][1]


def constant(name: str) -> float:
    """Return one of the file's plain numbers."""
    return float(read_yaml("learning.yaml")[name])


def batch() -> tuple[int, int]:
    """Return how many steps a text should make at least, and the most tokens that a step should have."""
    entry = read_yaml("learning.yaml")["batch"]
    return int(entry["steps"]), int(entry["most"])


def rate(trains: Trains, optimizer: str, width: int, alpha: float | None = None) -> float:
    """Return the peak learning rate of a model so wide; ``alpha`` is LoRA's, as if its scale were alpha / r."""
    entry = read_yaml("learning.yaml")["rates"]
    of_adamw = float(entry[trains]["rate"]) * (entry["of_width"] / width) ** entry[trains]["power"]
    return float(of_adamw * _times(optimizer) * (1.0 if alpha is None else math.sqrt(entry["alpha"] / alpha)))


def published_width() -> int:
    """Return how wide the models are that the rates in the file are for."""
    return int(read_yaml("learning.yaml")["rates"]["of_width"])


def beside_lora() -> float:
    """Return which part of LoRA's rate that of embeddings is which train beside it."""
    return float(read_yaml("learning.yaml")["rates"]["beside_lora"]["part"])


def weight_decay(trains: Trains, optimizer: str) -> float:
    """Return the decoupled weight decay."""
    return float(read_yaml("learning.yaml")["weight_decay"].get(trains, 0.0)) / _times(optimizer)


def _times(optimizer: str) -> float:
    return float(read_yaml("learning.yaml")["rates"]["times"].get(optimizer, 1.0))


def warmup_steps(total_steps: int) -> int:
    """Return in how many of a run's steps the rate rises: fewer than there are."""
    entry = read_yaml("learning.yaml")["warmup"]
    usual: float = min(max(entry["share"] * total_steps, entry["least_steps"]), entry["most_steps"])
    steps = math.ceil(min(usual, float(entry["most_share"]) * total_steps))
    return min(total_steps - 1, steps)
