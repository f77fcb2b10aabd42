"""A file written piece by piece, which goes on where it was after a kill: the whole pieces that are there are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomless.models.save import durable
from oomless.units import MiB

_COMPARED_AT_ONCE = 16 * MiB

Progress = Callable[[int], None]
"""Is told how many bytes more are done."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a file, made when they are written or compared."""

    name: str
    size: int
    make: Callable[[], Iterator[Any]]
    """Yields them, in parts."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A file: how it begins, and what follows."""

    head: bytes
    pieces: Sequence[Piece]

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return len(self.head) + sum(piece.size for piece in self.pieces)


def write(path: Path, stream: Stream, progress: Progress) -> None:
    """Write ``stream`` to ``path``, or what of it is not there yet."""
    path.touch()
    with durable(path, "r+b") as file:
        place, left = _begun(path, stream)
        file.seek(place)
        file.truncate()
        progress(place)
        if not place:
            file.write(stream.head)
            progress(len(stream.head))
        for piece in left:
            written = 0
            for part in piece.make():
                written += file.write(part)
            assert written == piece.size, f"{piece.name}: {written} bytes, not {piece.size}"
            progress(written)


def _begun(path: Path, stream: Stream) -> tuple[int, Sequence[Piece]]:
    """Return how much of ``stream`` stands in ``path`` in whole pieces, and the pieces that do not."""
    there = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(stream.head)) != stream.head:
            return 0, stream.pieces
    place = len(stream.head)
    for number, piece in enumerate(stream.pieces):
        if place + piece.size > there:
            return place, stream.pieces[number:]
        place += piece.size
    return place, ()


def first_difference(path: Path, stream: Stream, progress: Progress) -> str | None:
    """Return which piece of ``path`` is not that of ``stream``, made anew; ``None`` where all are."""
    with path.open("rb") as file:
        if file.read(len(stream.head)) != stream.head:
            return "its header"
        for piece in stream.pieces:
            for part in piece.make():
                view = memoryview(part).cast("B")
                for place in range(0, len(view), _COMPARED_AT_ONCE):
                    wanted = view[place : place + _COMPARED_AT_ONCE].tobytes()
                    if file.read(len(wanted)) != wanted:
                        return piece.name
            progress(piece.size)
        return "its end" if file.read(1) else None
