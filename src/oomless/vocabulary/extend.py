"""A run, or a plan of one, whose model has more tokens than the one that was given.

Tokens are learnt from the text that trains (``extend_tokenizer``), or somebody added them to the tokenizer and the embedding has no rows
for them. The model that they make is a folder like any other, in that of the run, and from there on the run is one of that model, of
which nothing else has to know: LoRA's base, what is exported, what a run is compared with.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from oomless.config import TrainConfig, adapter
from oomless.data.prepare import TrainingText
from oomless.errors import ConfigError, ModelError
from oomless.kept import Kept, key_of, user_folder
from oomless.models import extension
from oomless.models.extension import Extension
from oomless.models.spec import ModelSpec, resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.vocabulary import grown
from oomless.vocabulary.cut import Cut
from oomless.vocabulary.learn import Learnt, Word, learn

NEW = "new"
"""What ``trainable_rows`` may be: the rows of the new tokens."""

FOLDER = "extended"
"""Where in the folder of a run the model with them lies."""

Progress = Callable[[int, int], None] | None
_CHANGED = ("model", "tokenizer", "trainable_rows", "extend_tokenizer")
_MOST_KEPT = 256


def for_run(config: TrainConfig, run: Path, progress: Progress = None) -> TrainConfig:
    """Return the run of ``config``, in the folder ``run``, as one of the model with the new tokens, which is made there.

    Raises:
        UserError: the tokenizer or the text gives none.
        ModelError: the folder cannot be written.
    """
    settings = {name: getattr(config, name) for name in _CHANGED}
    place = run.resolve() / FOLDER
    noted = extension.read(place)
    if Path(config.model).expanduser().resolve() == place:  # the run by its own config.yaml
        noted = None
    elif any(run.glob("checkpoint-*")):  # which hold what was trained of the model there
        if noted is not None or config.extend_tokenizer is not None:
            _check_same(run, noted, settings)
    else:
        noted = _made(place, noted, config, settings, progress)
    if noted is None:
        return replace(config, **_of_new_rows(settings))
    changed: dict[str, Any] = {"model": str(place), "tokenizer": None, "extend_tokenizer": None}
    return replace(config, **changed, **_of_new_rows(settings, noted))


def _made(
    place: Path, before: Extension | None, config: TrainConfig, settings: Mapping[str, Any], progress: Progress
) -> Extension | None:
    """Return what is noted in the folder ``place``, made if it is not what is ``before``; ``None`` where there are no new tokens."""
    if config.extend_tokenizer is None and adapter.folder_of(config.model) is not None:
        return None
    spec = resolve(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = _tokenizer(config)
    if config.extend_tokenizer is not None:
        found: _Found | None = _find(spec, config, tokenizer, progress)
    else:
        found = _added(spec, tokenizer)
    if found is None:
        return None
    made = before is not None and before.key == found.key
    return before if made else _make(place, spec, settings, tokenizer, found)


def for_plan(
    spec: ModelSpec, given: Mapping[str, Any], text: TrainConfig | None, folder: Path
) -> tuple[ModelSpec, dict[str, Any]]:
    """Return ``spec`` and the settings ``given`` as those of the model with the new tokens; its tokenizer is written to ``folder``.

    Tokens are learnt from ``text``, a run of the same text; where that is ``None`` their number is taken as given.

    Raises:
        UserError: the tokenizer or the text gives none.
    """
    changed: dict[str, Any] = {"extend_tokenizer": None}
    if given.get("extend_tokenizer") is None:
        found = _added_here(spec, given)
    elif text is None:
        found = _taken_as_given(spec, given)
    else:
        tokenizer = _tokenizer(text)
        found = _find(spec, text, tokenizer, None)
        _write_tokenizer(tokenizer, found, folder)
        changed["tokenizer"] = str(folder)
    if found is None:
        return spec, {**given, **_of_new_rows(given)}
    noted = _noted(spec, given, found)
    noted.write(folder)
    grown_spec = replace(spec, config=grown.config_with(spec, noted.rows), notes=(*spec.notes, *noted.notes()))
    settings = {**given, **changed, **_of_new_rows(given, noted)}
    return grown_spec, {name: value for name, value in settings.items() if value is not None}


def as_given(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings``, which ``for_plan`` has changed, with what was ``given`` in place of that."""
    kept = {name: value for name, value in settings.items() if name not in _CHANGED}
    return kept | {name: given[name] for name in _CHANGED if given.get(name) is not None}


def _check_same(run: Path, noted: Extension | None, settings: Mapping[str, Any]) -> None:
    wanted = {name: settings[name] for name in ("model", "tokenizer", "extend_tokenizer")}
    began = (
        None if noted is None else {"model": noted.model, "tokenizer": noted.tokenizer, "extend_tokenizer": noted.asked}
    )
    for name in wanted:
        if began is None or began[name] != wanted[name]:
            before = "without new tokens" if began is None else f"with {name} {began[name]}"
            raise ConfigError(
                f"the run in {run} began {before}, now {name} is {wanted[name]}: set it back to go on with --resume, or start anew in "
                "another output_dir",
                name,
            )


def _of_new_rows(settings: Mapping[str, Any], noted: Extension | None = None) -> dict[str, Any]:
    """Return ``trainable_rows`` where it is ``new``, with the rows that those are."""
    if settings.get("trainable_rows") != NEW:
        return {}
    place = Path(settings["model"]).expanduser()
    noted = noted or extension.read(place if place.is_dir() else place.parent)
    if noted is None:
        raise ConfigError(
            f"trainable_rows: new is the rows of new tokens, and {settings['model']} has none: set extend_tokenizer, or name rows",
            "trainable_rows",
        )
    return {"trainable_rows": noted.new_rows}


def _tokenizer(config: TrainConfig) -> Any:
    if adapter.folder_of(config.model) is not None:
        raise ConfigError(
            f"extend_tokenizer is for a model, and {config.model} is an adapter: merge it first (oomless export), or leave it out",
            "extend_tokenizer",
        )
    return load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """New tokens, and where they were learnt from a text, what that was."""

    first: int
    count: int
    pieces: tuple[Word, ...] = ()
    tokenizer: str = ""
    """The tokenizer.json with the new tokens, where it has to be made."""

    key: str = ""
    existing: int = 0
    words: int = 0
    text_bytes: int = 0
    tokens_before: int = 0
    tokens_after: int = 0


def _find(spec: ModelSpec, config: TrainConfig, tokenizer: Any, progress: Progress) -> _Found:
    """Return the tokens that the text of ``config`` gives, which are kept between runs.

    Raises:
        ConfigError: there are none.
    """
    cut = Cut(tokenizer)
    text = TrainingText(config, tokenizer, progress)
    key = key_of("extend_tokenizer", cut.said, text.contents, config.extend_tokenizer)
    kept = Kept(user_folder() / "vocabularies", _MOST_KEPT)
    found = kept.get(key)
    if found is None:
        found = _learn(cut, text, config.extend_tokenizer or 0)
        kept.put(key, found)
        kept.clear_oldest()
    learnt = Learnt(
        texts=found["texts"],
        parts=[None if parts is None else (parts[0], parts[1]) for parts in found["parts"]],
        pieces=[tuple(pieces) for pieces in found["pieces"]],
        existing=found["existing"],
    )
    if not learnt.texts:
        raise ConfigError(
            "extend_tokenizer finds nothing to add: no two pieces stand together twice in the words of data; name more text, or leave it out",
            "extend_tokenizer",
        )
    return _Found(
        first=cut.first,
        count=len(learnt.texts),
        pieces=tuple(learnt.pieces),
        tokenizer=cut.extended(learnt),
        key=key_of(key, str(spec.folder), grown.stamp(spec)),
        existing=learnt.existing,
        **found["measured"],
    )


def _learn(cut: Cut, text: TrainingText, count: int) -> dict[str, Any]:
    words: Counter[Word] = Counter()
    measured = dict.fromkeys(("words", "text_bytes", "tokens_before", "tokens_after"), 0)
    for texts in text:
        measured["tokens_before"] += cut.count(texts, words)
        measured["words"] += sum(len(one.split()) for one in texts)
        measured["text_bytes"] += sum(len(one.encode()) for one in texts)
    learnt = learn(words, cut.alphabet, count)
    after = Tokenizer.from_str(cut.extended(learnt))
    after.no_truncation()
    for texts in text:
        encoded = after.encode_batch_fast(texts, add_special_tokens=False)
        measured["tokens_after"] += sum(len(one.ids) for one in encoded)
    return {**asdict(learnt), "measured": measured}


def tokens_without_rows(tokenizer: Any, rows: int) -> dict[int, str]:
    """Return the tokens that were added to ``tokenizer`` and have none of the ``rows`` of an embedding, by their ids.

    None where the tokenizer is another model's: other tokens have no row either, or the ids lie far apart.
    """
    added = {number: text for text, number in tokenizer.get_added_vocab().items() if number >= rows}
    if not added or max(added) - rows >= len(added) + grown.MULTIPLE:
        return {}
    return added if all(number < rows or number in added for number in tokenizer.get_vocab().values()) else {}


def _added(spec: ModelSpec, tokenizer: Any) -> _Found | None:
    """Return the tokens that somebody added to ``tokenizer`` and for which the model has no rows."""
    rows = int(spec.config.get_text_config().vocab_size)
    added = tokens_without_rows(tokenizer, rows)
    if not added:
        return None
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["added_tokens"] = [one for one in said["added_tokens"] if one["id"] < rows]
    without = Tokenizer.from_str(json.dumps(said))
    without.no_truncation()
    without.no_padding()
    pieces = [
        tuple(number for number in without.encode(added.get(place, ""), add_special_tokens=False).ids if number < rows)
        for place in range(rows, max(added) + 1)
    ]
    key = key_of("added tokens", sorted(added.items()), str(spec.folder), grown.stamp(spec))
    return _Found(first=rows, count=len(pieces), pieces=tuple(pieces), key=key)


def _added_here(spec: ModelSpec, given: Mapping[str, Any]) -> _Found | None:
    """Return the same for a plan, where the tokenizer is here."""
    name = str(given.get("tokenizer") or given["model"])
    if spec.adapter is not None or not Path(name).expanduser().is_dir():
        return None
    try:
        return _added(spec, load_tokenizer(name, trust_remote_code=bool(given.get("trust_remote_code"))))
    except ModelError:  # a config alone can be planned; training says what is wrong with a tokenizer
        return None


def _taken_as_given(spec: ModelSpec, given: Mapping[str, Any]) -> _Found:
    return _Found(first=int(spec.config.get_text_config().vocab_size), count=given["extend_tokenizer"])


def _noted(spec: ModelSpec, settings: Mapping[str, Any], found: _Found) -> Extension:
    rows = grown.rows_for(spec, found.first + found.count - 1)
    facts = {
        name: getattr(found, name) for name in ("existing", "words", "text_bytes", "tokens_before", "tokens_after")
    }
    return Extension(
        model=str(settings["model"]),
        tokenizer=settings.get("tokenizer"),
        asked=settings.get("extend_tokenizer"),
        key=found.key,
        first=found.first,
        added=found.count,
        rows=rows,
        rows_bytes=grown.more_bytes(spec, rows),
        **facts,
    )


def _make(place: Path, spec: ModelSpec, settings: Mapping[str, Any], tokenizer: Any, found: _Found) -> Extension:
    """Make the folder ``place``, whole or not at all."""
    noted = _noted(spec, settings, found)
    beside = place.with_name(f".{place.name}.tmp")
    try:
        for path in (beside, place):
            shutil.rmtree(path, ignore_errors=True)
        beside.mkdir(parents=True)
        grown.write(spec, noted.rows, found.first, found.pieces, beside)
        _write_tokenizer(tokenizer, found, beside)
        noted.write(beside)
        beside.rename(place)
    except OSError as error:
        raise ModelError(
            f"the model with the new tokens cannot be written to {place}: {error.strerror or error}"
        ) from error
    return noted


def _write_tokenizer(tokenizer: Any, found: _Found, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a bare one, of a disk that is full
        raise OSError(str(error)) from error
    if found.tokenizer:
        (folder / "tokenizer.json").write_text(found.tokenizer, encoding="utf-8")
