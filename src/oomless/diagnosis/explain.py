"""The diagnosis: what a text says, what asked for the memory, what held the rest, and what would cure it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oomless.config import TrainConfig
from oomless.diagnosis.attribution import SHOWN, Suspect, suspects
from oomless.diagnosis.clock import Clock
from oomless.diagnosis.cures import Cure, Cures, find_cures, own_settings
from oomless.diagnosis.findings import others_bytes
from oomless.diagnosis.first_answer import FirstAnswer, answer_of, first_answer, missing_of
from oomless.diagnosis.logs import read
from oomless.diagnosis.plain_step import Outcome
from oomless.diagnosis.run import FailedRun, assemble_run, choose_unknowns, rehearse_run
from oomless.diagnosis.settings import LogSettings
from oomless.diagnosis.shared_tensors import of_sharing, of_zero
from oomless.diagnosis.situation import Situation, Source, read_situation, why_not_rehearsed
from oomless.diagnosis.tensors import Dimensions, Tensor, matrices, of_activations, of_weights
from oomless.diagnosis.tool_tensors import of_answers
from oomless.errors import UserError

TRAINER_EVAL_BATCH = 8
"""What the ``Trainer`` evaluates at once where it is not told."""


def _silent(_: str) -> None:
    """Tell nobody."""


class Listener:
    """Is told what is found, as it is found."""

    def __init__(self, progress: Callable[[str], None] = _silent) -> None:
        """Pass on to ``progress`` what is rehearsed."""
        self.progress = progress

    def attributed(self, run: FailedRun, suspects: list[Suspect]) -> None:
        """Hear what asked, now that the run as it was has been rehearsed as far as it came."""

    def rehearsed(self, run: FailedRun, at_failure: Outcome, without_limit: Outcome) -> None:
        """Hear what held the memory, and what the run as it was needs."""

    def cured(self, cure: Cure) -> None:
        """Hear of a cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that was found."""

    first: FirstAnswer
    run: FailedRun | None
    """The run as it was rehearsed; ``None`` where it could not be."""

    suspects: tuple[Suspect, ...]
    """What may have asked, the likeliest first; empty where the message names no size."""

    at_failure: Outcome | None
    """The run as it was, rehearsed within the GPU's limit."""

    without_limit: Outcome | None
    cures: Cures | None
    missing: tuple[str, ...]
    """What would make the answer better if it were given."""

    not_rehearsed: str | None
    """Why nothing was rehearsed."""

    @property
    def stops(self) -> bool:
        """Whether the rehearsal runs out of memory as the run did."""
        return self.at_failure is not None and self.at_failure.stopped_at is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        situation, run = self.first.situation, self.run
        reading = situation.reading
        first = reading.first
        return {
            "error": None if first is None else first.message.to_dict(),
            "place": None if first is None else first.place.to_dict(),
            "errors": [
                {"words": o.message.words, "count": o.count, "ranks": list(o.ranks)} for o in reading.occurrences
            ],
            "log": reading.settings.to_dict(),
            "snapshot": None if self.first.snapshot is None else self.first.snapshot.to_dict(),
            "run": {
                "tool": situation.tool,
                "model": situation.model,
                "gpu": situation.gpu if run is None or run.target is None else run.target.name,
                "mixed_precision": situation.mixed_precision if run is None else run.mixed_precision,
                "settings": dict(situation.values if run is None else run.values),
                "sources": dict(situation.sources if run is None else run.sources),
            },
            "findings": [finding.to_dict() for finding in self.first.findings],
            "asked": [suspect.to_dict() for suspect in self.suspects[:SHOWN]],
            "to_try": [remedy.to_dict() for remedy in self.first.remedies],
            "rehearsal": self._rehearsal(),
            "not_rehearsed": self.not_rehearsed,
            "cures": None if self.cures is None else self.cures.to_dict(),
            "missing": list(self.missing),
            "notes": list(situation.notes),
        }

    def _rehearsal(self) -> dict[str, Any] | None:
        if self.at_failure is None or self.without_limit is None:
            return None
        stopped = self.at_failure.stopped_at
        return {
            "stops": self.stops,
            "needed_bytes": self.without_limit.needed_bytes,
            "fixed_bytes": self.without_limit.fixed_bytes,
            "held_bytes": dict(self.at_failure.held_bytes),
            "reserved_bytes": self.at_failure.reserved_bytes,
            "stopped_at": stopped
            and {
                "phase": stopped.phase,
                "module": stopped.module,
                "operation": stopped.operation,
                "bytes": stopped.size_bytes,
            },
        }


def explain(
    text: str = "",
    given: Mapping[str, Any] | None = None,
    *,
    snapshot: Path | None = None,
    tool: str | None = None,
    mixed_precision: str | None = None,
    attention: str | None = None,
    budget_s: float | None = None,
    listener: Listener | None = None,
) -> Diagnosis:
    """Return the diagnosis of an out-of-memory error.

    Args:
        text: a message, a log or a notebook's output; may be empty where model and GPU are given.
        given: settings under the names of ``TrainConfig``, which outrank those of the text.
        snapshot: a file of ``torch.cuda.memory._dump_snapshot``.
        tool: what ran; one of ``tools.TOOLS``.
        mixed_precision: fp16 or bf16: weights in fp32, arithmetic cast to this.
        attention: sdpa or eager.
        budget_s: how long rehearsals may take; by default as long as they take.
        listener: is told what is found, as it is found.

    Raises:
        UserError: the snapshot cannot be read.
    """
    how: dict[str, Any] = {"tool": tool, "mixed_precision": mixed_precision, "attention": attention}
    return rehearse_answer(first_answer(text, given, snapshot=snapshot, **how), budget_s, listener)


def rehearse_answer(
    first: FirstAnswer, budget_s: float | None = None, listener: Listener | None = None, run: FailedRun | None = None
) -> Diagnosis:
    """Return the whole diagnosis after its ``first`` answer: the run rehearsed, as it was and with cures.

    ``run`` is the run, where it is known better than ``first`` tells. What cannot be rehearsed is said and never an error.
    """
    heard, situation = listener or Listener(), first.situation
    clock = Clock(budget_s, heard.progress)
    why, notes, known = why_not_rehearsed(situation), list[str](), run is not None
    if why is None and not clock.has_time():
        why = "there is no time for it; --budget gives it seconds"
    found: dict[str, Any] = {"run": None, "at_failure": None, "without_limit": None, "cures": None}
    named = list(first.suspects)
    if why is None:
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what it says is said below
        try:
            run = run or assemble_run(situation, notes)
            with clock.timing("the run as it was"):
                run, at_failure = choose_unknowns(
                    _with_evaluation(run, situation), situation.reading, [s for s in named if s.solved], clock.has_time
                )
            assert run.target is not None
            named = _suspects(situation, run, at_failure) or named
            heard.attributed(run, named)
            asked = run.sources.get("per_device_eval_batch_size") == "given"
            evaluates = _evaluates(situation)
            with clock.timing("the run as it was, without a limit"):
                without_limit = rehearse_run(run, run.target, limited=False, evaluates=evaluates or asked)
            found |= {"run": run, "at_failure": at_failure, "without_limit": without_limit}
            heard.rehearsed(run, at_failure, without_limit)
            if at_failure.stopped_at is not None or situation.reading.first is None:
                message = situation.reading.first.message if situation.reading.first is not None else None
                found["cures"] = find_cures(
                    run,
                    without_limit,
                    evaluates=asked
                    or evaluates
                    and at_failure.stopped_at is not None
                    and at_failure.stopped_at.phase == "evaluation",
                    fragmented=any(finding.topic == "fragmentation" for finding in first.findings)
                    and not situation.others.get("expandable"),
                    others_bytes=others_bytes(message) if message is not None else 0,
                    clock=clock,
                    heard=heard.cured,
                )
        except UserError as error:
            why = str(error)
        except Exception as error:  # a model's own code may fail in any way; the reading stands without a rehearsal
            why = f"the rehearsal failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    first = replace(first, situation=replace(situation, notes=(*situation.notes, *notes)))
    run = found["run"]
    missing = () if known else missing_of(situation, None if run is None else (run.values, run.sources))
    return Diagnosis(first=first, suspects=tuple(named), not_rehearsed=why, missing=missing, **found)


OF_THE_RUN = ("data", "eval_data", "output_dir", "gpu", "max_steps", "max_tokens", "num_train_epochs")
"""Settings of a run that no cure changes."""


def explain_error(
    error: torch.OutOfMemoryError, config: TrainConfig, progress: Callable[[str], None] = _silent
) -> Diagnosis:
    """Return the diagnosis of an error that ended a run of oomless with ``config``.

    Raises:
        UserError: the run cannot be rehearsed.
    """
    reading = replace(read("".join(traceback.format_exception(error))), settings=LogSettings(tool="oomless"))
    given = {**{name: getattr(config, name) for name in config.to_dict()}, "resume": None}
    if config.optimizer_in_backward:
        given["max_grad_norm"] = None
    if config.per_device_eval_batch_size == config.per_device_train_batch_size:
        given["per_device_eval_batch_size"] = None
    kept = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name in OF_THE_RUN if (value := config.to_dict().get(name)) is not None}
    for name in own.keys() - {"gpu"}:
        kept.pop(name, None)
    situation = read_situation(reading, kept, tool="oomless")
    asked = own_settings(config)
    defaults: dict[str, Source] = {name: "default" for name in situation.values if name not in asked}
    situation = replace(situation, sources={**situation.sources, **defaults})
    answer = answer_of(situation)
    if why_not_rehearsed(situation) is not None:
        return rehearse_answer(answer)
    run = replace(assemble_run(situation, []), own=own)
    return rehearse_answer(answer, None, Listener(progress), run)


def _evaluates(situation: Situation) -> bool:
    first = situation.reading.first
    return first is not None and first.place.phase == "evaluation"


def _with_evaluation(run: FailedRun, situation: Situation) -> FailedRun:
    if not _evaluates(situation) or "per_device_eval_batch_size" in run.values or run.tool == "oomless":
        return run
    values = {**run.values, "per_device_eval_batch_size": TRAINER_EVAL_BATCH}
    return replace(run, values=values, sources={**run.sources, "per_device_eval_batch_size": "assumed"})


def _of_zero(run: FailedRun, situation: Situation) -> Iterator[Tensor]:
    assert run.zero is not None
    assert run.spec is not None
    trained = situation.parameters if situation.trains_all else situation.reading.settings.trainable_parameters
    yield from of_zero(run.zero.stage, run.zero.gpus, trained, run.zero.bucket, matrices(run.spec))


def _suspects(situation: Situation, run: FailedRun, rehearsed: Outcome) -> list[Suspect]:
    first = situation.reading.first
    assert run.spec is not None
    dimensions = Dimensions.of_config(run.spec.config)
    if first is None or first.message.kind != "allocator" or dimensions is None:
        return []
    evaluates = first.place.phase == "evaluation"
    name = "per_device_eval_batch_size" if evaluates else "per_device_train_batch_size"
    blocks = int(run.values.get(name, 1)) * run.sequences_each
    tensors: list[Tensor] = [
        *of_weights(
            matrices(run.spec),
            trained=situation.values.get("trainable") != "lora",
            cast=run.mixed_precision is not None,
            packed=bool(run.values.get("quantization")),
            halves=run.values.get("dtype") in ("bf16", "fp16"),
        ),
        *of_activations(dimensions, blocks, run.item_bytes),
        *(of_sharing(run.spec, run.sharing) if run.sharing in ("ddp", "fsdp") else ()),
        *(_of_zero(run, situation) if run.zero else ()),
    ]
    if run.answers:
        tensors += of_answers(dimensions, blocks, run.answers, run.item_bytes)
    if run.scores:
        tensors = [tensor for tensor in tensors if tensor.of != "lm_head"]
    return suspects(
        first.message,
        first.place,
        tensors,
        tokens=None if run.sources.get("max_seq_length") == "message" else run.values.get("max_seq_length"),
        positions=dimensions.positions,
        unsloth=run.tool == "unsloth",
        stopped_at=rehearsed.stopped_at,
    )
