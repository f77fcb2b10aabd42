"""Which files a source of text means, and of what kind each is.

In folders and globs only files of known kinds are read, and what is passed over is counted. Links are followed, and a file
that is reached twice is read once. Of a folder that the library ``datasets`` saved, its rows are read and not the files
that describe them.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from oomless.config import DataSource
from oomless.errors import DataError, nearest

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "html", "ipynb", "pdf", "docx"]

_TEXT = (
    ".txt .text .md .markdown .rst .tex .adoc .org .xml .yaml .yml .toml .ini .cfg .log .srt .py .pyi .c .h .cc .cpp "
    ".cxx .hpp .hh .cu .cuh .rs .go .java .kt .kts .scala .js .mjs .jsx .ts .tsx .vue .css .scss .rb .php .pl .pm "
    ".lua .r .jl .swift .m .mm .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .sh .bash .zsh .fish .ps1 .bat "
    ".sql .proto .graphql .cmake .mk .dockerfile .tf .nix .zig .nim .v .sv .vhd .asm .s .f .f90 .pas .d .dart .groovy "
    ".gradle .sol .wat"
)
TEXT_SUFFIXES = frozenset(_TEXT.split())
"""Read as they are, each file one document."""

KINDS: dict[str, Kind] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".ipynb": "ipynb",
    ".pdf": "pdf",
    ".docx": "docx",
}
READ_BY: dict[Kind, str] = {"pdf": "pypdf", "docx": "docx"}
"""The modules of the extra ``documents`` that some kinds need."""
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """A file that can be read."""

    path: Path
    kind: Kind
    compression: str
    size_bytes: int


@dataclass(kw_only=True, slots=True)
class Found:
    """The files of a source, in sorted order."""

    files: list[TextFile] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files were not read, by suffix or by what they are."""


def find_files(source: DataSource) -> Found:
    """Return the files of ``source``.

    A file that is named itself is read whatever its suffix; in folders and globs only known kinds are.

    Raises:
        DataError: nothing is there, nothing of a known kind, no such split, or a pattern to exclude matches nothing.
    """
    path = Path(source.path).expanduser()
    search = _Search(source)
    if path.is_file():
        search.found.files.append(_text_file(path) or _as_file(path, "text"))
        return search.finished()
    if path.is_dir():
        search.folder(path, path)
    else:
        for name in glob.glob(str(path), recursive=True):
            match = Path(name)
            if match.is_dir():
                search.passed_over["folder"] += 1
            else:
                search.file(match, match)
    if not search.found.files and not search.passed_over:
        raise DataError(f"data names a file, a folder with files or a glob that matches some; {source.path!r} is none")
    if not search.found.files and "excluded" in search.passed_over:
        raise DataError(
            f"exclude ({source.exclude}) leaves no file of a known kind in {source.path}: correct or remove it"
        )
    if not search.found.files:
        raise DataError(
            f"{source.path} holds no file of a known kind (it has {', '.join(sorted(search.passed_over))}): oomless reads "
            ".txt, .md, source code, .jsonl, .json, .csv, .parquet, .arrow, .html, .ipynb, .pdf and .docx, each also .gz or .zst; other "
            "files can be named one by one"
        )
    return search.finished()


class _Search:
    """Goes through folders once each, and notes what it passes over."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.found = Found()
        self.passed_over = self.found.passed_over
        self.seen: set[tuple[int, int]] = set()
        self.patterns = [pattern.strip() for pattern in (source.exclude or "").split(",") if pattern.strip()]
        self.unused = set(self.patterns)
        self.split_found = False

    def folder(self, folder: Path, root: Path) -> None:
        """Take what is under ``folder``, which lies under ``root``."""
        if not self._first_time(folder):
            return
        if (folder / "dataset_dict.json").is_file():
            for part in self._splits(folder):
                self.folder(part, root)
        elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            for name in _saved_rows(folder):
                self.file(folder / name, root)
        else:
            for path in _entries(folder):
                if path.name.startswith("."):
                    self.passed_over["hidden"] += 1
                elif path.is_dir():
                    if not self._excluded(path, root):
                        self.folder(path, root)
                else:
                    self.file(path, root)

    def file(self, path: Path, root: Path) -> None:
        """Take the file ``path``, unless it was taken before, is excluded or of no known kind."""
        if not path.is_file():
            self.passed_over["broken link" if path.is_symlink() else "no regular file"] += 1
        elif not self._first_time(path):
            self.passed_over["linked twice"] += 1
        elif not self._excluded(path, root):
            file = _text_file(path)
            if file is None:
                self.passed_over[_suffixes(path)[0] or "no suffix"] += 1
            elif file.kind in READ_BY and find_spec(READ_BY[file.kind]) is None:
                self.passed_over[f".{file.kind} (needs the extra documents)"] += 1
            else:
                self.found.files.append(file)

    def finished(self) -> Found:
        """Return what was found, in order, if all that was asked had an effect."""
        if self.unused:
            raise DataError(
                f"exclude has no effect in {self.source.path}: nothing there matches {', '.join(sorted(self.unused))}; "
                "correct or remove it"
            )
        if self.source.split is not None and not self.split_found:
            raise DataError(
                f"split has no effect in {self.source.path}, which is no folder of splits that datasets saved: remove it"
            )
        self.found.files.sort(key=lambda file: file.path)
        return self.found

    def _first_time(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        place = (status.st_dev, status.st_ino)
        new = place not in self.seen
        self.seen.add(place)
        return new

    def _excluded(self, path: Path, root: Path) -> bool:
        relative = str(path.relative_to(root).as_posix()) if path != root else path.as_posix()
        matching = {pattern for pattern in self.patterns if fnmatch(relative, pattern) or fnmatch(path.name, pattern)}
        self.unused -= matching
        self.passed_over.update(["excluded"] if matching else [])
        return bool(matching)

    def _splits(self, folder: Path) -> Iterator[Path]:
        """Yield the folder of the split to read; the others are counted."""
        splits = [str(name) for name in _described(folder / "dataset_dict.json").get("splits", [])]
        wanted = self.source.split or (splits[0] if len(splits) == 1 else _DEFAULT_SPLIT)
        if wanted not in splits:
            raise DataError(
                f"{folder} has the splits {', '.join(splits)}, and no {wanted!r}.{nearest(wanted, splits)} Set split to one "
                "of them."
            )
        self.split_found = True
        self.passed_over.update(f"split {name!r}" for name in splits if name != wanted)
        yield folder / wanted


def _entries(folder: Path) -> list[Path]:
    """Return what lies in ``folder``; beside rows of ``datasets``, not what describes them."""
    try:
        entries = sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not any(path.suffix == ".arrow" for path in entries):
        return entries
    return [path for path in entries if path.name != "dataset_info.json" and not fnmatch(path.name, "cache-*.arrow")]


def _saved_rows(folder: Path) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in _described(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} does not name the files of a dataset: save it again") from error


def _described(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise DataError(f"{path} must be a JSON object; got {type(description).__name__}")
    return description


def _text_file(path: Path) -> TextFile | None:
    """Return ``path`` as a file to read, if its kind is known."""
    kind = KINDS.get(_suffixes(path)[0])
    return None if kind is None else _as_file(path, kind)


def _as_file(path: Path, kind: Kind) -> TextFile:
    return TextFile(path=path, kind=kind, compression=_suffixes(path)[1], size_bytes=path.stat().st_size)


def _suffixes(path: Path) -> tuple[str, str]:
    """Return what says the kind of ``path``, and what says how it is compressed; each is empty where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES else ""
    return (suffixes[-1] if suffixes else "", compression)
