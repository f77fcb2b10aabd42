"""From whatever people call a model to its shapes.

Most names that are in use are variants of a few shapes: another owner, a chat version, a packing in fewer bits, a date. So a
name is read as words; those that leave the shapes as they are fall away, and what remains is looked for among the known
models. What is not found there is looked for in the local cache of the Hugging Face Hub and then on the Hub, where one small
file tells it.
"""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from oomless import catalogue
from oomless.catalogue import Model
from oomless.errors import ModelError

REACH_S = 2.0
"""How long the Hub may take to answer the telephone before it counts as out of reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a name stands for: a known model, or a ``config.json``."""

    model: Model | None = None
    config: Path | None = None
    note: str | None = None
    """What was taken for what; ``None`` where the name is a known one."""


def find(name: str) -> Found:
    """Return what the ``name``, which is no file here, stands for.

    Raises:
        ModelError: nothing is known of it; with what was tried, and what to do.
    """
    known = _exact(name)
    if known is not None:
        return Found(model=known)
    cached = _cached_config(name)
    if cached is not None:
        return Found(config=cached, note=f"{name}: by its config.json in the local cache of the Hugging Face Hub")
    known = by_shape(name)
    if known is not None:
        return Found(
            model=known,
            note=f"{name}: taken as {known.name}, whose shapes it has by its name ({_catalogue_in_words()})",
        )
    fetched, why = _fetched_config(name)
    if fetched is not None:
        return Found(config=fetched, note=f"{name}: by its config.json on the Hugging Face Hub")
    raise ModelError(
        f"a model is a folder, a config.json or a name. {name!r} is neither of the first two here; as a name it is not in "
        f"{_catalogue_in_words()}, nor in the local cache of the Hugging Face Hub, and {why}.{suggestion(name)} To go on, give a folder, "
        "or the config.json alone: --model path/to/config.json"
    )


def _catalogue_in_words() -> str:
    return f"the catalogue of {catalogue.MADE}"


def _exact(name: str) -> Model | None:
    try:
        return catalogue.model(name)
    except ModelError:
        return None


def by_shape(name: str) -> Model | None:
    """Return the known model whose shapes ``name`` has by its words, or ``None``."""
    last = name.strip().rpartition("/")[2]
    packed = _last_parts().get(_without(last, catalogue.name_words("packings")))
    if packed is not None:
        return packed
    plain = _plain(_words(last))
    for match in (_same, _same_but_for_version, _ends_alike):
        found = [
            (len(known), _version(model.name), -len(model.name), model)
            for _, known, model in _known_words()
            if match(plain, known)
        ]
        if found:
            return max(found, key=lambda item: item[:3])[-1]
    return None


def packing(name: str) -> str | None:
    """Return the form of its weights that the words of ``name`` say, as BF16, or ``None`` where they say none."""
    words = [word for word in _words(name.strip().rpartition("/")[2]) if word in catalogue.name_words("packings")]
    return " ".join(word for word in words if word != "unsloth") or None


def suggestion(name: str) -> str:
    """Return ``" Did you mean ...?"`` with other known models of the same family and size, or an empty string.

    A name that the catalogue has is answered by what works with it alone.
    """
    if _exact(name) is not None:
        return " Its shapes are known here, so that `oomless plan` works; to train it its weights must be here."
    words = _plain(_words(name.strip().rpartition("/")[2]))
    alike = {model: spelling for spelling, known, model in reversed(_known_words()) if _alike(words, known)}
    if len({model.parameters for model in alike}) > 1 and not any(_SIZE.fullmatch(word) for word in words):
        return ""
    best = sorted(alike.values(), key=lambda spelling: (_version(spelling), -len(spelling)), reverse=True)[:3]
    return f" Did you mean {' or '.join(best)}?" if best else ""


# Words

_WORD = re.compile(r"v?\d+(?:\.\d+)*(?:x\d+(?:\.\d+)*)?[a-z]*\d*|[a-z]+")
_SIZE = re.compile(r"[ae]?(?:\d+x)?\d+(?:\.\d+)?[bmt]")
_VERSION = re.compile(r"v?\d+(?:\.\d+)*")
_DATE = re.compile(r"\d{4}|\d{6}|\d{8}")


def _words(name: str) -> list[str]:
    """Return the words of ``name`` in lower case: qwen2.5_7B-Instruct is qwen, 2.5, 7b and instruct."""
    folded = re.sub(r"(?<=[a-z])(?<!\dx)(?=\d)", " ", name.lower())
    folded = re.sub(r"\b([aevqwkmf]) (?=\d)", r"\1", folded)  # a3b, e4b, v0.1, q4, w4a16 are one word
    folded = re.sub(r"\b(int|fp|bf|nvfp|mxfp|exl) (?=\d)", r"\1", folded)
    folded = re.sub(r"(?<=\d)[- ](?=bit\b)", "", folded)
    return [
        word
        for part in re.split(r"[^a-z0-9.]+", folded)
        for word in ([part] if _is_word(part) else _WORD.findall(part))
    ]


def _is_word(part: str) -> bool:
    return part.isalpha() or part in catalogue.name_words("packings") or bool(re.fullmatch(r"[a-z]?\d[\da-z.]*", part))


def _plain(words: Sequence[str]) -> tuple[str, ...]:
    """Return ``words`` without those that leave the shapes as they are."""
    left_out = catalogue.name_words("packings") | catalogue.name_words("variants")
    return tuple(w for w in words if w not in left_out and not _DATE.fullmatch(w))


def _without(last: str, words: Iterable[str]) -> str:
    """Return the name ``last`` in lower case without ``words`` at its end."""
    parts = re.split(r"([-_. ])", last.lower())
    while len(parts) > 2 and parts[-1] in words:
        del parts[-2:]
    return "".join(parts)


def _same(name: Sequence[str], known: Sequence[str]) -> bool:
    return sorted(name) == sorted(known)


def _same_but_for_version(name: Sequence[str], known: Sequence[str]) -> bool:
    """Whether ``known`` is ``name`` with a version more, as Llama-3.1-8B is llama-8b."""
    more = list(known)
    for word in name:
        if word not in more:
            return False
        more.remove(word)
    has_size = any(_SIZE.fullmatch(word) for word in name)
    return has_size and all(_VERSION.fullmatch(word) for word in more)


def _ends_alike(name: Sequence[str], known: Sequence[str]) -> bool:
    """Whether ``name`` is ``known`` after a name of its maker's: Hermes-3-Llama-3.1-8B."""
    before = name[: len(name) - len(known)]
    return (
        len(known) > 1
        and tuple(name[-len(known) :]) == tuple(known)
        and not any(shape in word for shape in catalogue.name_words("reshaping") for word in before)
        and any(_SIZE.fullmatch(word) for word in known)
    )


def _alike(name: Sequence[str], known: Sequence[str]) -> bool:
    """Whether ``name`` may be a slip for ``known``: the same sizes and versions, as far as it says any, and the same words,
    almost. A word more on either side (VL, coder, safeguard) is another family within the family.
    """
    sizes, versions, words = _sorted_out(name)
    known_sizes, known_versions, known_words = _sorted_out(known)
    if sizes not in (set(), known_sizes) or versions not in (set(), known_versions):
        return False
    for word in words:
        meant = word if word in known_words else _slip_for(word, known_words)
        if meant is None:
            if _slip_for(word, catalogue.name_words("variants") | catalogue.name_words("packings")) is None:
                return False
        else:
            known_words.remove(meant)
    return bool(words) and not known_words


def _sorted_out(words: Sequence[str]) -> tuple[set[str], set[str], list[str]]:
    """Return the sizes, the versions (3, 3n, 0.3) and the words proper among ``words``."""
    numbers = [word for word in words if any(letter.isdigit() for letter in word)]
    sizes = {word for word in numbers if _SIZE.fullmatch(word)}
    return sizes, {word.lstrip("v") for word in numbers} - sizes, [word for word in words if word not in numbers]


def _slip_for(word: str, meant: Iterable[str]) -> str | None:
    """Return the one of ``meant`` that ``word``, which no known name has, is a slip of the keys away from."""
    if len(word) < 4 or word in _family_words():
        return None
    near = [other for other in meant if abs(len(other) - len(word)) <= 1]
    return next(iter(difflib.get_close_matches(word, near, n=1, cutoff=0.75)), None)


@cache
def _family_words() -> frozenset[str]:
    return frozenset(word for _, known, _ in _known_words() for word in known if word.isalpha())


def _version(name: str) -> tuple[float, ...]:
    """Return the version in ``name``, to sort by."""
    for word in _words(name.rpartition("/")[2]):
        if _VERSION.fullmatch(word) and not _DATE.fullmatch(word):
            return tuple(float(part) for part in word.lstrip("v").split("."))
    return (0.0,)


@cache
def _spellings() -> dict[str, Model]:
    models = [catalogue.model(name) for name in catalogue.models()]
    return {spelling: model for model in models for spelling in (model.name, *model.also)}


@cache
def _last_parts() -> dict[str, Model]:
    return {spelling.lower().rpartition("/")[2]: model for spelling, model in reversed(list(_spellings().items()))}


@cache
def _known_words() -> tuple[tuple[str, tuple[str, ...], Model], ...]:
    """Return each spelling of a known name with its words, and the model."""
    return tuple((s, _plain(_words(s.rpartition("/")[2])), model) for s, model in _spellings().items())


# The Hub


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not _is_hub_name(name):
        return None
    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _fetched_config(name: str) -> tuple[Path | None, str]:
    """Return the ``config.json`` of ``name`` from the Hub, which keeps it in its cache; or why there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if not _is_hub_name(name):
        return None, "the Hub was not asked, since its names have an owner: owner/name"
    if not hub_is_near():
        return None, "the Hub could not be reached"
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=REACH_S)), ""
    except GatedRepoError:
        return None, "the Hub gives it only to those who asked for access and are logged in"
    except RepositoryNotFoundError:
        return None, "the Hub has none of this name that is public"
    except EntryNotFoundError:
        return None, "the Hub has it without a config.json"
    except (HfHubHTTPError, OSError) as error:
        return None, f"the Hub did not answer ({type(error).__name__})"


def hub_is_near() -> bool:
    """Return whether the Hub answers at all, so that without a network nobody waits for it."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().get("https"):
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=REACH_S):
            return True
    except OSError:
        return False
