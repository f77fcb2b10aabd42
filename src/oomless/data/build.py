"""Documents to a store of tokens, written beside its place and renamed into it.

What comes from the Hub is written in parts, each with where the rows then were, so that a run that was killed goes on from its
last part; one process at a time writes it. What comes from files is quick to read again, and is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from oomless.data.chat import ChatEncoder, Conversation
from oomless.data.dedupe import Duplicates
from oomless.data.encode import Encoder
from oomless.data.hub import HubRows
from oomless.data.read import Manner
from oomless.data.sources import Files, checksum

UNFINISHED = ".unfinished"
PART_CHARACTERS = 1 << 24
_ABANDONED_AFTER_S = 24 * 60 * 60
_STATE = "state.json"
_DUPLICATES = "duplicates left out"


def build(
    folder: Path,
    source: Files | HubRows,
    encoder: Encoder,
    manner: Manner,
    chats: ChatEncoder | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the tokens of ``source`` to ``folder``, unless another process has by then.

    Raises:
        OSError: it cannot be written.
        DataError: the text cannot be read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    with _workplace(folder, source.resumable) as temporary:
        if folder.is_dir():
            return
        writer = _Writer(temporary, encoder, manner)
        if isinstance(source, HubRows):
            writer.go_on(source)
            for part in _parts(source.documents(progress)):
                writer.write(part, chats)
                writer.keep(source)
        else:
            writer.write(source.documents(progress), chats)
        writer.finish(source.text_bytes, is_chat=chats is not None)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run that made the same one was faster
                raise


@contextmanager
def _workplace(folder: Path, resumable: bool) -> Iterator[Path]:
    """Give a folder to write in: one of this process's own, or the one where all go on, which one process has at a time."""
    if not resumable:
        temporary = folder.with_name(f".{uuid.uuid4().hex}{UNFINISHED}")
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return
    temporary = folder.with_name(f".{folder.name}{UNFINISHED}")
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary.mkdir(exist_ok=True)
        yield temporary
        Path(lock.name).unlink(missing_ok=True)


def _parts(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield ``documents`` in lists of about as many characters."""
    part: list[Any] = []
    characters = 0
    for document in documents:
        if isinstance(document, Conversation):
            characters += sum(len(message["content"]) for message in document.messages)
            characters += sum(map(len, document.pair or ()))
            part.append(document)
        else:
            pieces = list(document)
            characters += sum(map(len, pieces))
            part.append(iter(pieces))
        if characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    yield part


class _Writer:
    """The files of a store while they are written."""

    def __init__(self, folder: Path, encoder: Encoder, manner: Manner) -> None:
        self.folder, self.encoder, self.manner = folder, encoder, manner
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if encoder.vocabulary <= 1 << 16 else np.uint32
        self.starts = [0]
        self.tokens = self.learnt = 0
        self.duplicates = Duplicates.of(manner.deduplicate)

    def go_on(self, source: HubRows) -> None:
        """Go to where the last part ended that is whole; without one, to the beginning."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.starts = np.fromfile(self.folder / "starts.bin", dtype=np.int64, count=state["documents"] + 1).tolist()
        self.tokens, self.learnt = state["tokens"], state["learnt"]
        self.manner.notes.clear()
        self.manner.notes.update(state["notes"])
        source.go_to(state["source"])
        if self.duplicates is not None:
            tokens = np.memmap(self.folder / "tokens.bin", self.dtype, "r", shape=(self.tokens,))
            for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True):
                self.duplicates.is_new(tokens[begin:end])

    def write(self, documents: Iterable[Any], chats: ChatEncoder | None) -> None:
        """Write ``documents`` behind what is there."""
        encoded: Iterator[tuple[Any, Any, bool]]
        if chats is None:
            encoded = ((ids, None, is_last) for ids, is_last in self.encoder.documents(documents, self.dtype))
        else:
            encoded = ((ids, learnt, True) for ids, learnt in chats.documents(documents, self.dtype, self.manner.notes))
        width = np.dtype(self.dtype).itemsize
        with _opened(self.folder / "tokens.bin") as file, _opened(self.folder / "learnt.bin") as learnt_file:
            file.truncate(self.tokens * width)
            learnt_file.truncate(self.learnt)
            file.seek(0, os.SEEK_END)
            learnt_file.seek(0, os.SEEK_END)
            for ids, learnt, is_last in encoded:
                file.write(ids.data)
                self.tokens += len(ids)
                if learnt is not None:
                    learnt_file.write(learnt.data)
                    self.learnt += len(learnt)
                if not is_last:
                    continue
                if self.duplicates is not None and not self._is_new(file, ids):
                    self.manner.notes[_DUPLICATES] += 1
                    self.learnt -= len(ids) if learnt is not None else 0
                    self.tokens = self.starts[-1]
                    for opened, size in ((file, self.tokens * width), (learnt_file, self.learnt)):
                        opened.seek(size)
                        opened.truncate()
                    continue
                self.starts.append(self.tokens)
            for opened in (file, learnt_file):
                opened.flush()
                os.fsync(opened.fileno())

    def _is_new(self, file: Any, last: Any) -> bool:
        """Whether no document before the one just written is like it."""
        assert self.duplicates is not None
        size = self.tokens - self.starts[-1]
        if size > len(last):  # a long document, written in pieces
            file.seek(-size * last.itemsize, os.SEEK_END)
            last = np.frombuffer(file.read(), dtype=self.dtype)
        return self.duplicates.is_new(last)

    def keep(self, source: HubRows) -> None:
        """Note that all that is written belongs to rows before where ``source`` is."""
        np.array(self.starts, dtype=np.int64).tofile(self.folder / "starts.bin")
        state = {
            "source": source.state(),
            "tokens": self.tokens,
            "learnt": self.learnt,
            "documents": len(self.starts) - 1,
            "notes": self.manner.notes,
        }
        new = self.folder / f"{_STATE}.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        for path in (self.folder / "starts.bin", new):
            _sync(path)
        new.replace(self.folder / _STATE)

    def finish(self, text_bytes: int, *, is_chat: bool) -> None:
        """Write what describes the tokens, and see that all is on the disk."""
        for name in ("starts.bin", _STATE):
            (self.folder / name).unlink(missing_ok=True)
        np.save(self.folder / "documents.npy", np.array(self.starts, dtype=np.int64))
        names = ("tokens.bin", "learnt.bin", "documents.npy")
        header = {
            "dtype": np.dtype(self.dtype).name,
            "tokens": self.tokens,
            "text_bytes": text_bytes,
            "chats": is_chat,
            "notes": self.manner.notes,
            "checksums": {name: checksum(self.folder / name) for name in names},
        }
        (self.folder / "header.json").write_text(json.dumps(header, indent=2), encoding="utf-8")
        for path in self.folder.iterdir():
            _sync(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with path.open("r+b" if path.exists() else "w+b") as file:
        yield file


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_abandoned(cache_dir: Path) -> None:
    """Remove what runs that were killed left unfinished: nothing has been written there for a day."""
    for left in cache_dir.glob(f".*{UNFINISHED}"):
        with suppress(OSError):  # another run may remove it at the same time
            last_written = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if last_written < time.time() - _ABANDONED_AFTER_S:
                shutil.rmtree(left)
