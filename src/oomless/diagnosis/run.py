"""The run that failed, put together from what was given, what the log says and what has to be assumed.

Every setting keeps where it comes from. What nobody says (precision, length) is chosen from what people usually run; where
the message names sizes, the choice whose rehearsal stops nearest to them is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oomless import catalogue
from oomless.config import TrainConfig
from oomless.diagnosis.attribution import Suspect
from oomless.diagnosis.logs import Reading
from oomless.diagnosis.plain_step import Outcome, PlainRun, outcome, rehearse_plain
from oomless.errors import ConfigError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.make import ties
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.plan import Target, target_for
from oomless.planning.rehearse import UNLIMITED_BYTES, Rehearsal, rehearse, rehearse_briefly
from oomless.units import GiB, format_bytes

Source = Literal["given", "default", "log", "message", "assumed"]
USUAL_TOKENS = 2048
LARGEST_CONTEXT_BYTES = 2 * GiB
"""More outside of PyTorch's allocator than this is not one process's CUDA context and libraries."""

MIXED = "mixed"
"""fp32 weights, arithmetic cast to 16 bits."""

_SAME_GPU = 0.02
_SOLVED_LENGTHS = 8
LONGEST_USUAL_TOKENS = 32768
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
    outside_bytes: int | None = None
    """What the message leaves for everything outside of this process's allocator."""

    trained_parameters: int | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    """What else a run of oomless was told, its text and length say, which no cure changes."""

    @property
    def known(self) -> bool:
        """Whether the run can be rehearsed."""
        return self.spec is not None and self.target is not None

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
        return PlainRun(
            spec=self.spec,
            config=self.config(),
            mixed_precision=self.mixed_precision,
            attention=self.attention,
            foreach=self.foreach,
            evaluates=evaluates,
        )


def assemble_run(
    reading: Reading, given: Mapping[str, Any], *, mixed_precision: str | None, attention: str | None, tool: str | None
) -> FailedRun:
    """Return the run of which ``reading`` tells and for which ``given`` settings outrank what it says.

    Raises:
        UserError: a setting, the model or the GPU is not known or not allowed.
    """
    log, first = reading.settings, reading.first
    values: dict[str, Any] = {k: v for k, v in given.items() if k not in ("model", "gpu", "data", "output_dir")}
    sources: dict[str, Source] = dict.fromkeys(values, "given")
    for name, value in log.values.items():
        if name not in values and not (name == "lora_r" and "lora" not in str(values.get("trainable", "lora"))):
            values[name] = value
            sources[name] = "log"
    if "lora" not in str(values.get("trainable", "full")):
        for name in [n for n in ("lora_r", "quantization") if sources.get(n) == "log"]:
            del values[name], sources[name]
    model = given.get("model") or log.model
    spec = resolve_for_plan(model, trust_remote_code=bool(given.get("trust_remote_code"))) if model else None
    if spec is not None and model is not None:
        sources["model"] = "given" if given.get("model") else "log"
    target, outside = _target(reading, given.get("gpu"), sources)
    mixed = mixed_precision or log.mixed_precision
    if "dtype" in values:
        mixed = mixed_precision
        if values["dtype"] == "auto":
            del values["dtype"], sources["dtype"]
    eager = (attention or log.attention) == "eager"
    frames = " ".join(f"{f.path} {f.name} {f.code}" for f in first.place.frames) if first is not None else ""
    run = FailedRun(
        tool=tool or log.tool,
        model=model,
        spec=spec,
        target=target,
        values=values,
        sources=sources,
        mixed_precision=mixed,  # type: ignore[arg-type]
        attention="eager" if eager or "eager_attention_forward" in frames else "sdpa",
        foreach="_multi_tensor" in frames or "_foreach" in frames,
        outside_bytes=outside,
        trained_parameters=log.trainable_parameters,
    )
    return _consistent(run)


def _target(reading: Reading, named: str | None, sources: dict[str, Source]) -> tuple[Target | None, int | None]:
    """Return the GPU: as named, as the log says, or by the size in the message; and what lies outside the allocator."""
    message = reading.first.message if reading.first is not None else None
    capacity = message.capacity if message is not None and message.kind == "allocator" else None
    name = named or reading.settings.gpu
    if name is not None:
        sources["gpu"] = "given" if named else "log"
        target = target_for(name)
    elif capacity is not None:
        sources["gpu"] = "message"
        target = _target_of_size(capacity.middle)
    else:
        return None, None
    if message is None or capacity is None:
        return target, None
    # The size that the message prints is that of the very GPU; a name given on top must agree with it.
    if abs(target.capacity_bytes - capacity.middle) > 0.1 * capacity.middle:
        raise ConfigError(
            f"the message comes from a GPU of {capacity.text}, but {target.name} has "
            f"{format_bytes(target.capacity_bytes)}: leave out gpu, or name the one that it ran on"
        )
    outside = None
    reserved = message.reserved_bytes
    if message.free is not None and reserved is not None:
        outside = max(0, capacity.middle - message.free.middle - reserved.middle)
    if message.allowed is not None and message.allowed.middle < capacity.middle:
        outside = capacity.middle - message.allowed.middle
    total = target.capacity_bytes if target.capacity_bytes in capacity else capacity.low
    changes: dict[str, Any] = {"capacity_bytes": total}
    if outside is not None:
        changes["outside_bytes"] = min(outside, total - (1 << 20))
    return dataclasses.replace(target, **changes), outside


def _target_of_size(capacity_bytes: int) -> Target:
    """Return the catalogue's GPU of about this size, where one alone has it or all have one capability."""
    near = [g for g in catalogue.gpus() if abs(g.usable_bytes - capacity_bytes) <= _SAME_GPU * capacity_bytes]
    if near:
        nearest = min(near, key=lambda g: abs(g.usable_bytes - capacity_bytes))
        if (
            len({gpu.capability for gpu in near}) == 1
            or abs(nearest.usable_bytes - capacity_bytes) < 0.003 * capacity_bytes
        ):
            return target_for(nearest.name)
    size = target_for(f"{capacity_bytes}B")
    return dataclasses.replace(size, name=f"GPU of {format_bytes(capacity_bytes)}")


def _consistent(run: FailedRun) -> FailedRun:
    """Drop what a log says but the other settings rule out, and choose what a tied model needs."""
    values, sources = dict(run.values), dict(run.sources)
    if run.spec is not None:
        tied = ties(run.spec.config)
        parts = str(values.get("trainable", "full")).split("+")
        if tied and ("lm_head" in parts) != ("embed_tokens" in parts) and "tied_weights" not in values:
            values["tied_weights"], sources["tied_weights"] = "shared", "assumed"
        positions = getattr(run.spec.config.get_text_config(), "max_position_embeddings", None)
        if positions and sources.get("max_seq_length") == "log" and values["max_seq_length"] > positions:
            del values["max_seq_length"], sources["max_seq_length"]
    capability = run.target.compute_capability if run.target is not None else (8, 0)
    mixed = run.mixed_precision
    if capability < (8, 0) and values.get("dtype") == "bf16" and sources["dtype"] == "log":
        values["dtype"] = "fp16"  # the tool emulates bf16 there; the bytes are the same
    if capability < (8, 0) and mixed == "bf16":
        mixed = "fp16"
    return dataclasses.replace(run, values=values, sources=sources, mixed_precision=mixed)


def choose_unknowns(run: FailedRun, reading: Reading, solved: list[Suspect]) -> tuple[FailedRun, Outcome | None]:
    """Return the run with precision and length chosen, and its rehearsal within the GPU's limit.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """
    if not run.known:
        return run, None
    assert run.spec is not None
    assert run.target is not None
    message = reading.first.message if reading.first is not None else None
    evaluates = reading.first is not None and reading.first.place.phase == "evaluation"
    half = "bf16" if run.target.compute_capability >= (8, 0) else "fp16"
    dtypes: list[str | None] = [None]
    if "dtype" not in run.values and run.tool != "oomless":
        dtypes = ["fp32"] if run.mixed_precision else [half] if "quantization" in run.values else ["fp32", half, MIXED]
    lengths: list[int | None] = [None]
    if "max_seq_length" not in run.values:
        positions = getattr(run.spec.config.get_text_config(), "max_position_embeddings", None) or USUAL_TOKENS
        found = list(dict.fromkeys(s.tokens for s in solved[:_SOLVED_LENGTHS] if s.tokens))
        lengths = [n for n in found if n <= LONGEST_USUAL_TOKENS] or [*found] or [min(USUAL_TOKENS, positions)]
    best: tuple[float, FailedRun, Outcome] | None = None
    for dtype in dtypes:
        for length in lengths:
            choice = _with(run, dtype, length, from_message=bool(solved))
            rehearsal = rehearse_run(choice, run.target, limited=True, evaluates=evaluates)
            distance = _distance(rehearsal, message, reading)
            if best is None or distance < best[0]:
                best = (distance, choice, rehearsal)
            if message is None:
                break
        if message is None or message.requested is None:
            break  # nothing to compare with: the first choice is the usual one
    assert best is not None
    return best[1], best[2]


def rehearse_run(
    run: FailedRun,
    target: Target,
    *,
    limited: bool,
    evaluates: bool = False,
    settings: AllocatorSettings | None = None,
) -> Outcome:
    """Rehearse ``run`` as its tool runs it: oomless by its own step, any other by the plain one.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """
    if run.tool != "oomless":
        return rehearse_plain(run.plain(evaluates=evaluates), target, limited=limited, settings=settings)
    assert run.spec is not None
    return rehearse_own(run.spec, run.config(), target, limited=limited, settings=settings, names_modules=True)[0]


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
    if names_modules:
        found = rehearse(spec, config, open_device(), **how)
    else:
        found = rehearse_briefly(spec, config, open_device, **how)
    return outcome(found.device, found.out_of_memory), found


def _with(run: FailedRun, dtype: str | None, length: int | None, *, from_message: bool) -> FailedRun:
    values, sources = dict(run.values), dict(run.sources)
    mixed = run.mixed_precision
    if dtype == MIXED:
        assert run.target is not None
        mixed = "bf16" if run.target.compute_capability >= (8, 0) else "fp16"
        dtype = "fp32"
    if dtype is not None:
        values["dtype"], sources["dtype"] = dtype, "assumed"
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
