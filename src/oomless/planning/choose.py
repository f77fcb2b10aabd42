"""The questions that people ask of the search: what should I train, on which of these, how long can a sequence be?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oomless.catalogue import learning
from oomless.config import TrainConfig, plain
from oomless.config.batch import Batch
from oomless.config.values import kinds, require_kind
from oomless.errors import ConfigError
from oomless.models import form
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.choice import Choice
from oomless.planning.duration import tokens_to_read
from oomless.planning.given import LONGEST, read_given
from oomless.planning.layout import OF_THE_TEXT
from oomless.planning.plan import Target, require_host, targets_for
from oomless.planning.row import Heard
from oomless.planning.search import Progress, search
from oomless.planning.strategies import UNPLANNED, Prefer, Quality, Settings
from oomless.planning.trial import results_folder
from oomless.planning.wish import Wish
from oomless.training import rates

LENGTH_STEP = 256
"""The longest sequence is found to within so many tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The choice for one of several models or GPUs."""

    model: str
    gpu: str
    choice: Choice


def choose_training(
    given: Settings,
    *,
    prefer: Prefer = "balanced",
    tokens: int | None = None,
    hours: float | None = None,
    host_bytes: int | None = None,
    network_bytes_per_s: float | None = None,
    keep_trials: bool = True,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> Choice:
    """Return the best training that agrees with ``given`` (as in YAML: model, gpu and what is pinned) and fits the GPU.

    Where nothing is said of a step's blocks, their number follows from how much text there is.

    ``max_seq_length`` may be ``"max"``: the longest for which nothing of quality is given up against a short one.

    Args:
        given: settings as ``TrainConfig.from_mapping`` takes them; what they leave open is chosen.
        prefer: what counts among strategies that fit: what a token teaches, that for its time, or time alone.
        tokens: how much text the run reads; by default as its settings or its files say.
        hours: how many there are for it.
        host_bytes: memory of the machine, for offloading; by default what is free here, or an assumption (``target_for``).
        network_bytes_per_s: what connects several machines, each in one direction; by default an assumption.
        keep_trials: keep what was rehearsed in the user's cache folder, and use what is there.
        progress: is told what is being tried, and what share of a search is done, from 0 to 1.
        heard: is told the strategies that were looked at so far, each time that there is one more.

    Raises:
        UserError: model, GPU or settings do not fit together.
    """
    require_kind("given", given, Mapping, 'name a model and what is pinned, such as {"model": "a/folder", "gpu": "T4"}')
    target = targets_for([str(given.get("gpu", "auto"))], host_bytes, network_bytes_per_s)[0]
    wish = Wish(prefer=prefer, tokens=tokens, hours=hours)
    return _choose(given, target, results_folder() if keep_trials else None, wish, progress, heard)


def compare(
    given: Settings,
    models: Sequence[str],
    gpus: Sequence[str],
    *,
    prefer: Prefer = "balanced",
    tokens: int | None = None,
    hours: float | None = None,
    host_bytes: int | None = None,
    network_bytes_per_s: float | None = None,
    progress: Progress | None = None,
) -> list[Compared]:
    """Return the choice for each of ``models`` on each of ``gpus``.

    Raises:
        UserError: one of them is not known, or the settings do not fit together.
    """
    targets = targets_for(gpus, host_bytes, network_bytes_per_s)
    found = []
    for model in models:
        for gpu, target in zip(gpus, targets, strict=True):
            say = (
                (lambda text, share, name=f"{model} on {gpu}": progress(f"{name}: {text}", share)) if progress else None
            )
            choice = _choose(
                {**given, "model": model},
                target,
                results_folder(),
                Wish(prefer=prefer, tokens=tokens, hours=hours),
                say,
            )
            found.append(Compared(model=model, gpu=gpu, choice=choice))
    return found


def _choose(
    given: Settings, target: Target, results: Path | None, wish: Wish, progress: Any, heard: Heard | None = None
) -> Choice:
    if wish.hours is not None and (target.gpu is None or target.gpu.bandwidth_bytes_per_s is None):
        raise ConfigError(
            f"hours need a GPU whose speed is known; got {target.name}: name one of the catalogue, or leave them out"
        )
    pins = read_given(given)
    spec = resolve_for_plan(pins["model"], trust_remote_code=pins.get("trust_remote_code", False))
    if pins.get("max_seq_length") != LONGEST:
        require_host(pins.get("max_seq_length", TrainConfig.max_seq_length), target)
        settings, wish = with_batch({**UNPLANNED, **pins}, wish, target.gpus)
        return _with_rates(
            search(spec, settings, target, wish=wish, results=results, progress=progress, heard=heard), spec
        )

    def at(length: int, held: Quality | None) -> Choice:
        settings = {**UNPLANNED, **pins, "max_seq_length": length}
        return search(spec, settings, target, held=held, wish=wish, results=results, progress=progress, heard=heard)

    lengths = _lengths(spec, pins, target.gpus)
    require_host(lengths[0], target)
    best = at(lengths[0], None)
    if best.picked is None:
        return best
    quality, low, high, stride = best.picked.quality, 0, len(lengths), 1
    while high - low > 1:
        # Twice as long while that fits, then halfway between what fits and what does not.
        middle = min(low + stride, high - 1) if high == len(lengths) else (low + high) // 2
        choice = at(lengths[middle], quality)
        best, low, high = (choice, middle, high) if choice.picked is not None else (best, low, middle)
        stride *= 2
    return _with_rates(best, spec)


def _with_rates(choice: Choice, spec: ModelSpec) -> Choice:
    """Return ``choice`` with how fast it learns, and with its steps where they are not assumed; the run itself counts its text."""
    config, wish = choice.config, choice.wish
    if config is None or wish is None:
        return choice
    step_tokens = config.blocks_per_step * config.max_seq_length * choice.target.gpus
    counted = None if wish.tokens is None else -(-wish.tokens // step_tokens)
    steps = config.max_steps or counted
    return replace(choice, config=rates.resolved(config, spec.config), rates=rates.said(config, spec.config, steps))


def with_batch(settings: Settings, wish: Wish, gpus: int) -> tuple[Settings, Wish]:
    """Return ``settings`` with the tokens of a step where they do not say, and ``wish`` with those of the run where they are known.

    A step has as many blocks as leave a thousand steps in the text, between one and what published recipes have.
    """
    said = settings.keys() & {"tokens_per_step", "per_device_train_batch_size", "gradient_accumulation_steps"}
    reading = None
    if wish.tokens is None:  # which no setting of a technique, of which some are open, has a part in
        about = {name: value for name, value in settings.items() if name in OF_THE_TEXT | kinds(Batch).keys()}
        reading = tokens_to_read(TrainConfig.from_mapping(about), gpus)
    if reading is not None:
        wish = replace(wish, tokens=(reading.tokens_low + reading.tokens_high) // 2, basis=reading.basis)
    # Who counts steps has a step in mind: the smallest.
    if said or settings.get("max_steps") is not None:
        return settings, wish
    steps, most = learning.batch()
    length = settings.get("max_seq_length", TrainConfig.max_seq_length)
    blocks = min(most, wish.text_tokens // steps) // (length * gpus)
    whole = gpus << max(0, blocks.bit_length() - 1)
    return {**settings, "tokens_per_step": whole * length}, wish


def _lengths(spec: ModelSpec, pins: Settings, gpus: int) -> Sequence[int]:
    """Return the lengths among which the longest is looked for, the shortest first."""
    longest = form.longest(spec, pins.get("packing", TrainConfig.packing)) or 1 << 17
    if "tokens_per_step" not in pins:
        return [*range(LENGTH_STEP, longest + 1, LENGTH_STEP)] or [longest]
    tokens, passes = pins["tokens_per_step"], gpus * pins.get("per_device_train_batch_size", 1)
    found = [length for length in range(2, min(longest, tokens) + 1) if tokens % (length * passes) == 0]
    if not found:
        raise ConfigError(
            f"no length divides tokens_per_step into whole passes of {passes} blocks; got {tokens}: choose a multiple of {2 * passes}",
            *("tokens_per_step", "max_seq_length"),
        )
    return [length for length in found if length >= LENGTH_STEP] or found[-1:]


def picked_settings(choice: Choice) -> Settings:
    """Return the pick as settings for ``oomless train --config``: what was given and what was chosen, and nothing else.

    Raises:
        ConfigError: nothing was picked.
    """
    picked = choice.picked
    if picked is None:
        raise ConfigError("nothing fits, so there is no pick to write: see what would make it fit")
    settings = {**choice.given, **picked.settings}
    for name, placeholder in UNPLANNED.items():
        if settings.get(name) == placeholder:
            del settings[name]
    if not settings.get("gpu", "auto").startswith(("auto", "cuda", "virtual:")):
        del settings["gpu"]
    return plain(settings)
