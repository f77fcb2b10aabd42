"""What to try, from the reading alone: changes that suit the phase, the tool and what asked, without those that are on already.

Nothing here is rehearsed, so no bytes are promised. ``cures.py`` rehearses what can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oomless.diagnosis.attribution import Suspect
from oomless.diagnosis.findings import Finding
from oomless.diagnosis.messages import ON_GPU
from oomless.diagnosis.situation import OWN_SHARING, Situation
from oomless.diagnosis.tools import word

MOST = 6
_SEES = re.compile(r"vl\b|vision|llava|minicpm-?[vo]", re.IGNORECASE)
"""Models that read pictures, by their names."""

CUDA_ALONE = ("logits", "adamw_8bit", "paged", "nf4")
"""Changes whose libraries have no kernels for Metal and NPUs."""

TITLES = {
    "batch": "fewer sequences at once, accumulated: the same training",
    "checkpointing": "gradient checkpointing: activations are computed again instead of kept",
    "logits": "a loss that never holds all logits: the same training",
    "attention": "attention that does not hold its scores in full: the same training",
    "shorter": "shorter sequences",
    "half": "weights in 16 bits",
    "load_half": "load the weights in 16 bits",
    "nf4": "frozen weights in 4 bits (QLoRA)",
    "lora": "LoRA: gradients and optimizer state of the adapter alone",
    "adamw_8bit": "AdamW with 8-bit state: 2 bytes a parameter instead of 8 (4 in 16 bits)",
    "paged": "8-bit AdamW that moves to the host's memory where the GPU is full",
    "adafactor": "Adafactor: almost no optimizer state, another optimizer",
    "zero3": "share weights, gradients and optimizer state out among the GPUs",
    "offload_optimizer": "the optimizer's state in the host's memory (slower; needs RAM: 12 bytes a parameter)",
    "fsdp_offload": "weights, gradients and optimizer state in the host's memory (much slower)",
    "offload_param": "the weights in the host's memory too (much slower)",
    "live_parameters": "fewer weights gathered at once by ZeRO-3",
    "eval_batch": "a smaller batch in the evaluation",
    "eval_accumulation": "logits to the host after each batch of the evaluation",
    "eval_loss_only": "keep no logits in the evaluation where only the loss is needed",
    "save_sharded": "save each GPU's part by itself, without gathering the whole model on one",
    "merge_on_cpu": "merge the adapter in the host's memory",
    "map_location": "read checkpoints into the host's memory first",
    "load_one_gpu": "each process on its own GPU",
    "generations": "fewer answers to each prompt",
    "completion": "shorter answers",
    "vllm_share": "a smaller share of the GPU for vLLM",
    "reference": "no second copy of the weights as reference",
    "teacher": "the teacher in 16 or 4 bits, or a smaller one",
    "last_logits": "logits of the last token alone, as generation needs them",
    "fewer_prompts": "fewer or shorter prompts at once",
    "vision": "fewer tokens for each picture",
    "expandable": "an allocator that does not fragment",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One change to try, in words and in the tool's own."""

    change: str
    title: str
    how: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {"change": self.change, "title": self.title, "how": self.how}


def advise(situation: Situation, findings: Sequence[Finding], suspects: Sequence[Suspect]) -> tuple[Remedy, ...]:
    """Return what to try, the likeliest first; nothing where what ran out is not the GPU's memory or needs no training change."""
    first = situation.reading.first
    if first is not None and (first.message.kind not in ON_GPU or first.place.in_managed_memory):
        return ()
    if (
        first is not None
        and first.message.kind == "driver"
        and first.place.phase is None
        and first.message.source == "CUDA"
    ):
        return ()  # nothing shows that the training had filled the GPU
    topics: set[str] = {finding.topic for finding in findings}
    if topics & {"limit"} and first is not None and first.message.source != "MPS":
        return ()
    numbers = _numbers(situation)
    found = [
        Remedy(change=name, title=_title(situation, name), how=how)
        for name in dict.fromkeys(_names(situation, topics, suspects))
        if not _is_on(situation, name) and (how := word(situation.tool, name, numbers)) is not None
    ]
    return tuple(found[:MOST])


def _title(situation: Situation, name: str) -> str:
    length = situation.values.get("max_seq_length")
    if name == "shorter" and length:
        return f"shorter sequences, such as {max(64, length // 2):,} tokens instead of {length:,}"
    if name == "batch" and situation.values.get("per_device_train_batch_size", 1) > 1:
        return f"1 sequence at once instead of {situation.values['per_device_train_batch_size']}, accumulated: the same training"
    if name == "zero3" and not situation.trains_all:
        return "share the frozen weights out among the GPUs"
    return TITLES[name]


def _numbers(situation: Situation) -> dict[str, object]:
    values = situation.shown_values
    batch, accumulation = values.get("per_device_train_batch_size", 1), values.get("gradient_accumulation_steps", 1)
    length = values.get("max_seq_length")
    if situation.method in ("grpo", "ppo"):
        length = values.get("max_completion_length", length)
    return {
        **values,
        "gradient_accumulation_steps": accumulation * batch if "per_device_train_batch_size" in values else "N",
        "max_seq_length": max(64, length // 2) if length else "N",
    }


def _names(situation: Situation, topics: set[str], suspects: Sequence[Suspect]) -> Iterator[str]:
    first = situation.reading.first
    place = first.place if first is not None else None
    phase = place.phase if place is not None else None
    if place is not None and place.in_engine:
        yield from ("vllm_share",)
        return
    shares = situation.several.many
    if place is not None and place.generating and situation.method is None:
        if suspects and "logits" in suspects[0].tensor.kind:
            yield "last_logits"
        yield from ("fewer_prompts", "load_half", "nf4")
        return
    if phase == "load":
        yield from _loading(situation, topics)
        return
    if phase == "save":
        frames = " ".join(f.name for f in place.frames) if place is not None else ""
        if "merge" in frames:
            yield "merge_on_cpu"
        if situation.several.shares:
            yield "save_sharded"
        elif "merge" not in frames:
            yield from ("merge_on_cpu",) if situation.values.get("trainable") == "lora" else ()
        return
    if phase == "evaluation" and place is not None and place.keeps_outputs:
        yield from ("eval_loss_only", "eval_accumulation", "shorter", "eval_batch")
        return
    if phase == "evaluation":
        yield from ("eval_batch", "eval_accumulation", "eval_loss_only", "shorter")
        return
    if place is not None and place.in_vision:
        yield from ("vision", "attention", "batch", "checkpointing", "shorter")
        return
    if place is not None and place.gathers:
        yield "live_parameters"
    large = "too large for this GPU" in topics
    scores = bool(suspects) and "scores" in suspects[0].tensor.kind
    if scores or (place is not None and "attn_weights" in place.code) or situation.attention == "eager":
        yield "attention"
    if phase == "optimizer" or large:
        yield from _of_state(situation, shares)
        if large and phase != "optimizer":
            yield from ("half", "batch", "checkpointing", "logits", "shorter")
        return
    if situation.method in ("grpo", "ppo"):
        yield from ("vllm_share", "batch", "generations", "completion", "logits", "checkpointing")
    elif situation.method is not None:
        yield from ("teacher",) if situation.method in ("gkd", "distillation") else ()
        yield from ("batch", "reference", "checkpointing", "logits", "shorter")
    kind = suspects[0].tensor.kind if suspects else ""
    if situation.model is not None and _SEES.search(situation.model):
        yield "vision"
    if scores:
        yield from ("batch", "shorter", "checkpointing")
    elif "logits" in kind or "log-prob" in kind or phase == "loss" or (place is not None and place.module == "lm_head"):
        yield from ("logits", "batch", "shorter", "checkpointing")
    else:
        yield from ("batch", "checkpointing", "logits", "shorter")
    yield from _of_state(situation, shares)


def _loading(situation: Situation, topics: set[str]) -> Iterator[str]:
    first = situation.reading.first
    names = {f.name for f in first.place.frames} if first is not None else set()
    code = " ".join(f.code for f in first.place.frames) if first is not None else ""
    if "torch.load(" in code or names & {"_load_optimizer_and_scheduler", "load_checkpoint"}:
        yield "map_location"
    if situation.several.many and "other processes" in topics:
        yield "load_one_gpu"
    yield from ("load_half", "nf4")
    if situation.several.many:
        yield from ("zero3", "offload_param")


def _of_state(situation: Situation, several: bool) -> Iterator[str]:
    fsdp = situation.several.sharing == "fsdp" and situation.tool not in OWN_SHARING
    offload = ("fsdp_offload",) if fsdp else ("offload_optimizer", "offload_param")
    if situation.trains_all:
        if several:
            yield from ("zero3", offload[0], "adamw_8bit", "lora", offload[-1])
        else:
            yield from ("adamw_8bit", "lora", "nf4", "paged", "adafactor")
    else:
        yield from ("nf4", *(("zero3", offload[-1]) if several else ()), "paged")


def _is_on(situation: Situation, name: str) -> bool:
    """Whether ``name`` is on already, or would change nothing."""
    values, others, several = situation.values, situation.others, situation.several
    sharing = several.sharing
    batch = values.get("per_device_train_batch_size")
    optimizer = values.get("optimizer")
    zero = sharing in ("zero1", "zero2", "zero3")
    packed = others.get("packed_weights") or others.get("quantization_config")
    half = (
        packed
        or values.get("dtype") in ("bf16", "fp16")
        or values.get("quantization")
        or (zero and situation.mixed_precision)
    )
    first = situation.reading.first
    if first is not None and first.message.source in ("MPS", "NPU") and name in CUDA_ALONE:
        return True
    on: dict[str, object] = {
        "batch": batch == 1,
        "checkpointing": values.get("gradient_checkpointing"),
        "logits": others.get("liger") or situation.method in ("reward model", "gkd"),
        "attention": situation.attention in ("flash", "sdpa"),
        "half": half,
        "load_half": half,
        "nf4": packed
        or values.get("quantization") == "nf4"
        or sharing == "zero3"
        or (situation.trains_all and bool(situation.values) and "trainable" in values),
        "lora": not situation.trains_all,
        "adamw_8bit": optimizer not in (None, "adamw") or zero,
        "paged": optimizer not in (None, "adamw", "adamw_8bit") or bool(others.get("paged")) or several.shares,
        "adafactor": optimizer == "adafactor" or several.shares,
        "zero3": sharing in ("zero3", "fsdp") or others.get("packed_weights"),
        "offload_optimizer": others.get("offload_optimizer") or others.get("cpu_offload") or not several.shares,
        "offload_param": others.get("offload_param") or others.get("cpu_offload") or sharing not in ("zero3", "fsdp"),
        "fsdp_offload": others.get("cpu_offload"),
        "eval_batch": values.get("per_device_eval_batch_size") == 1,
        "eval_accumulation": others.get("eval_accumulation_steps"),
        "eval_loss_only": others.get("prediction_loss_only"),
        "vllm_share": not (others.get("vllm") or others.get("use_vllm")),
        "reference": not situation.trains_all or situation.method in ("orpo", "reward model", "gkd", "distillation"),
        "shorter": (values.get("max_seq_length") or 1 << 20) <= 128 or situation.method in ("grpo", "ppo"),
        "expandable": others.get("expandable"),
    }
    return bool(on.get(name))
