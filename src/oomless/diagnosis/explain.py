"""The diagnosis: what a text says, what asked for the memory, what held the rest, and what would cure it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oomless.config import TrainConfig
from oomless.diagnosis.attribution import SHOWN, Suspect, suspects, suspects_in_the_catalogue
from oomless.diagnosis.cures import Cures, find_cures
from oomless.diagnosis.findings import Finding, find, others_bytes
from oomless.diagnosis.logs import Occurrence, Reading, read
from oomless.diagnosis.plain_step import Outcome
from oomless.diagnosis.run import FailedRun, Source, assemble_run, choose_unknowns, rehearse_run
from oomless.diagnosis.settings import LogSettings
from oomless.diagnosis.snapshots import SnapshotReading, read_snapshot
from oomless.diagnosis.tensors import Dimensions, Tensor, matrices, of_activations, of_weights
from oomless.errors import ConfigError, DataError

TRAINER_EVAL_BATCH = 8
"""What the ``Trainer`` evaluates at once where it is not told."""


def _silent(_: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that was found."""

    reading: Reading
    snapshot: SnapshotReading | None
    run: FailedRun
    findings: tuple[Finding, ...]
    suspects: tuple[Suspect, ...]
    """What may have asked, the likeliest first; empty where the message names no size."""

    at_failure: Outcome | None
    """The run as it was, rehearsed within the GPU's limit; ``None`` where model or GPU are not known."""

    without_limit: Outcome | None
    cures: Cures | None
    missing: tuple[str, ...]
    """What would make the answer better if it were given."""

    @property
    def stops(self) -> bool:
        """Whether the rehearsal runs out of memory as the run did."""
        return self.at_failure is not None and self.at_failure.stopped_at is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        run, first = self.run, self.reading.first
        rehearsal = None
        if self.at_failure is not None and self.without_limit is not None:
            stopped = self.at_failure.stopped_at
            rehearsal = {
                "stops": self.stops,
                "needed_bytes": self.without_limit.needed_bytes,
                "fixed_bytes": self.without_limit.fixed_bytes,
                "held_bytes": dict(self.at_failure.held_bytes),
                "reserved_bytes": self.at_failure.reserved_bytes,
                "stopped_at": None
                if stopped is None
                else {
                    "phase": stopped.phase,
                    "module": stopped.module,
                    "operation": stopped.operation,
                    "bytes": stopped.size_bytes,
                },
            }
        return {
            "error": None if first is None else first.message.to_dict(),
            "place": None if first is None else first.place.to_dict(),
            "errors": [
                {"words": o.message.words, "count": o.count, "ranks": list(o.ranks)} for o in self.reading.occurrences
            ],
            "log": self.reading.settings.to_dict(),
            "snapshot": None if self.snapshot is None else self.snapshot.to_dict(),
            "run": {
                "tool": run.tool,
                "model": run.model,
                "gpu": None if run.target is None else run.target.name,
                "mixed_precision": run.mixed_precision,
                "settings": dict(run.values),
                "sources": dict(run.sources),
            },
            "findings": [finding.to_dict() for finding in self.findings],
            "asked": [suspect.to_dict() for suspect in self.suspects[:SHOWN]],
            "rehearsal": rehearsal,
            "cures": None if self.cures is None else self.cures.to_dict(),
            "missing": list(self.missing),
        }


def explain(
    text: str = "",
    given: Mapping[str, Any] | None = None,
    *,
    snapshot: Path | None = None,
    tool: str | None = None,
    mixed_precision: str | None = None,
    attention: str | None = None,
    progress: Callable[[str], None] = _silent,
) -> Diagnosis:
    """Return the diagnosis of an out-of-memory error.

    Args:
        text: a message, a log or a notebook's output; may be empty where model and GPU are given.
        given: settings under the names of ``TrainConfig``, which outrank those of the text.
        snapshot: a file of ``torch.cuda.memory._dump_snapshot``.
        tool: what ran: trainer, trl, peft, unsloth, axolotl, accelerate, torch or oomless.
        mixed_precision: fp16 or bf16: weights in fp32, arithmetic cast to this.
        attention: sdpa or eager.
        progress: is told what is rehearsed.

    Raises:
        UserError: there is nothing to explain, or a setting, the model, the GPU or the snapshot is not usable.
    """
    reading = read(text)
    recorded = None if snapshot is None else read_snapshot(snapshot)
    if recorded is not None and recorded.out_of_memory is not None and reading.first is None:
        occurrence = Occurrence(message=recorded.out_of_memory, place=recorded.place)
        reading = replace(reading, occurrences=(occurrence, *reading.occurrences))
    run = assemble_run(reading, given or {}, mixed_precision=mixed_precision, attention=attention, tool=tool)
    if reading.first is None and recorded is None and not run.known:
        raise DataError(
            "there is no out-of-memory error in this text, and model and GPU are not both named: paste the whole error, or give "
            "--model and --gpu"
        )
    return _diagnose(reading, recorded, run, progress)


OF_THE_RUN = ("data", "eval_data", "output_dir", "gpu", "max_steps", "max_tokens", "num_train_epochs")
"""Settings of a run that no cure changes."""


def explain_error(
    error: torch.OutOfMemoryError, config: TrainConfig, progress: Callable[[str], None] = _silent
) -> Diagnosis:
    """Return the diagnosis of an error that ended a run of oomless with ``config``.

    Raises:
        UserError: the run cannot be rehearsed.
    """
    text = "".join(traceback.format_exception(error))
    reading = read(text)
    plain = replace(reading, settings=LogSettings(tool="oomless"))
    given = {**{name: getattr(config, name) for name in config.to_dict()}, "resume": None}
    if config.optimizer_in_backward:
        given["max_grad_norm"] = None
    if config.per_device_eval_batch_size == config.per_device_train_batch_size:
        given["per_device_eval_batch_size"] = None
    kept = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name in OF_THE_RUN if (value := config.to_dict().get(name)) is not None}
    for name in own.keys() - {"gpu"}:
        kept.pop(name, None)
    run = assemble_run(plain, kept, mixed_precision=None, attention=None, tool="oomless")
    usual = TrainConfig.from_mapping({name: own[name] for name in ("data", "output_dir")} | {"model": config.model})
    defaults: dict[str, Source] = {n: "default" for n, value in run.values.items() if getattr(usual, n) == value}
    return _diagnose(plain, None, replace(run, own=own, sources={**run.sources, **defaults}), progress)


def _diagnose(
    reading: Reading, recorded: SnapshotReading | None, run: FailedRun, say: Callable[[str], None]
) -> Diagnosis:
    first = reading.first
    findings = find(reading, recorded, run.outside_bytes)
    on_gpu = first is None or first.message.kind in ("allocator", "driver", "library")
    if first is not None and first.place.phase == "evaluation":
        run = _with_evaluation(run)
    solved = _suspects(reading, run, None)
    at_failure = without_limit = None
    cures = None
    if on_gpu and run.known:
        say("the run as it was")
        run, at_failure = choose_unknowns(run, reading, [s for s in solved if s.solved])
        assert run.target is not None
        evaluates = first is not None and first.place.phase == "evaluation"
        without_limit = rehearse_run(run, run.target, limited=False, evaluates=evaluates)
        solved = _suspects(reading, run, at_failure)
        message = first.message if first is not None else None
        held_by_others = others_bytes(message, run.outside_bytes) if message is not None else 0
        cures = find_cures(
            run,
            without_limit,
            fragmented=any(finding.topic == "fragmentation" for finding in findings),
            others_bytes=held_by_others,
            say=say,
        )
    return Diagnosis(
        reading=reading,
        snapshot=recorded,
        run=run,
        findings=tuple(findings),
        suspects=tuple(solved),
        at_failure=at_failure,
        without_limit=without_limit,
        cures=cures,
        missing=_missing(run, on_gpu),
    )


def _with_evaluation(run: FailedRun) -> FailedRun:
    if "per_device_eval_batch_size" in run.values or run.tool == "oomless":
        return run
    values = {**run.values, "per_device_eval_batch_size": TRAINER_EVAL_BATCH}
    return replace(run, values=values, sources={**run.sources, "per_device_eval_batch_size": "assumed"})


def _suspects(reading: Reading, run: FailedRun, rehearsed: Outcome | None) -> list[Suspect]:
    first = reading.first
    if first is None or first.message.kind != "allocator":
        return []
    unsloth = run.tool == "unsloth"
    if run.spec is None:
        return suspects_in_the_catalogue(first.message, first.place, unsloth=unsloth)
    dimensions = Dimensions.of_config(run.spec.config)
    evaluates = first.place.phase == "evaluation"
    name = "per_device_eval_batch_size" if evaluates else "per_device_train_batch_size"
    blocks = int(run.values.get(name, 1))
    trained = run.trained_parameters if set(reading.settings.beside) & {"deepspeed", "fsdp"} else None
    tensors: list[Tensor] = [
        *of_weights(matrices(run.spec), trained),
        *of_activations(dimensions, blocks, run.item_bytes),
    ]
    return suspects(
        first.message,
        first.place,
        tensors,
        tokens=None if run.sources.get("max_seq_length") == "message" else run.values.get("max_seq_length"),
        positions=dimensions.positions,
        unsloth=unsloth,
        stopped_at=None if rehearsed is None else rehearsed.stopped_at,
    )


def _missing(run: FailedRun, on_gpu: bool) -> tuple[str, ...]:
    if not on_gpu:
        return ()
    missing = []
    if run.spec is None:
        missing.append("--model: without it nothing can be rehearsed")
    if run.target is None:
        missing.append("--gpu: without it nothing can be rehearsed")
    if run.known:
        for name in ("max_seq_length", "dtype", "per_device_train_batch_size"):
            if run.sources.get(name, "assumed") == "assumed" and name in (*run.values, "per_device_train_batch_size"):
                missing.append(f"--{name.replace('_', '-')}: it was assumed to be {run.values.get(name, 1)}")
        if run.tool is None:
            missing.append("--tool: trainer, trl, unsloth, axolotl ... for the same change there")
    return tuple(missing)


def read_text(source: str) -> str:
    """Return the text of a file, whatever its encoding.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(source).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the log {source} cannot be read: {error.strerror or error}") from error
