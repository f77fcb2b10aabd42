"""Text files to documents, one piece at a time.

A document is an iterator of pieces of text, so that a file of any size passes through in bounded memory. No character is
dropped, added or changed: line ends stay as they are, and a byte order mark is a character like any other. A text file
is one document; a record of a ``.jsonl`` or ``.parquet`` file is one document.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from oomless.config import DataSource
from oomless.errors import DataError, nearest

TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".tex",
        ".adoc",
        ".org",
        ".html",
        ".htm",
        ".xml",
        ".csv",
        ".tsv",
        ".json",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".log",
        ".srt",
        ".py",
        ".pyi",
        ".ipynb",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".hh",
        ".cu",
        ".cuh",
        ".rs",
        ".go",
        ".java",
        ".kt",
        ".kts",
        ".scala",
        ".js",
        ".mjs",
        ".jsx",
        ".ts",
        ".tsx",
        ".vue",
        ".css",
        ".scss",
        ".rb",
        ".php",
        ".pl",
        ".pm",
        ".lua",
        ".r",
        ".jl",
        ".swift",
        ".m",
        ".mm",
        ".cs",
        ".fs",
        ".hs",
        ".ml",
        ".mli",
        ".ex",
        ".exs",
        ".erl",
        ".clj",
        ".lisp",
        ".el",
        ".scm",
        ".sh",
        ".bash",
        ".zsh",
        ".fish",
        ".ps1",
        ".bat",
        ".sql",
        ".proto",
        ".graphql",
        ".cmake",
        ".mk",
        ".dockerfile",
        ".tf",
        ".nix",
        ".zig",
        ".nim",
        ".v",
        ".sv",
        ".vhd",
        ".asm",
        ".s",
        ".f",
        ".f90",
        ".pas",
        ".d",
        ".dart",
        ".groovy",
        ".gradle",
        ".sol",
        ".wat",
    ]
)
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
PIECE_CHARACTERS = 1 << 18

Pieces = Iterator[str]
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """A file that can be read: its kind is its suffix without the compression's."""

    path: Path
    suffix: str
    compression: str
    size_bytes: int


def find_files(source: DataSource) -> tuple[list[TextFile], Counter[str]]:
    """Return the files of ``source`` in sorted order, and how many were passed over, by suffix.

    A file that is named itself is read whatever its suffix; in folders and globs only known kinds are.

    Raises:
        DataError: nothing is there, or nothing of a known kind.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return [_text_file(path)], Counter()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    else:
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not paths:
        raise DataError(f"data names a file, a folder with files or a glob that matches some; {source.path!r} is none")
    files = [_text_file(p) for p in paths]
    known = [file for file in files if file.suffix in TEXT_SUFFIXES | RECORD_SUFFIXES]
    skipped = Counter(file.suffix or "no suffix" for file in files) - Counter(file.suffix for file in known)
    if not known:
        raise DataError(
            f"{source.path} holds no file of a known kind (it has {', '.join(sorted(skipped))}): oomless reads .txt, .md, "
            "source code, .jsonl and .parquet, each also .gz or .zst; other files can be named one by one"
        )
    return known, skipped


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text_file(path: Path) -> TextFile:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES else ""
    return TextFile(path=path, suffix=suffixes[-1] if suffixes else "", compression=compression, size_bytes=size_bytes)


def read_documents(file: TextFile, source: DataSource, encoding_errors: str, progress: Progress) -> Iterator[Pieces]:
    """Yield each document of ``file`` as an iterator of pieces; the one before must be used up first.

    ``progress`` is told how many of the file's bytes, as they lie on disk, have been read.

    Raises:
        DataError: the file cannot be read, decoded or decompressed, or a record lacks its text.
    """
    with _errors_named(file), file.path.open("rb") as raw:
        if file.suffix == ".parquet":
            yield from _parquet_documents(file, raw, source, progress)
        elif file.suffix in (".jsonl", ".ndjson"):
            yield from _json_documents(file, raw, source, encoding_errors, progress)
        else:
            yield _text_pieces(file, raw, encoding_errors, progress)


@contextmanager
def _errors_named(file: TextFile) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read to its end: {error}") from error


def _decompressed(file: TextFile, raw: IO[bytes]) -> IO[bytes]:
    if file.compression == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if file.compression == ".zst":  # Arrow's reader, unlike zstandard's, notices that a file is truncated
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), PIECE_CHARACTERS)
    return raw


def _text_pieces(file: TextFile, raw: IO[bytes], encoding_errors: str, progress: Progress) -> Pieces:
    decoder = codecs.getincrementaldecoder("utf-8")(encoding_errors)
    stream = _decompressed(file, raw)
    offset = 0
    chunk = b"-"
    while chunk:
        with _errors_named(file):
            chunk = stream.read(PIECE_CHARACTERS)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset - pending + error.start, error) from error
        if text:
            yield text
        offset += len(chunk)
        progress(raw.tell())


def _not_utf8(file: TextFile, offset: int, error: UnicodeDecodeError, where: str = "") -> DataError:
    return DataError(
        f"{file.path} is not UTF-8 at byte {offset}{where} ({error.reason}): convert it, or set encoding_errors: replace to "
        "have U+FFFD put there"
    )


def _json_documents(
    file: TextFile, raw: IO[bytes], source: DataSource, encoding_errors: str, progress: Progress
) -> Iterator[Pieces]:
    offset = 0
    for number, line in enumerate(_decompressed(file, raw), start=1):
        where = f"{file.path}, line {number}"
        try:
            text = line.decode("utf-8", encoding_errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset + error.start, error, f", line {number}") from error
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} must be a JSON object with the field {source.text_field!r}; got {text[:40]!r}")
        yield _record_pieces(where, record, source.text_field)
        progress(raw.tell())


def _parquet_documents(file: TextFile, raw: IO[bytes], source: DataSource, progress: Progress) -> Iterator[Pieces]:
    with tempfile.TemporaryFile() as unpacked:
        if file.compression:
            stream = _decompressed(file, raw)
            while chunk := stream.read(1 << 20):
                unpacked.write(chunk)
            unpacked.seek(0)
        table = pyarrow.parquet.ParquetFile(  # without a buffer, Arrow reads the column of a whole row group at once
            unpacked if file.compression else raw, buffer_size=1 << 20, pre_buffer=False
        )
        names = table.schema_arrow.names
        if source.text_field not in names:
            raise _no_field(str(file.path), source.text_field, names)
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[source.text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield _record_pieces(f"{file.path}, row {row}", {source.text_field: text}, source.text_field)
            progress(file.size_bytes * row // max(1, table.metadata.num_rows))


def _record_pieces(where: str, record: dict[str, Any], field: str) -> Pieces:
    if field not in record:
        raise _no_field(where, field, list(record))
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {field!r} must be text; got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise DataError(f"{where}: the field {field!r} holds U+{half:04X}, half of a character: correct it") from error
    return (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def _no_field(where: str, field: str, names: list[str]) -> DataError:
    return DataError(
        f"{where} has no field {field!r}; it has {', '.join(names)}.{nearest(field, names)} Set text_field to the field "
        "that holds the text."
    )
