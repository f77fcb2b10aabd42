"""What a training may give up, best first; and the ways to spend less memory that give up nothing but time.

**Quality** comes first, in this order: what trains (everything, then LoRA with embeddings and head, LoRA with the head, the
head alone), the bits of what is frozen (16, 8, 4), the optimizer (AdamW, AdamW with 8-bit state, APOLLO, Adafactor), how
16-bit weights keep small updates (fp32 masters, 8 bits of correction, stochastic rounding), and whether gradients are clipped
by their global norm, which updates inside the backward pass rule out. ``docs/optimizers.md`` has the measurements behind
the last three.

**Equal quality**: what is offloaded (``placements``), how much is computed again (``rungs``, each computing more and keeping less
than the one before), and how a step's blocks are cut into micro-batches. The numbers trained with are the same; the fastest is best.

A setting that the user gave is pinned: only strategies that agree with it are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.units import counted

CHOSEN = {"trainable", "optimizer", "per_device_train_batch_size", "gradient_accumulation_steps", "loss_chunk_bytes"}
"""Settings with a default that a plan does not take: it chooses them where they are not given."""

Prefer = Literal["quality", "balanced", "fast"]
"""What counts among the strategies that fit."""

PREFERENCES: tuple[Prefer, ...] = get_args(Prefer)

PARTS = ("full", "lora+embed_tokens+lm_head", "lora+lm_head", "lora", "lm_head")
COMPARED = ("full", "lora+embed_tokens+lm_head", "lora")
"""What is compared with what gives up less."""

QLORA = ("lora", "nf4")
"""What most people run on a small card, which is always compared: what trains, and how the rest is stored."""

COMMON = (("full", None), ("lora", None), QLORA)
"""What people run, which is compared whatever comes of it."""

FROZEN_BITS: dict[str | None, int] = {None: 16, "int8": 8, "nf4": 4, "mxfp4": 4}
ROUNDED = (None, "int8", "nf4")
"""How what is frozen may be stored whatever the checkpoint holds, which is all that is chosen from."""

OPTIMIZERS = ("adamw", "adamw_8bit", "apollo", "adafactor")
OPTIMIZER_NAMES = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW", "apollo": "APOLLO", "adafactor": "Adafactor"}
WEIGHT_PRECISIONS = ("master", "correction", "stochastic")
WEIGHT_PRECISION_NAMES = {
    "master": "fp32 masters",
    "correction": "8 bits of correction",
    "stochastic": "stochastic rounding",
    "plain": "16-bit weights as they are",
}
GIVEN_UP = {
    "full": "",
    "lora+embed_tokens+lm_head": "the body learns through LoRA alone",
    "lora+lm_head": "the body learns through LoRA alone, embed_tokens nothing",
    "lora": "the body learns through LoRA alone, embed_tokens and lm_head nothing",
    "lm_head": "the body learns nothing",
    "int8": "frozen weights rounded to 8 bits",
    "nf4": "frozen weights rounded to 4 bits",
    "adamw_8bit": "moments in 8 bits",
    "apollo": "moments of a random projection",
    "adafactor": "second moments by row and column, no first",
    "correction": "weights kept to 24 bits, not 32",
    "stochastic": "weights rounded at random",
    "plain": "small updates are lost",
}
RUNGS_OF_LAYERS = 8
"""Checkpointing is tried in so many steps from no layer to all."""

LARGEST_PASS_TOKENS = 1 << 11
"""Larger micro-batches are not tried: so many tokens keep any GPU busy."""

TILES = 8
SMALL_LOSS_CHUNK_BYTES = 16 << 20

Settings = dict[str, Any]
REPLICATED: Settings = {"sharding": "replicate"}
"""Every GPU holds the whole model, and nothing is gathered before a layer."""

UNPLANNED: Settings = {"data": "-", "output_dir": "-"}
"""What a plan does not look at, where it is not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What decides how well a training learns; all else decides how fast."""

    trainable: str
    tied_weights: str | None
    quantization: str | None
    optimizer: str
    weight_precision: str | None
    """``None`` where all that trains is fp32."""

    clips: bool
    """Whether gradients are clipped by their global norm."""

    def settings(self) -> Settings:
        """Return it as settings of a training; clipping is on unless updates run inside the backward pass."""
        chosen = asdict(self)
        del chosen["clips"]
        return chosen

    def has(self, parts: Settings) -> bool:
        """Return whether this trains ``parts``, one of ``parts_in_order``."""
        return all(getattr(self, name) == value for name, value in parts.items())

    def differs_in_state(self, other: Quality) -> bool:
        """Return whether this is ``other`` but for the optimizer and how small updates are kept.

        Where updates run inside the backward pass, which share no trials, only the optimizer may differ.
        """
        precision = self.weight_precision if other.clips else other.weight_precision
        return self == replace(other, optimizer=self.optimizer, weight_precision=precision)

    def given_up(self) -> str:
        """Return what this gives up against the best there is, in words."""
        chosen = (self.trainable, self.quantization, self.optimizer, self.weight_precision)
        words = [GIVEN_UP.get(name, "") for name in chosen if name is not None]
        words.append("" if self.clips else "no clipping by the global norm")
        return ", ".join(word for word in words if word) or "nothing"

    def __str__(self) -> str:
        """Return it for a person: ``"full, AdamW, 8 bits of correction"``."""
        words = [self.trainable if self.tied_weights is None else f"{self.trainable} ({self.tied_weights})"]
        if self.quantization is not None:
            of_what = "experts as stored" if self.quantization == "mxfp4" else "frozen weights"
            words.append(f"{FROZEN_BITS[self.quantization]}-bit {of_what}")
        words.append(OPTIMIZER_NAMES.get(self.optimizer, self.optimizer))
        if self.weight_precision is not None:
            words.append(WEIGHT_PRECISION_NAMES[self.weight_precision])
        if not self.clips:
            words.append("no clipping")
        return ", ".join(words)


def parts_in_order(pins: Mapping[str, Any], *, tied: bool) -> list[Settings]:
    """Return every choice of what trains and what the rest is stored in that agrees with ``pins``, best first.

    ``tied`` says whether the model's ``embed_tokens`` and ``lm_head`` are one matrix.

    Raises:
        ConfigError: none does.
    """
    every = _every_parts(pins, tied=tied)
    found = [parts for parts in every if any(_every_run(pins, parts))]
    if not found:
        raise _reason(pins, every)
    return found


def require_any(pins: Mapping[str, Any]) -> None:
    """Check, before a model is read, that there is a strategy that agrees with ``pins``.

    Raises:
        ConfigError: there is none.
    """
    every = _every_parts(pins, tied=False)
    if not any(any(_every_run(pins, parts)) for parts in every):
        raise _reason(pins, every)


def _every_parts(pins: Mapping[str, Any], *, tied: bool) -> list[Settings]:
    return [
        {"trainable": trainable, "tied_weights": tied_weights, "quantization": quantization}
        for trainable, tied_weights in _trainable(pins, tied)
        for quantization in _options(pins, "quantization", ROUNDED)
    ]


def any_run(pins: Mapping[str, Any], parts: Settings) -> Settings:
    """Return one strategy with ``parts`` that agrees with ``pins``, to build what they put on the GPU."""
    return next(_every_run(pins, parts)) | _needed_rung(pins)


def _every_run(pins: Mapping[str, Any], parts: Settings) -> Iterator[Settings]:
    for quality in _every_quality(pins, parts, sixteen_bit=False):
        for placement in _every_placement(quality, pins):
            chosen = quality.settings() | placement
            if contradiction(pins, chosen) is None:
                yield chosen


def _needed_rung(pins: Mapping[str, Any]) -> Settings:
    """Return what ``pins`` have no effect without."""
    needed = pins.get("checkpointed_layers") or pins.get("offload_activations")
    return {"gradient_checkpointing": True} if needed and "gradient_checkpointing" not in pins else {}


def contradiction(pins: Mapping[str, Any], chosen: Settings) -> ConfigError | None:
    """Return why ``chosen`` does not go together with ``pins``, which the settings themselves say; ``None`` where it does."""
    try:
        _example(pins, chosen)
    except ConfigError as error:
        return error
    return None


def _example(pins: Mapping[str, Any], chosen: Settings) -> TrainConfig:
    return TrainConfig.from_mapping({**UNPLANNED, "model": "-", **pins, **_needed_rung(pins), **chosen})


def _reason(pins: Mapping[str, Any], every: list[Settings]) -> ConfigError:
    """Return why no strategy agrees with ``pins``: what they say against each other, or against all that could be chosen."""
    reasons = [
        contradiction(pins, quality.settings() | placement)
        for parts in every
        for quality in _every_quality(pins, parts, sixteen_bit=False)
        for placement in _every_placement(quality, pins)
    ]
    found = [reason for reason in reasons if reason is not None]
    return next((reason for reason in found if set(reason.settings) <= set(pins)), found[0])


def qualities(pins: Mapping[str, Any], parts: Settings, *, sixteen_bit: bool, gpus: int = 1) -> list[Quality]:
    """Return every quality with ``parts`` that agrees with ``pins`` and that so many ``gpus`` can share, best first.

    ``sixteen_bit`` says whether any of the weights that train has 16 bits.
    """
    every = _every_quality(pins, parts, sixteen_bit=sixteen_bit)
    return [quality for quality in every if placements(quality, pins, gpus=gpus)]


def _every_quality(pins: Mapping[str, Any], parts: Settings, *, sixteen_bit: bool) -> list[Quality]:
    precisions = _options(pins, "weight_precision", WEIGHT_PRECISIONS if sixteen_bit else (None,))
    return [
        Quality(**parts, optimizer=optimizer, weight_precision=precision, clips=clips)
        for optimizer, precision, clips in product(_options(pins, "optimizer", OPTIMIZERS), precisions, _clipping(pins))
    ]


def _options(pins: Mapping[str, Any], name: str, options: tuple[Any, ...]) -> tuple[Any, ...]:
    return (pins[name],) if name in pins else options


def _trainable(pins: Mapping[str, Any], tied: bool) -> Iterator[tuple[str, str | None]]:
    for trainable in _options(pins, "trainable", PARTS):
        names = {part.strip() for part in trainable.split("+")}
        one_of_both = len(names & {"lm_head", "embed_tokens"}) == 1
        if "tied_weights" in pins:
            yield trainable, pins["tied_weights"]
        elif not tied or not one_of_both:
            yield trainable, None
        elif "trainable" in pins or trainable == "lm_head":
            # LoRA beside the head of a tied model is left out: the one matrix trained as one is better and smaller.
            yield from ((trainable, "shared"), (trainable, "untied"))


def _clipping(pins: Mapping[str, Any]) -> tuple[bool, ...]:
    if pins.get("max_grad_norm") is not None:
        return (pins["max_grad_norm"] > 0,)
    if "optimizer_in_backward" in pins:
        return (not pins["optimizer_in_backward"],)
    return (True, False)


def placements(
    quality: Quality, pins: Mapping[str, Any], *, movable: Collection[str] = (), gpus: int = 1
) -> list[Settings]:
    """Return where gradients, state and frozen weights may lie, the least on the GPU last.

    ``movable`` are settings that would move frozen weights to the host. Several ``gpus`` may each hold the whole model where they can
    hold parts of it.
    """
    every = _every_placement(quality, pins, movable)
    found = [placement for placement in every if contradiction(pins, quality.settings() | placement) is None]
    if gpus == 1:
        return found
    from oomless.techniques.sharding import can_share, has_choice  # torch, which reading settings does not need

    def settings(placement: Settings) -> TrainConfig:
        return _example(pins, quality.settings() | placement)

    ways = [
        placement | way
        for placement in found
        for way in ([REPLICATED, {}] if "sharding" not in pins and has_choice(settings(placement)) else [{}])
    ]
    return [way for way in ways if can_share(settings(way), gpus)]


def _every_placement(quality: Quality, pins: Mapping[str, Any], movable: Collection[str] = ()) -> list[Settings]:
    in_backward: tuple[bool, ...] = (False,)
    if not quality.clips:
        # Without clipping updates inside the backward pass cost nothing; they are why clipping is given up, unless the user did.
        in_backward = (False, True) if pins.get("max_grad_norm") == 0 else (True,)
    ways = {
        "experts_on_host": _options(
            pins, "experts_on_host", (False, True) if "experts_on_host" in movable else (False,)
        ),
        "stream_frozen": _options(pins, "stream_frozen", (False, True)),
        "offload_optimizer": _options(pins, "offload_optimizer", (False, True)),
        "optimizer_in_backward": _options(pins, "optimizer_in_backward", in_backward),
        "embeddings_on_host": _options(
            pins, "embeddings_on_host", (False, True) if "embeddings_on_host" in movable else (False,)
        ),
    }
    return [{name: True for name, on in zip(ways, chosen, strict=True) if on} for chosen in product(*ways.values())]


def rungs(pins: Mapping[str, Any], layers: int, *, cheap_recompute: bool, mlp_tiles: bool) -> list[Settings]:
    """Return the ways to keep less for backward that agree with ``pins``, the fastest first and the leanest last.

    ``layers`` is how many can be checkpointed; ``cheap_recompute`` and ``mlp_tiles`` say whether the model has parts for them.
    """
    cheap: Settings = {"cheap_recompute": True} if cheap_recompute else {}
    tiles: Settings = {"mlp_tiles": TILES} if mlp_tiles else {}
    offload = {"offload_activations": True}
    small_chunk = {"loss_chunk_bytes": SMALL_LOSS_CHUNK_BYTES}
    ladder: list[Settings] = [{}, cheap]
    if not layers:
        ladder = [{}, small_chunk]
    elif pins.get("gradient_checkpointing") is False:
        ladder += [cheap | tiles, cheap | tiles | small_chunk]
    else:
        apart = -(-layers // RUNGS_OF_LAYERS)
        ladder += [
            cheap | {"gradient_checkpointing": True, "checkpointed_layers": count}
            for count in range(apart, layers, apart)
        ]
        ladder.append(cheap | {"gradient_checkpointing": True})
        ladder += [ladder[-1] | tiles, ladder[-1] | tiles | offload, ladder[-1] | tiles | offload | small_chunk]
    checkpointing = {**pins, **_needed_rung(pins)}.get("gradient_checkpointing")
    found: list[Settings] = []
    for rung in ladder:
        open_ones = {name: value for name, value in rung.items() if name not in pins}
        if checkpointing in (None, "gradient_checkpointing" in rung) and open_ones not in found:
            found.append(open_ones)
    return found or [{}]


def micro_batches(pins: Mapping[str, Any], gpus: int = 1) -> list[Settings]:
    """Return how the blocks of a step of ``gpus`` may be cut into micro-batches, one block at a time first."""
    size, steps = pins.get("per_device_train_batch_size"), pins.get("gradient_accumulation_steps")
    blocks, sizes = (size or 1) * (steps or 1), [size or 1]
    if "tokens_per_step" in pins:
        blocks = max(1, pins["tokens_per_step"] // pins.get("max_seq_length", TrainConfig.max_seq_length))
        if size is None:
            most = max(1, LARGEST_PASS_TOKENS // pins.get("max_seq_length", TrainConfig.max_seq_length))
            whole = [1 << power for power in range(8) if blocks % (gpus << power) == 0 and 1 << power <= most]
            sizes = [blocks // steps] if steps else whole or [1]
    return [
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, blocks // size)}
        for size in sizes
        if size
    ]


def in_words(settings: Mapping[str, Any]) -> str:
    """Return how ``settings`` spend time to save memory: ``"2 x 8 blocks, 12 layers checkpointed"``."""
    size, steps = settings.get("per_device_train_batch_size", 1), settings.get("gradient_accumulation_steps", 1)
    words = [f"{size} x {steps} blocks" if size * steps > 1 else "1 block"]
    if settings.get("gradient_checkpointing"):
        layers = settings.get("checkpointed_layers")
        words.append("all layers checkpointed" if layers is None else f"{counted(layers, 'layer')} checkpointed")
    words += [phrase for name, phrase in _PHRASES.items() if settings.get(name)]
    return ", ".join(words)


_PHRASES = {
    "cheap_recompute": "cheap recomputation",
    "mlp_tiles": "MLPs in tiles",
    "offload_activations": "activations offloaded",
    "optimizer_in_backward": "updates in backward",
    "offload_optimizer": "optimizer offloaded",
    "embeddings_on_host": "embeddings on the host",
    "experts_on_host": "experts on the host",
    "stream_frozen": "frozen layers streamed",
    "sharding": "the whole model on each GPU",
}
