"""The first answer, which needs no rehearsal and no torch: what a text says, what follows from its numbers, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomless import config
from oomless.config import plain
from oomless.diagnosis.attribution import Suspect, suspects, suspects_in_the_catalogue
from oomless.diagnosis.findings import Finding, find
from oomless.diagnosis.logs import Occurrence, read
from oomless.diagnosis.remedies import Remedy, advise
from oomless.diagnosis.shared_tensors import ZERO_BUCKET, of_zero
from oomless.diagnosis.situation import PAIRS, Situation, read_situation
from oomless.diagnosis.tensors import Tensor, of_activations, of_weights
from oomless.diagnosis.tool_tensors import of_answers, of_torchtune
from oomless.errors import ConfigError, UserError

if TYPE_CHECKING:
    from oomless.diagnosis.snapshots import SnapshotReading


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstAnswer:
    """What can be said at once."""

    situation: Situation
    snapshot: SnapshotReading | None
    findings: tuple[Finding, ...]
    suspects: tuple[Suspect, ...]
    remedies: tuple[Remedy, ...]
    missing: tuple[str, ...]
    """What would make the answer better if it were given."""


def first_answer(
    text: str = "",
    given: Mapping[str, Any] | None = None,
    *,
    snapshot: Path | None = None,
    tool: str | None = None,
    mixed_precision: str | None = None,
    attention: str | None = None,
    notes: tuple[str, ...] = (),
) -> FirstAnswer:
    """Return what ``text`` and the ``given`` settings say by themselves.

    Args:
        text: a message, a log or a notebook's output; may be empty.
        given: settings under the names of ``TrainConfig``, which outrank those of the text.
        snapshot: a file of ``torch.cuda.memory._dump_snapshot``.
        tool: what ran; one of ``tools.TOOLS``, or a word that is taken for one.
        mixed_precision: fp16 or bf16: weights in fp32, arithmetic cast to this.
        attention: sdpa or eager.
        notes: what is known to be of no use in what was given.

    Raises:
        UserError: the snapshot cannot be read, and there is no text.
    """
    reading, recorded = read(text), None
    if snapshot is not None:
        from oomless.diagnosis.snapshots import read_snapshot

        try:
            recorded = read_snapshot(snapshot)
        except UserError as error:
            if not text:
                raise
            notes = (*notes, f"the snapshot is left out: {error}")
    if recorded is not None and recorded.out_of_memory is not None and reading.first is None:
        occurrence = Occurrence(message=recorded.out_of_memory, place=recorded.place)
        reading = replace(reading, occurrences=(occurrence, *reading.occurrences))
    situation = read_situation(reading, given or {}, tool=tool, mixed_precision=mixed_precision, attention=attention)
    return answer_of(replace(situation, notes=(*notes, *situation.notes)), recorded)


def usable(settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return those of ``settings`` that can be read; the others are said in ``notes``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            found |= plain(config.read({name: value}))
        except ConfigError as error:
            notes.append(f"{name} {value} is left out: {error}")
    return found


def answer_of(situation: Situation, recorded: SnapshotReading | None = None) -> FirstAnswer:
    """Return what ``situation`` says by itself."""
    found, named = find(situation, recorded), _suspects(situation)
    return FirstAnswer(
        situation=situation,
        snapshot=recorded,
        findings=tuple(found),
        suspects=tuple(named),
        remedies=tuple(advise(situation, found, named)),
        missing=missing_of(situation),
    )


def item_bytes(situation: Situation) -> int:
    """Return the bytes of a number in activations."""
    return 4 if situation.values.get("dtype") == "fp32" and situation.mixed_precision is None else 2


def may_cast(situation: Situation) -> bool:
    """Return whether arithmetic may be cast to 16 bits: it is said to be, or nothing is said of precision."""
    return situation.mixed_precision is not None or "dtype" not in situation.values


def blocks_at_once(situation: Situation) -> int:
    """Return how many sequences go through the model together, where the error arose."""
    first = situation.reading.first
    evaluates = first is not None and first.place.phase == "evaluation"
    name = "per_device_eval_batch_size" if evaluates else "per_device_train_batch_size"
    pairs = 2 if situation.method in PAIRS else 1
    return int(situation.values.get(name, 1)) * pairs


def _suspects(situation: Situation) -> list[Suspect]:
    first = situation.reading.first
    if first is None or first.message.kind != "allocator":
        return []
    unsloth, dimensions = situation.tool == "unsloth", situation.dimensions
    batch, length = situation.values.get("per_device_train_batch_size"), situation.values.get("max_seq_length")
    if dimensions is None:
        named = situation.model is not None or situation.reading.settings.named is not None
        tokens = batch * length if batch and length else None
        return [] if named else suspects_in_the_catalogue(first.message, first.place, unsloth=unsloth, tokens=tokens)
    dimensions = dimensions.cut(situation.several.parts or 1)
    tensors: list[Tensor] = [
        *of_weights(
            dimensions.matrices(),
            trained=situation.values.get("trainable") != "lora",
            cast=may_cast(situation),
            packed=bool(situation.values.get("quantization")),
            halves=situation.values.get("dtype") in ("bf16", "fp16"),
        ),
        *of_activations(dimensions, blocks_at_once(situation), item_bytes(situation)),
        *(of_torchtune(dimensions, blocks_at_once(situation)) if situation.tool == "torchtune" else ()),
    ]
    sharing = situation.several.sharing or ""
    if sharing.startswith("zero"):
        stage, several = int(sharing[-1]), situation.several
        bucket = situation.others.get("reduce_bucket_size") or (dimensions.hidden**2 if stage == 3 else ZERO_BUCKET)
        trained = situation.parameters if situation.trains_all else situation.reading.settings.trainable_parameters
        gpus = None if several.at_least else several.gpus
        tensors += of_zero(stage, gpus, trained, bucket, dimensions.matrices())
    answer = situation.others.get("max_completion_length")
    if situation.method in ("grpo", "ppo") and answer:
        tensors += of_answers(dimensions, blocks_at_once(situation), answer, item_bytes(situation))
    if situation.method == "reward model":
        tensors = [tensor for tensor in tensors if tensor.of != "lm_head"]
    how: dict[str, Any] = {"unsloth": unsloth}
    found = suspects(first.message, first.place, tensors, tokens=length, positions=dimensions.positions, **how)
    # Prompts and answers are as long as the longest of the batch, not as they may be.
    if not found and answer and length:
        found = suspects(first.message, first.place, tensors, tokens=None, positions=length, **how)
    return found


def missing_of(
    situation: Situation, rehearsed: tuple[Mapping[str, Any], Mapping[str, str]] | None = None
) -> tuple[str, ...]:
    """Return what would make the answer better; ``rehearsed`` are the settings of a rehearsal and their sources."""
    first = situation.reading.first
    missing = []
    if first is not None and (
        first.message.kind in ("host", "killed", "kernel", "engine", "placement") or first.place.in_managed_memory
    ):
        return ()
    if first is not None and not first.message.sizes() and first.message.kind == "allocator":
        missing.append("the whole message, with its numbers, and the traceback above it")
    elif first is not None and first.place.phase is None:
        missing.append("the traceback above the message: it says the phase and the place")
    if situation.model is None:
        missing.append("--model: which model it is")
    if situation.gpu is None and situation.capacity_bytes is None:
        missing.append("--gpu: which GPU it is")
    values, sources = rehearsed or (situation.values, situation.sources)
    defaults = {field.name: field.default for field in fields(config.TrainConfig)}
    of_a_step = first is None or not (first.place.phase in ("load", "save") or first.place.generating)
    for name in ("max_seq_length", "dtype", "per_device_train_batch_size") if of_a_step else ("dtype",):
        if sources.get(name, "assumed") == "assumed":
            assumed = (
                f": it was assumed to be {values.get(name) or defaults[name] or 1}" if rehearsed is not None else ""
            )
            missing.append(f"--{name.replace('_', '-')}{assumed}")
    if situation.tool is None:
        missing.append("--tool: what ran (trainer, trl, unsloth, llamafactory ...), for changes in its words")
    return tuple(missing)
