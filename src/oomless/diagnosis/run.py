"""The run that failed, put together from what was given, what the log says and what has to be assumed.

Every setting keeps where it comes from. What nobody says (precision, length) is chosen from what people usually run; where
the message names sizes, the choice whose rehearsal stops nearest to them is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oomless import catalogue
from oomless.config import TrainConfig
from oomless.diagnosis.attribution import Suspect, roundness
from oomless.diagnosis.findings import outside_bytes
from oomless.diagnosis.logs import Reading
from oomless.diagnosis.plain_step import Outcome, PlainRun, outcome, rehearse_plain
from oomless.diagnosis.shared_tensors import ZERO_BUCKET
from oomless.diagnosis.situation import PAIRS, SAME_GPU, Situation, Source
from oomless.diagnosis.teacher import teacher
from oomless.diagnosis.zero import Zero
from oomless.errors import ConfigError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.make import ties
from oomless.models.spec import ModelSpec, most_positions, resolve_for_plan
from oomless.planning.layout import with_new_tokens
from oomless.planning.plan import Target, target_for
from oomless.planning.rehearse import UNLIMITED_BYTES, Rehearsal, rehearse, rehearse_briefly
from oomless.training.rates import width_of
from oomless.units import KiB, format_bytes

USUAL_TOKENS = 2048
MIXED = "mixed"
"""fp32 weights, arithmetic cast to 16 bits."""

OWN_LOOPS = ("torch", "accelerate", "peft", "torchtune", "litgpt", "nemo", "verl")
"""Tools whose optimizer is not made by transformers' Trainer."""

OWN_ADAPTERS = ("torchtune", "litgpt", "nemo")
"""Tools whose LoRA is not peft's: adapters are in the model's dtype."""

TRL_SHARE = 0.3
"""What vLLM takes of the GPU in TRL where it is not told."""

WITH_REFERENCE = ("dpo", "kto")
"""Methods that compare with the model as it was before: a frozen copy, or the base of the adapters."""

BETA_OF_GKD = 0.5
"""What weighs teacher against student in TRL's GKD where it is not told."""

_SOLVED_LENGTHS = 8
LONGEST_USUAL_TOKENS = 8192
"""Longer blocks are believed only where a size has no other explanation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRun:
    """What is known of the run that failed."""

    tool: str | None
    model: str | None
    spec: ModelSpec | None
    target: Target | None
    values: Mapping[str, Any]
    """Settings under the names of ``TrainConfig``, those of the model aside."""

    sources: Mapping[str, Source]
    mixed_precision: Literal["fp16", "bf16"] | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    foreach: bool = False
    fused_loss: bool = False
    """Whether the loss never holds all logits."""

    sequences_each: int = 1
    """Sequences that the model sees for each of a batch."""

    reference: bool = False
    """Whether a frozen copy of the weights is held beside."""

    teacher: ModelSpec | None = None
    """The model from which it learns."""

    beta: float = BETA_OF_GKD
    """What weighs teacher against student."""

    method: str | None = None
    """dpo, grpo, reward model ...; ``None`` for plain training."""

    answers: int = 0
    """Tokens of an answer that the model generates itself; 0 where it generates none."""

    generates: int = 0
    """Sequences that it generates at once."""

    gpus: int = 1
    """How many train together, as far as it is told."""

    sharing: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] | None = None
    """How they share the model: each holds all, or a part."""

    offloads: bool = False
    """Whether the optimizer's state lies in the host's memory."""

    bucket: int | None = None
    """DeepSpeed's ``reduce_bucket_size``, where the text says it."""

    outside_bytes: int | None = None
    """What the message leaves for everything outside of this process's allocator."""

    own: Mapping[str, Any] = field(default_factory=dict)
    """What else a run of oomless was told, its text and length say, which no cure changes."""

    @property
    def scores(self) -> bool:
        """Whether the model has a head of one number in place of the vocabulary's."""
        return self.method == "reward model"

    @property
    def zero(self) -> Zero | None:
        """How DeepSpeed shares the run out; ``None`` where it does not."""
        if self.sharing is None or not self.sharing.startswith("zero"):
            return None
        assert self.spec is not None
        stage = int(self.sharing[-1])
        bucket = self.bucket or (width_of(self.spec.config) ** 2 if stage == 3 else ZERO_BUCKET)
        return Zero(stage=stage, gpus=self.gpus, bucket=bucket, offloads=self.offloads)

    @property
    def known(self) -> bool:
        """Whether the run can be rehearsed."""
        return self.spec is not None and self.target is not None

    @property
    def half(self) -> Literal["fp16", "bf16"]:
        """The 16 bits that the GPU computes in; bf16 where it is not known."""
        return "bf16" if self.target is None or self.target.compute_capability >= (8, 0) else "fp16"

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in activations."""
        return 4 if self.values.get("dtype") == "fp32" and self.mixed_precision is None else 2

    def config(self, **changes: Any) -> TrainConfig:
        """Return the settings as a config of oomless, with ``changes``; ``None`` takes one away."""
        values: dict[str, Any] = {"data": "YOUR_TEXT", "output_dir": "runs/first", "model": self.model or "-"}
        values |= dict(self.own) | dict(self.values) | changes
        return TrainConfig.from_mapping({key: value for key, value in values.items() if value is not None})

    def plain(self, *, evaluates: bool = False) -> PlainRun:
        """Return the run as its tool runs it."""
        assert self.spec is not None
        trains_all = self.values.get("trainable", "full") == "full"  # adapters leave the reference where it was
        return PlainRun(
            spec=self.spec,
            config=self.config(),
            mixed_precision=self.mixed_precision,
            attention=self.attention,
            foreach=self.foreach,
            evaluates=evaluates,
            fused_loss=("trl" if self.tool == "trl" else "liger") if self.fused_loss else None,
            sequences_each=self.sequences_each,
            reference=self.reference and trains_all,
            base_is_reference=self.method in WITH_REFERENCE and not (self.reference and trains_all),
            mismatched=self.method == "kto",
            teacher=self.teacher,
            beta=self.beta,
            scores=self.scores,
            answers=self.answers,
            generates=self.generates,
            by_a_trainer=self.tool not in OWN_LOOPS,
            gpus=self.gpus if self.sharing in ("fsdp", "zero3") else 1,
            zero=self.zero,
            buckets=self.sharing == "ddp",
            adapters_in_fp32=self.tool not in OWN_ADAPTERS and self.zero is None,
        )


def assemble_run(situation: Situation, notes: list[str]) -> FailedRun:
    """Return the run of ``situation``, ready to be rehearsed; what cannot be used of it is left out, and said in ``notes``.

    Raises:
        UserError: the model or the GPU is of no use.
    """
    assert situation.model is not None
    first = situation.reading.first
    spec = resolve_for_plan(situation.model, trust_remote_code=bool(situation.values.get("trust_remote_code")))
    notes += spec.notes
    target, outside = _target(situation)
    frames = " ".join(f"{f.path} {f.name} {f.code}" for f in first.place.frames) if first is not None else ""
    eager = situation.attention == "eager" or (situation.attention is None and "eager_attention_forward" in frames)
    answers = situation.others.get("max_completion_length", 0) if situation.method == "grpo" else 0
    if answers:
        notes.append(_of_grpo(situation))
    own_generation = answers and not situation.others.get("vllm")
    at_once = situation.values.get("per_device_train_batch_size", 1) * situation.values.get(
        "gradient_accumulation_steps", 1
    )
    run = FailedRun(
        tool=situation.tool,
        model=situation.model,
        spec=spec,
        target=target,
        values=dict(situation.values),
        sources=dict(situation.sources),
        mixed_precision=situation.mixed_precision,  # type: ignore[arg-type]
        attention="eager" if eager else "sdpa",
        foreach="_multi_tensor" in frames or "_foreach" in frames,
        fused_loss=_fused_loss(situation, frames, notes),
        sequences_each=2 if situation.method in PAIRS else 1,
        reference=situation.trains_all
        and (situation.method in WITH_REFERENCE or (situation.method == "grpo" and bool(situation.others.get("beta")))),
        teacher=teacher(situation, spec, notes) if situation.method == "gkd" else None,
        beta=situation.others.get("beta", BETA_OF_GKD),
        method=situation.method,
        answers=answers,
        generates=at_once if own_generation else 0,
        gpus=situation.several.gpus or 1,
        sharing=_sharing(situation, notes),
        offloads=bool(situation.others.get("offload_optimizer")),
        bucket=situation.others.get("reduce_bucket_size"),
        outside_bytes=outside,
    )
    return _usable(_consistent(run), notes)


def _of_grpo(situation: Situation) -> str:
    """Say what is rehearsed of GRPO."""
    beside = "vLLM's share beside it" if _share_of_vllm(situation) else "the GPU for itself"
    how = "as vLLM makes them" if situation.others.get("vllm") else "keys and values of all of them at once"
    reference = "with a reference model" if situation.others.get("beta") else "without a reference model (beta 0)"
    return f"rehearsed: GRPO's answers, {how}, and its update {reference}, with {beside}; of older TRL, where the text shows no other"


def _share_of_vllm(situation: Situation) -> float:
    """Return which part of the GPU vLLM holds while the model trains: none where it sleeps or has a GPU of its own."""
    others = situation.others
    if situation.method != "grpo" or not others.get("vllm") or others.get("vllm_sleeps") or others.get("vllm_server"):
        return 0.0
    return float(others.get("gpu_memory_utilization") or TRL_SHARE)


def _fused_loss(situation: Situation, frames: str, notes: list[str]) -> bool:
    """Return whether the loss of a run of another tool never holds all logits; where the tool does so by itself, note it."""
    if situation.tool == "unsloth" and "cross_entropy_loss.py" not in frames:
        notes.append("rehearsed with a loss in chunks, as unsloth has since 2024.11")
        return True
    return bool(situation.others.get("liger")) and situation.tool != "oomless"


def _sharing(situation: Situation, notes: list[str]) -> Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] | None:
    """Return how several GPUs share the model of a run of another tool, and note how that is rehearsed."""
    several = situation.several
    if situation.tool == "oomless" or not several.many:
        return None
    if several.sharing == "fsdp":
        notes.append(f"rehearsed as the first of {several.gpus} GPUs, cut by FSDP2 as accelerate cuts a model")
        return "fsdp"
    if several.sharing == "ddp":
        notes.append("rehearsed as one of the GPUs, with the buckets in which DDP sums gradients")
        return "ddp"
    if several.sharing in ("zero1", "zero2", "zero3"):
        size = situation.others.get("reduce_bucket_size")
        bucket = (
            f"{size:,} numbers" if size else "the size that is usual (width^2 in stage 3, else 500,000,000 numbers)"
        )
        notes.append(
            f"rehearsed as one of {several.gpus} GPUs, with what DeepSpeed's source holds in {several.sharing.replace('zero', 'ZeRO-')}: "
            f"its part in fp32, buckets of {bucket}"
        )
        return several.sharing
    return None


def _usable(run: FailedRun, notes: list[str]) -> FailedRun:
    """Return ``run`` without the settings that do not go together, those of the text first, each of which is noted."""
    values, sources = dict(run.values), dict(run.sources)
    if run.spec is not None:
        positions = most_positions(run.spec.config)
        if positions and values.get("max_seq_length", 0) > positions:
            notes.append(
                f"rehearsed with {positions:,} tokens, the most that the model takes, instead of {values['max_seq_length']:,}"
            )
            values["max_seq_length"] = positions
    while True:
        current = dataclasses.replace(run, values=values, sources=sources)
        try:
            current.config()
        except ConfigError as error:
            about = [name for name in error.settings if name in values] or list(values)[-1:]
            if not about:
                raise
            about.sort(key=lambda name: sources.get(name) == "given")
            notes.append(f"{about[0].replace('_', ' ')} {values[about[0]]} is left out: {error}")
            del values[about[0]]
        else:
            return current


def _target(situation: Situation) -> tuple[Target, int | None]:
    """Return the GPU: by its name, else by the size in the message; and what lies outside the allocator."""
    first, capacity_bytes = situation.reading.first, situation.capacity_bytes
    message = first.message if first is not None else None
    capacity = message.capacity if message is not None and message.kind == "allocator" else None
    if situation.gpu is not None:
        target = target_for(situation.gpu)
    else:
        assert capacity_bytes is not None
        target = _target_of_size(capacity_bytes)
    share = int(_share_of_vllm(situation) * target.capacity_bytes)
    target = dataclasses.replace(target, outside_bytes=target.outside_bytes + share)
    if message is None or capacity is None:
        return target, None
    outside = outside_bytes(message)
    total = target.capacity_bytes if target.capacity_bytes in capacity else capacity.low
    changes: dict[str, Any] = {"capacity_bytes": total}
    if outside is not None:
        changes["outside_bytes"] = min(max(outside, share), total - (1 << 20))
    return dataclasses.replace(target, **changes), outside


def _target_of_size(capacity_bytes: int) -> Target:
    """Return the catalogue's GPU of about this size, where one alone has it or all have one capability."""
    near = [g for g in catalogue.gpus() if abs(g.usable_bytes - capacity_bytes) <= SAME_GPU * capacity_bytes]
    if near:
        nearest = min(near, key=lambda g: abs(g.usable_bytes - capacity_bytes))
        if (
            len({gpu.capability for gpu in near}) == 1
            or abs(nearest.usable_bytes - capacity_bytes) < 0.003 * capacity_bytes
        ):
            return dataclasses.replace(target_for(nearest.name), name=f"GPU of {format_bytes(capacity_bytes)}")
    size = target_for(f"{capacity_bytes // KiB}KiB")
    return dataclasses.replace(size, name=f"GPU of {format_bytes(capacity_bytes)}")


def _consistent(run: FailedRun) -> FailedRun:
    """Choose what a tied model needs, and what the GPU can compute in."""
    values, sources = dict(run.values), dict(run.sources)
    if run.spec is not None:
        tied = ties(run.spec.config)
        parts = str(values.get("trainable", "full")).split("+")
        if tied and ("lm_head" in parts) != ("embed_tokens" in parts) and "tied_weights" not in values:
            values["tied_weights"], sources["tied_weights"] = "shared", "assumed"
    capability = run.target.compute_capability if run.target is not None else (8, 0)
    mixed = run.mixed_precision
    if run.zero is not None and values.get("dtype") in (None, "fp32"):  # DeepSpeed casts the model itself
        values["dtype"], sources["dtype"] = mixed or run.half, "tool" if mixed else "assumed"
        mixed = None
    if capability < (8, 0) and values.get("dtype") == "bf16" and sources["dtype"] in ("log", "tool"):
        values["dtype"] = "fp16"  # the tool emulates bf16 there; the bytes are the same
    if capability < (8, 0) and mixed == "bf16":
        mixed = "fp16"
    return dataclasses.replace(run, values=values, sources=sources, mixed_precision=mixed)


def choose_unknowns(
    run: FailedRun, reading: Reading, solved: list[Suspect], has_time: Callable[[], bool]
) -> tuple[FailedRun, Outcome]:
    """Return the run with precision and length chosen, and its rehearsal within the GPU's limit.

    Choices are compared as long as ``has_time`` says that there is time for another.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """
    assert run.spec is not None
    assert run.target is not None
    message = reading.first.message if reading.first is not None else None
    evaluates = reading.first is not None and reading.first.place.phase == "evaluation"
    dtypes: list[str | None] = [None]
    if "dtype" not in run.values and run.tool != "oomless":
        dtypes = [run.half] if "quantization" in run.values else ["fp32", run.half, MIXED]
        dtypes = ["fp32"] if run.mixed_precision else dtypes
    lengths: list[int | None] = [None]
    found: list[int] = []
    if "max_seq_length" not in run.values:
        positions = most_positions(run.spec.config) or USUAL_TOKENS
        found = list(dict.fromkeys(s.tokens for s in solved[:_SOLVED_LENGTHS] if s.tokens and roundness(s.tokens) >= 1))
        lengths = [n for n in found if n <= LONGEST_USUAL_TOKENS] or [min(USUAL_TOKENS, positions)]
    # Recent TRL checkpoints where it is not told, older TRL does not.
    checkpointing = (True, False) if run.tool == "trl" and "gradient_checkpointing" not in run.values else (None,)
    best: tuple[float, FailedRun, Outcome] | None = None
    for dtype, length, recomputes in itertools.product(dtypes, lengths, checkpointing):
        if best is not None and (message is None or message.requested is None or not has_time()):
            break  # with nothing to compare the first choice, which is the usual one, stands
        choice = _with(run, dtype, length, recomputes, from_message=length in found)
        rehearsal = rehearse_run(choice, run.target, limited=True, evaluates=evaluates, names_modules=True)
        distance = _distance(rehearsal, message, reading)
        if best is None or distance < best[0]:
            best = (distance, choice, rehearsal)
    assert best is not None
    return best[1], best[2]


def rehearse_run(
    run: FailedRun,
    target: Target,
    *,
    limited: bool,
    evaluates: bool = False,
    settings: AllocatorSettings | None = None,
    names_modules: bool = False,
) -> Outcome:
    """Rehearse ``run`` as its tool runs it: oomless by its own step, any other by the plain one.

    It takes more time where the outcome ``names_modules`` inside of layers.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """
    if run.tool != "oomless":
        plain = run.plain(evaluates=evaluates)
        return rehearse_plain(plain, target, limited=limited, settings=settings, names_modules=names_modules)
    assert run.spec is not None
    how: dict[str, Any] = {"limited": limited, "settings": settings, "names_modules": names_modules}
    return rehearse_own(run.spec, run.config(), target, **how)[0]


def rehearse_own(
    spec: ModelSpec,
    config: TrainConfig,
    target: Target,
    *,
    limited: bool,
    settings: AllocatorSettings | None = None,
    names_modules: bool = False,
) -> tuple[Outcome, Rehearsal]:
    """Rehearse a run of oomless on ``target``, or without an end of memory where not ``limited``.

    It takes more time where the outcome ``names_modules`` inside of layers.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """

    def open_device() -> VirtualGPU:
        return target.simulated(target.capacity_bytes if limited else UNLIMITED_BYTES, settings=settings)

    how: dict[str, Any] = {"kernel": target.kernel, "workspace_bytes": target.workspace_bytes}
    with with_new_tokens(spec, config.to_dict()) as (grown, said):
        extended = TrainConfig.from_mapping(said)
        if names_modules:
            found = rehearse(grown, extended, open_device(), **how)
        else:
            found = rehearse_briefly(grown, extended, open_device, **how)
    return outcome(found.device, found.out_of_memory), found


def _with(
    run: FailedRun, dtype: str | None, length: int | None, recomputes: bool | None, *, from_message: bool
) -> FailedRun:
    values, sources = dict(run.values), dict(run.sources)
    mixed = run.mixed_precision
    if dtype == MIXED:
        mixed = run.half
        dtype = "fp32"
    if dtype is not None:
        values["dtype"], sources["dtype"] = dtype, "assumed"
    if recomputes is not None:
        values["gradient_checkpointing"], sources["gradient_checkpointing"] = recomputes, "assumed"
    if length is not None:
        values["max_seq_length"], sources["max_seq_length"] = length, "message" if from_message else "assumed"
    return dataclasses.replace(run, values=values, sources=sources, mixed_precision=mixed)


def _distance(rehearsal: Outcome, message: Any, reading: Reading) -> float:
    """Return how far the moment at which a rehearsal stops is from what the message says; 0 is the same."""
    if message is None:
        return 0.0
    distance = 0.0
    if rehearsal.stopped_at is None:
        distance += 1.0
    elif reading.first is not None and reading.first.place.phase not in (None, rehearsal.stopped_at.phase):
        distance += 0.5
    if message.allocated is not None:
        distance += abs(rehearsal.allocated_bytes - message.allocated.middle) / max(1, message.allocated.middle)
    if message.requested is not None and rehearsal.stopped_at is not None:
        size = rehearsal.stopped_at.size_bytes
        distance += 1.0 * (not message.requested.low - (2 << 20) <= size <= message.requested.high)
    return distance


def oomless_values(run: FailedRun) -> dict[str, Any]:
    """Return the settings under which oomless does the same run: what it casts to becomes the dtype of its weights."""
    values = dict(run.values)
    if run.mixed_precision is not None:
        values["dtype"] = run.mixed_precision
    return values
