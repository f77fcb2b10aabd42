"""The teacher of a distillation."""

from __future__ import annotations

from oomless.diagnosis.situation import Situation
from oomless.errors import UserError
from oomless.models.spec import ModelSpec, resolve_for_plan


def teacher(situation: Situation, student: ModelSpec, notes: list[str]) -> ModelSpec:
    """Return the teacher that the text names, else the student's own model, and note which."""
    name, rehearsed = (
        situation.others.get("teacher_model"),
        "rehearsed: TRL's GKD on given answers, whole logits of both models, with ",
    )
    why = "the text does not name it"
    if name is not None:
        try:
            found = resolve_for_plan(name)
        except UserError:
            why = f"{name} is not known here"
        else:
            if _words(found) == _words(student):
                notes.append(f"{rehearsed}{name} as the teacher, in the student's precision")
                return found
            why = f"{name} has another vocabulary"
    notes.append(f"{rehearsed}a teacher like the student, an assumption: {why}")
    return student


def _words(spec: ModelSpec) -> int:
    return int(spec.config.get_text_config().vocab_size)
