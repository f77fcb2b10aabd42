"""Files of records to records, one at a time: JSON lines and lists, CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from oomless.data import chat
from oomless.data.chat import Conversation
from oomless.data.files import TextFile
from oomless.data.read import PIECE_CHARACTERS, Manner, Pieces, Progress, seekable, text_pieces
from oomless.errors import DataError, nearest

Record = dict[str, Any]
Placed = tuple[str, Record]
"""Where a record lies, for a person, and the record."""

TEXT_FIELD = "text"
"""Where the text of a record lies, if nothing else is said and it is no chat."""

_ROWS_AT_ONCE = 256
_LOOK_AHEAD = 1 << 20
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_PLAIN_JSON = ".json read as plain text, not records"


def documents(file: TextFile, raw: IO[bytes], manner: Manner, progress: Progress) -> Iterator[Pieces | Conversation]:
    """Yield the text of each record of ``file``, or the chat that it is."""
    if file.kind in ("parquet", "arrow"):
        found = _rows(file, raw, manner, progress)
    else:
        pieces = text_pieces(file, raw, manner, progress)
        if file.kind == "json":
            start = _ahead(pieces)
            pieces = chain([start], pieces)
            shape = _shape(start, manner)
            if shape == "plain":
                manner.notes[_PLAIN_JSON] += 1
                yield pieces
                return
            found = _values(file, pieces, is_list=shape == "list")
        else:
            found = _json_lines(file, pieces) if file.kind == "jsonl" else _table(file, pieces)
    for where, record in found:
        yield as_document(where, record, form_of(record, manner), manner)


def form_of(names: Iterable[str], manner: Manner) -> str | None:
    """Return which form of chat records with the fields ``names`` are read as; ``None`` where they are text."""
    return chat.form_of(names) if manner.text_field is None else None


def as_document(where: str, record: Record, form: str | None, manner: Manner) -> Pieces | Conversation:
    """Return the text of ``record``, or the chat of this ``form`` that it is."""
    return _record_pieces(where, record, manner) if form is None else chat.read(where, record, form)


def _lines(pieces: Pieces) -> Iterator[str]:
    """Yield the lines of ``pieces`` with their ends, each of any length."""
    parts: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        parts.append(first)
        for other in others:
            yield "".join(parts) + "\n"
            parts = [other]
    if parts and (last := "".join(parts)):
        yield last


def _json_lines(file: TextFile, pieces: Pieces) -> Iterator[Placed]:
    for number, line in enumerate(_lines(pieces), start=1):
        if line.strip():
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            yield where, _as_record(where, record, line)


def _as_record(where: str, value: Any, text: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a JSON object with a field that holds its text; got {text[:40]!r}")
    return value


# JSON that is not one record a line


def _ahead(pieces: Pieces) -> str:
    """Return the first characters of ``pieces``, enough to see what they are."""
    start = ""
    for piece in pieces:
        start += piece
        if len(start) >= _LOOK_AHEAD:
            break
    return start


def _shape(start: str, manner: Manner) -> str:
    """Return what JSON is that begins with ``start``: a list of records, records one after the other, or plain."""
    at = _skip(start, 0)
    if start[at : at + 1] == "[" and start[_skip(start, at + 1) :][:1] == "{":
        return "list"
    if start[at : at + 1] != "{":
        return "plain"
    try:
        record, end = json.JSONDecoder().raw_decode(start, at)
    except (ValueError, RecursionError):
        return "plain"
    is_record = (manner.text_field or TEXT_FIELD) in record or form_of(record, manner) is not None
    return "records" if start[_skip(start, end) :][:1] == "{" or is_record else "plain"


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _values(file: TextFile, pieces: Iterable[str], *, is_list: bool) -> Iterator[Placed]:
    """Yield the objects of a list, or those that follow each other, holding one at a time."""
    decode, source = json.JSONDecoder().raw_decode, iter(pieces)
    text, at, number, ended = "", 0, 0, False

    def more() -> bool:
        """Read at least as much again as is held, so that a value of any size is looked at a few times only."""
        nonlocal text, at, ended
        parts, size = [text[at:]], 0
        for piece in source:
            parts.append(piece)
            size += len(piece)
            if size >= len(parts[0]):
                break
        else:
            ended = True
        text, at = "".join(parts), 0
        return size > 0

    def next_character() -> str:
        nonlocal at
        while True:
            at = _skip(text, at)
            if at < len(text) or not more():
                return text[at : at + 1]

    def take(expected: str, where: str) -> str:
        nonlocal at
        character = next_character()
        if character not in expected or not character:
            raise DataError(f"{where} is not JSON: expected {' or '.join(expected)}; got {text[at : at + 40]!r}")
        at += 1
        return character

    if is_list:
        take("[", str(file.path))
    while next_character():
        number += 1
        where = f"{file.path}, record {number}"
        while True:
            try:
                value, end = decode(text, at)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16
                )
                if not cut or ended or not more():
                    raise DataError(f"{where} is not JSON: {error}") from error
        began, at = text[at : at + 40], end
        yield where, _as_record(where, value, began)
        if is_list and take(",]", where) == "]":
            if rest := next_character():
                raise DataError(f"{file.path} goes on behind the end of its list: {rest!r}")
            return
    if is_list:
        raise DataError(f"{file.path} ends within its list")


# Tables


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(file: TextFile, pieces: Pieces) -> Iterator[Placed]:
    """Yield the rows of a table whose first row names the columns."""
    lines = _lines(pieces)
    first = next(lines, "").removeprefix("\ufeff")
    delimiter = "\t" if file.kind == "tsv" else max(",;\t", key=first.count)
    rows = csv.reader(chain([first] if first else [], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        where = f"{file.path}, line {rows.line_num + 1}"
        try:
            with _fields_of_any_size():
                row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{where} is not a row of a table: {error}") from error
        if row is None:
            return
        if not names:
            names = row
        elif row:
            if len(row) != len(names):
                raise DataError(
                    f"{where} has {len(row)} fields, and the first row names {len(names)}: quote or correct it"
                )
            yield where, dict(zip(names, row, strict=True))


def _rows(file: TextFile, raw: IO[bytes], manner: Manner, progress: Progress) -> Iterator[Placed]:
    """Yield the rows of a Parquet or Arrow file, of their columns those that are used."""
    with seekable(file, raw) as opened:
        if file.kind == "parquet":  # without a buffer, Arrow reads the column of a whole row group at once
            table = pyarrow.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
            columns, total = (
                columns_of(str(file.path), table.schema_arrow.names, manner),
                max(1, table.metadata.num_rows),
            )
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)
        else:
            is_file = opened.read(6) == b"ARROW1"
            opened.seek(0)
            reader = pyarrow.ipc.open_file(opened) if is_file else pyarrow.ipc.open_stream(opened)
            columns, total = columns_of(str(file.path), reader.schema.names, manner), 0
            whole = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
            batches = (
                batch.select(columns).slice(begin, _ROWS_AT_ONCE)
                for batch in whole
                for begin in range(0, batch.num_rows, _ROWS_AT_ONCE)
            )
        row = 0
        for batch in batches:
            for record in batch.to_pylist():
                row += 1
                yield f"{file.path}, row {row}", record
            progress(file.size_bytes * row // total if total else raw.tell())


def columns_of(where: str, names: list[str], manner: Manner) -> list[str]:
    """Return those of the columns ``names`` that are read.

    Raises:
        DataError: none holds text.
    """
    form = form_of(names, manner)
    if form is not None:
        return chat.fields_of(form, names)
    name = manner.text_field or TEXT_FIELD
    if name not in names:
        raise _no_field(where, name, names)
    return [name]


# Records to text


def _record_pieces(where: str, record: Record, manner: Manner) -> Pieces:
    name = manner.text_field or TEXT_FIELD
    if name not in record:
        raise _no_field(where, name, list(record))
    text = record[name]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {name!r} must be text; got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise DataError(f"{where}: the field {name!r} holds U+{half:04X}, half of a character: correct it") from error
    return (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def _no_field(where: str, name: str, names: list[str]) -> DataError:
    return DataError(
        f"{where} has no field {name!r}; it has {', '.join(names)}.{nearest(name, names)} Set text_field to the field "
        "that holds the text, or leave the file out with exclude. Chats have messages, conversations, prompt and completion, or "
        "instruction and output."
    )
