"""Changes of a run that may cure it: what each sets, what it costs, and which are tried together.

Settings are those of ``TrainConfig``. What another tool's run has beside them stands under ``PLAIN``'s names: how attention is
computed, whether the loss holds all logits, what is cast, and how several GPUs share the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oomless.config import LORA_DEFAULTS, OPTIMIZER_DEFAULTS

PLAIN = (
    "attention",
    "fused_loss",
    "mixed_precision",
    "sharing",
    "offloads",
    "answers",
    "scores",
    "teacher",
    "evaluates",
)
"""What a run of another tool has beside the settings of ``TrainConfig``; ``oomless`` has none of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of settings, and what it costs."""

    name: str
    title: str
    quality: str
    speed: str
    reduces_fixed: bool
    """Whether it makes weights, gradients or optimizer state smaller; what does not, cannot help where these exceed."""

    apply: Callable[[dict[str, Any]], dict[str, Any] | None]
    """Returns the changed settings, or ``None`` where it does not apply."""


def _is_plain(values: Mapping[str, Any]) -> bool:
    return "attention" in values


def _logits(values: dict[str, Any]) -> dict[str, Any] | None:
    whole = (
        _is_plain(values) and not values["fused_loss"] and not values.get("scores") and values.get("teacher") is None
    )
    return {"fused_loss": True} if whole else None


def _attention(values: dict[str, Any]) -> dict[str, Any] | None:
    return {"attention": "sdpa"} if values.get("attention") == "eager" else None


def _evaluation(values: dict[str, Any]) -> dict[str, Any] | None:
    evaluates = values.get("evaluates") and values.get("per_device_eval_batch_size", 1) > 1
    return {"per_device_eval_batch_size": 1} if evaluates else None


def _smaller_batch(values: dict[str, Any]) -> dict[str, Any] | None:
    batch = values.get("per_device_train_batch_size", 1)
    evaluation = {"per_device_eval_batch_size": 1} if values.get("per_device_eval_batch_size", 1) > 1 else {}
    if batch <= 1:
        return evaluation or None
    accumulation = values.get("gradient_accumulation_steps", 1) * batch
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, **evaluation}


def _checkpointing(values: dict[str, Any]) -> dict[str, Any] | None:
    return None if values.get("gradient_checkpointing") else {"gradient_checkpointing": True}


def _in_backward(values: dict[str, Any]) -> dict[str, Any] | None:
    if _is_plain(values) or values.get("optimizer_in_backward") or "lora" in values.get("trainable", "full"):
        return None
    return {"optimizer_in_backward": True, "max_grad_norm": None}


def _correction(values: dict[str, Any]) -> dict[str, Any] | None:
    if _is_plain(values) or values.get("dtype") == "fp32" or values.get("weight_precision") not in (None, "master"):
        return None
    return None if values.get("trainable") == "lora" else {"weight_precision": "correction"}


def _half(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("dtype") != "fp32":
        return None
    return {
        "dtype": values.get("mixed_precision") or "auto",
        **({"mixed_precision": None} if _is_plain(values) else {}),
    }


def _optimizer(name: str) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    order = ("adamw", "adamw_8bit", "adafactor")

    def change(values: dict[str, Any]) -> dict[str, Any] | None:
        now = values.get("optimizer", "adamw")
        if values.get("sharing") not in (None, "ddp") or now not in order or order.index(now) >= order.index(name):
            return None
        dropped = {key: None for key in OPTIMIZER_DEFAULTS[now] if key not in OPTIMIZER_DEFAULTS[name]}
        return {"optimizer": name, **dropped}

    return change


def _shorter(divisor: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def change(values: dict[str, Any]) -> dict[str, Any] | None:
        length, answers = values["max_seq_length"], values.get("answers")
        if answers:  # prompts are what they are
            shorter = answers // divisor
            return {"max_seq_length": length - answers + shorter, "answers": shorter} if shorter >= 64 else None
        length //= divisor
        return {"max_seq_length": length} if length >= 64 else None

    return change


def _shared_out(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("quantization") or values.get("optimizer", "adamw") != "adamw":
        return None
    after = {"ddp": "fsdp", "zero1": "zero3", "zero2": "zero3"}.get(values.get("sharing") or "")
    return {"sharing": after} if after else None


def _offload(values: dict[str, Any]) -> dict[str, Any] | None:
    zero = str(values.get("sharing")).startswith("zero")
    return {"offloads": True} if zero and not values.get("offloads") else None


def _lora(values: dict[str, Any]) -> dict[str, Any] | None:
    if "lora" in values.get("trainable", "full"):
        return None
    return {"trainable": "lora", "tied_weights": None, "weight_precision": None, "optimizer_in_backward": None}


def _quantized(values: dict[str, Any]) -> dict[str, Any] | None:
    packed_or_cut = values.get("quantization") or values.get("sharing") in ("fsdp", "zero3")
    if packed_or_cut or "full" in values.get("trainable", "full") or values.get("use_dora"):
        return None
    return {"quantization": "nf4"}


def _head_alone(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("trainable", "full") == "lm_head" or values.get("scores"):
        return None
    return {"trainable": "lm_head", **dict.fromkeys(LORA_DEFAULTS), "quantization": None}


SAME, SAME_SPEED = "none: the same numbers", "none, or faster"
CHANGES = {
    change.name: change
    for change in (
        Change(name="logits", title="a loss that never holds all logits", quality=SAME, reduces_fixed=False,
               speed=SAME_SPEED, apply=_logits),
        Change(name="attention", title="attention without its scores in full", quality=SAME, reduces_fixed=False,
               speed="faster", apply=_attention),
        Change(name="eval_batch", title="one sequence at a time in the evaluation", quality=SAME, reduces_fixed=False,
               speed="a slower evaluation", apply=_evaluation),
        Change(name="batch", title="one block at a time, accumulated", quality=SAME, reduces_fixed=False,
               speed="more, smaller passes", apply=_smaller_batch),
        Change(name="checkpointing", title="gradient checkpointing", quality=SAME, reduces_fixed=False,
               speed="each layer's forward is computed twice", apply=_checkpointing),
        Change(name="zero3", title="weights, gradients and optimizer state shared out among the GPUs", quality=SAME,
               reduces_fixed=True, speed="each layer's weights come over the links", apply=_shared_out),
        Change(name="offload_optimizer", title="the optimizer's state in the host's memory (12 bytes a parameter, shared out)",
               quality=SAME, reduces_fixed=True, speed="a slower update, over the bus", apply=_offload),
        Change(name="in_backward", title="updates inside the backward pass", reduces_fixed=True,
               quality="no clipping by the global norm", speed="none", apply=_in_backward),
        Change(name="half", title="16-bit weights", reduces_fixed=True,
               quality="weights and their updates are rounded to 16 bits", speed="faster on tensor cores", apply=_half),
        Change(name="correction", title="8 bits of correction instead of fp32 copies", reduces_fixed=True,
               quality="weights exact to 2^-15 of themselves or better", speed="a slower update", apply=_correction),
        Change(name="adamw_8bit", title="AdamW with 8-bit state", reduces_fixed=True,
               quality="moments rounded to 8 bits in blocks", speed="a slower update", apply=_optimizer("adamw_8bit")),
        Change(name="adafactor", title="Adafactor", reduces_fixed=True,
               quality="another optimizer: second moments by rows and columns, no first", speed="a slower update",
               apply=_optimizer("adafactor")),
        Change(name="half_length", title="blocks of half the length", reduces_fixed=False,
               quality="no token sees further back than that", speed="about the same for each token", apply=_shorter(2)),
        Change(name="quarter_length", title="blocks of a quarter of the length", reduces_fixed=False,
               quality="no token sees further back than that", speed="about the same for each token", apply=_shorter(4)),
        Change(name="lora", title="LoRA instead of all weights", reduces_fixed=True,
               quality="learns less new knowledge than full training", speed="faster", apply=_lora),
        Change(name="nf4", title="frozen weights in 4 bits", reduces_fixed=True,
               quality="frozen weights are rounded to 4 bits", speed="weights are unpacked in each pass", apply=_quantized),
        Change(name="lm_head", title="lm_head alone", reduces_fixed=True,
               quality="the body learns nothing", speed="much faster", apply=_head_alone),
    )
}  # fmt: skip
_LEAN = ("logits", "attention", "batch", "checkpointing", "zero3", "offload_optimizer", "half", "correction")
BUNDLES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("attention",),
        ("logits",),
        ("batch",),
        ("checkpointing",),
        ("logits", "batch"),
        ("logits", "attention", "batch", "checkpointing"),
        ("zero3",),
        ("offload_optimizer",),
        ("in_backward",),
        ("batch", "checkpointing", "zero3", "offload_optimizer", "in_backward"),
    ),
    (
        ("adamw_8bit",),
        ("half",),
        ("half", "correction"),
        ("half", "adamw_8bit"),
        ("half", "correction", "adamw_8bit"),
        (*_LEAN, "adamw_8bit"),
        (*_LEAN, "adamw_8bit", "in_backward"),
    ),
    (
        ("half", "correction", "adafactor"),
        (*_LEAN, "adafactor", "in_backward"),
    ),
    (
        ("logits", "batch", "checkpointing", "half_length"),
        (*_LEAN, "adafactor", "in_backward", "half_length"),
        (*_LEAN, "adafactor", "in_backward", "quarter_length"),
    ),
)
"""Changes taken together, that leave what trains as it is: by what they cost, and in each group the leanest last."""

EVALUATION: tuple[tuple[str, ...], ...] = (("eval_batch",), ("eval_batch", "half_length"))
"""For a run that fails in its evaluation."""

PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "nf4": (("nf4",), ("logits", "batch", "checkpointing", "nf4"), (*_LEAN, "nf4", "adamw_8bit")),
    "lora": (
        ("half", "lora"),
        ("logits", "batch", "checkpointing", "half", "lora"),
        ("logits", "batch", "checkpointing", "half", "lora", "nf4"),
        ("logits", "attention", "batch", "checkpointing", "half", "lora", "nf4", "half_length"),
    ),
    "lm_head": (
        ("half", "lm_head", "correction", "adamw_8bit"),
        ("half", "lm_head", "correction", "adafactor", "in_backward"),
        ("half", "lm_head", "correction", "adafactor", "in_backward", "quarter_length"),
    ),
}
"""The same for changes of what trains, or of what frozen weights are stored in."""


def apply_all(names: tuple[str, ...], values: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return those changes of ``names`` that apply to ``values``, and what they set."""
    applied: list[str] = []
    changed, sets = dict(values), dict[str, Any]()
    for name in names:
        change = CHANGES[name].apply(changed)
        if change is not None:
            applied.append(name)
            sets |= change
            changed = {k: v for k, v in (changed | change).items() if v is not None or k in PLAIN}
    return tuple(applied), sets
