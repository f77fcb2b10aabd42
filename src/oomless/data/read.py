"""Text files to documents, one piece at a time.

A document is an iterator of pieces of text, so that a file of any size passes through in bounded memory. No character is
dropped, added or changed: line ends stay as they are, and a byte order mark is a character like any other. A text file
is one document, and so is each record of a file of records (``records.py``); of HTML and notebooks it is their text
(``markup.py``).
"""

from __future__ import annotations

import codecs
import gzip
import io
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import pyarrow

from oomless.data.files import TextFile
from oomless.errors import DataError

if TYPE_CHECKING:
    from oomless.data.chat import Conversation

PIECE_CHARACTERS = 1 << 18

Pieces = Iterator[str]
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How the files of a source are read, and what is to be said about it."""

    text_field: str | None = None
    """``None``: what a record is follows from its keys."""
    encoding: str = "utf-8"
    errors: str = "strict"
    deduplicate: str | None = None
    notes: Counter[str] = field(default_factory=Counter)


def read_documents(file: TextFile, manner: Manner, progress: Progress) -> Iterator[Pieces | Conversation]:
    """Yield each document of ``file`` as an iterator of pieces, the one before used up first, or as a chat.

    ``progress`` is told how many of the file's bytes, as they lie on disk, have been read.

    Raises:
        DataError: the file cannot be read, decoded or decompressed, or a record lacks its text.
    """
    from oomless.data import markup, records

    with errors_named(file), file.path.open("rb") as raw:
        if file.kind == "text":
            yield text_pieces(file, raw, manner, progress)
        elif file.kind == "html":
            yield markup.html_pieces(text_pieces(file, raw, manner, progress))
        elif file.kind == "ipynb":
            yield markup.notebook_pieces(file.path, text_pieces(file, raw, manner, progress))
        elif file.kind == "pdf":
            with seekable(file, raw) as opened:
                yield markup.pdf_pieces(file.path, opened, manner.notes)
        elif file.kind == "docx":
            with seekable(file, raw) as opened:
                yield markup.docx_pieces(file.path, opened)
        else:
            yield from records.documents(file, raw, manner, progress)


@contextmanager
def errors_named(file: TextFile) -> Iterator[None]:
    """Turn what can go wrong with ``file`` into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read to its end: {error}") from error


def decompressed(file: TextFile, raw: IO[bytes]) -> IO[bytes]:
    """Return the bytes of ``file`` as they were before it was compressed."""
    if file.compression == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if file.compression == ".zst":  # Arrow's reader, unlike zstandard's, notices that a file is truncated
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), PIECE_CHARACTERS)
    return raw


@contextmanager
def seekable(file: TextFile, raw: IO[bytes]) -> Iterator[Any]:
    """Give the bytes of ``file`` as a file that can be read from any place."""
    if not file.compression:
        yield raw
        return
    with tempfile.TemporaryFile() as unpacked:
        stream = decompressed(file, raw)
        while chunk := stream.read(1 << 20):
            unpacked.write(chunk)
        unpacked.seek(0)
        yield unpacked


def text_pieces(file: TextFile, raw: IO[bytes], manner: Manner, progress: Progress) -> Pieces:
    """Yield the characters of ``file``."""
    decoder = codecs.getincrementaldecoder(manner.encoding)(manner.errors)
    stream = decompressed(file, raw)
    offset, line = 0, 1
    first = chunk = b"-"
    while chunk:
        with errors_named(file):
            chunk = stream.read(PIECE_CHARACTERS)
        first = chunk if not offset else first
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += chunk[: max(0, error.start - pending)].count(b"\n")
            raise _not_decoded(
                file, manner, first[:2], f"{offset - pending + error.start} (line {line}, {error.reason})"
            ) from error
        if text:
            yield text
        offset += len(chunk)
        line += chunk.count(b"\n")
        progress(raw.tell())


def _not_decoded(file: TextFile, manner: Manner, first: bytes, where: str) -> DataError:
    likely = "utf-16" if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "windows-1252"
    named = (
        f"it begins as {likely} does: set encoding: {likely}"
        if likely == "utf-16"
        else (f"set encoding to the one it has, such as {likely}")
    )
    return DataError(
        f"{file.path} is not {manner.encoding.upper()} at byte {where}: {named}; or set encoding_errors: replace to have U+FFFD "
        "put there"
    )
