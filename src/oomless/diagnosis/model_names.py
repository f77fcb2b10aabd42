"""The model of a text: where a setting or a call names it, else the known model whose name stands in its words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from oomless import catalogue
from oomless.catalogue import Model
from oomless.diagnosis.hardware_names import squeeze
from oomless.errors import ModelError
from oomless.models.names import by_shape

_NAMED = re.compile(
    r"(?<!\w)(?:model_name_or_path|base_model|pretrained_model_name_or_path|model_id_or_path|model_name|model_id|model_path|base_model_name|"
    r"model\.path|actor_rollout_ref\.model\.path|checkpoint_dir|hf_model_id|model|student_model)['\"]?(?:\s*[:=]\s*|\s+)['\"]?"
    r"([\w./~\\-]*[A-Za-z][\w./-]*\d[\w./-]*)"
    r"|from_pretrained\(\s*['\"]([^'\"\n]+)['\"]"
)
_COMMENT = re.compile(r"^[ \t]*#.*[=(\"'].*$|(?<=\S)[ \t]+#(?!\w*\d+\b\s*$).*$", re.MULTILINE)
TEACHER = re.compile(
    r"(?<!\w)teacher(?:_model)?(?:_name|_id)?(?:_or_path)?['\"]?\s*(?:[:=]|\s)\s*['\"]?([\w~][\w./~-]*/[\w./-]*\w)"
    r"|teacher\w*\s*=\s*[\w.]*from_pretrained\(\s*['\"]([^'\"\n]+)['\"]"
)
"""The model from which another learns."""

_NOT_A_MODEL = re.compile(r"\.(?:py|json|ya?ml|sh|log|txt|jsonl|csv|bin)$|^v?\d[\d.]*$|tokenizer", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model as a text names it."""

    text: str
    known: str | None
    """The known model whose shapes it has."""


def named_model(text: str) -> NamedModel | None:
    """Return the model that ``text`` names; code that is commented out names none."""
    plain = TEACHER.sub("", _COMMENT.sub("", text))
    unknown = None
    for match in _NAMED.finditer(plain):
        name = (match[1] or match[2]).rstrip("./\\")
        last = re.split(r"[/\\]", name)[-1].replace("___", ".")
        if not last or _NOT_A_MODEL.search(last):
            continue
        known = _known(last)
        if known is not None:
            return NamedModel(text=name, known=known.name)
        if re.search(r"\d+(?:\.\d+)?[bm]\b", last, re.IGNORECASE) and unknown is None:
            unknown = name
    inside = _in_words(plain)
    if inside is not None and unknown is None:
        return NamedModel(text=_published(plain, inside), known=inside)
    return NamedModel(text=unknown, known=None) if unknown is not None else None


_PUBLISHED = re.compile(r"(?<![\w/.-])[A-Za-z][\w.-]*/([A-Za-z][\w.-]*\w)(?![/\w])")


def _published(text: str, known: str) -> str:
    """Return the name with its owner under which ``text`` has the ``known`` model, or its own."""
    for match in list(_PUBLISHED.finditer(text))[:40]:
        found = _known(match[1])
        if found is not None and found.name == known:
            return match[0]
    return known


@cache
def _known(name: str) -> Model | None:
    try:
        return catalogue.model(name)
    except ModelError:
        return by_shape(name)


def _in_words(text: str) -> str | None:
    squeezed = squeeze(text)
    best: tuple[int, int, str] | None = None
    for spelling, name in _spellings():
        place = squeezed.find(f" {spelling} ")
        if place >= 0:
            found = (len(spelling), -place, name)
            best = found if best is None or found[:2] > best[:2] else best
    if best is not None:
        return best[2]
    return _variant(text)


_CANDIDATE = re.compile(
    r"(?<![\w/.-])(?:[\w.-]+/)*([A-Za-z][A-Za-z.]*[-_ ]?\d*(?:\.\d+)?(?:[-_][\w.]+)*?[-_ ]\d+(?:\.\d+)?[bB](?:[-_][\w.]+)*)"
)


_RECIPE = re.compile(r"\b((?:llama|qwen|gemma|mistral|phi)\d*(?:_\d)?)/(\d+(?:\.\d+)?B)", re.IGNORECASE)
"""As torchtune names its recipes: llama3_1/8B_full."""


def _variant(text: str) -> str | None:
    """Return the known model that the first name of a model's form in ``text`` is a variant of."""
    recipe = _RECIPE.search(text)
    if recipe is not None:
        known = _known(f"{recipe[1].replace('_', '.')}-{recipe[2]}")
        if known is not None:
            return known.name
    for match in list(_CANDIDATE.finditer(text))[:40]:
        if not _NOT_A_MODEL.search(match[1]):
            known = _known(match[1])
            if known is not None:
                return known.name
    return None


@cache
def _spellings() -> tuple[tuple[str, str], ...]:
    spellings = []
    for name in catalogue.models():
        entry = catalogue.model(name)
        for published in (entry.name, *entry.also):
            spellings.append((squeeze(published.rpartition("/")[2]).strip(), entry.name))
    return tuple(s for s in spellings if len(s[0]) > 3)
