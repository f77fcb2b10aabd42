"""Text tokenised once: a memory-mapped file of ids, keyed by what went into it.

    <key>/tokens.bin     all ids, one document after the other, 16 bits each where the vocabulary allows
          learnt.bin     of chats, which of them are to be predicted; else empty
          documents.npy  where each document begins, and the end
          header.json    counts and checksums

The key is a hash of the files' contents, the tokenizer, the settings, and the code and libraries that make tokens of them. A
store is written beside its place and renamed into it, so it is whole or absent, and two runs that make the same one do not
disturb each other; what a killed run left is removed after a day. Opening verifies the checksums.

The folder is shared between runs and has a bound: beyond it the stores that were not opened for longest go. One that a run
still uses may be among them, which does not disturb it: what is mapped stays until it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tokenizers

from oomless.config import DataSource
from oomless.data.chat import ChatEncoder, Conversation
from oomless.data.encode import Encoder
from oomless.data.files import Found, TextFile, find_files
from oomless.data.read import Manner, read_documents
from oomless.errors import DataError
from oomless.units import counted, format_bytes

MOST_BYTES = 64 << 30
"""What the stores of one folder may take, where that is no more than a quarter of the disk."""
_READ_AT_ONCE = 1 << 22
_UNFINISHED = ".unfinished"
_ABANDONED_AFTER_S = 24 * 60 * 60
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStore:
    """The tokens of one source."""

    name: str
    key: str
    tokens: Any
    """All ids: [tokens], uint16 or uint32, memory-mapped."""

    starts: Any
    """Where each document begins, and the end: [documents + 1], int64."""

    learnt: Any = None
    """Which tokens of chats are to be predicted: [tokens], bool, memory-mapped; ``None`` where all are, as in text."""

    text_bytes: int
    passed_over: Counter[str]
    """Files of the source that were not read, by what they are."""
    notes: Counter[str] = field(default_factory=Counter)
    """What else a person should know of how the rest was read."""
    file: Path | None = None
    """What ``tokens`` maps; ``None`` where they lie in memory."""
    opened: tuple[int, int, int] | None = None
    """The file's inode, size and time of change when it was opened."""

    def check_unchanged(self) -> None:
        """Check that nobody has written to the tokens, which a cut file would answer with a fatal signal.

        A file that was removed or replaced is no matter: what is mapped stays.

        Raises:
            DataError: the file is not what was opened.
        """
        if self.file is None or self.opened is None:
            return
        try:
            now = _identity(self.file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(
                f"the token cache {self.file} cannot be read any more: {error.strerror or error}"
            ) from error
        if now[0] == self.opened[0] and now != self.opened:
            raise DataError(
                f"the token cache {self.file} was changed while the run used it: remove its folder, which the text makes again, "
                "and go on with --resume"
            )

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    @property
    def spans(self) -> Any:
        """Where each document begins and ends: [documents, 2], int64."""
        return np.stack([self.starts[:-1], self.starts[1:]], axis=1)

    def describe(self) -> str:
        """Return one line for a person."""
        size = f"{counted(self.documents, 'document')}, {counted(len(self.tokens), 'token')}, {format_bytes(self.text_bytes)}"
        passed_over = ", ".join(f"{count:,} {what}" for what, count in sorted(self.passed_over.items()))
        facts = [size, f"passed over: {passed_over}" if passed_over else "", _told(self.notes)]
        return f"{self.name}: {'; '.join(fact for fact in facts if fact)}"


def _told(notes: Counter[str]) -> str:
    return "; ".join(f"{what}: {count:,}" for what, count in sorted(notes.items()))


def source_name(source: DataSource) -> str:
    """Return what the source is called."""
    return source.name or Path(source.path).name or source.path


def open_store(
    source: DataSource,
    encoder: Encoder,
    cache_dir: Path,
    *,
    manner: Manner | None = None,
    chats: ChatEncoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Return the tokens of ``source``, tokenising its files if the cache does not hold them yet.

    ``progress`` is told done and total bytes of the files while they are tokenised.

    Raises:
        DataError: the text cannot be read, changed meanwhile, or the cache is damaged or cannot be written.
    """
    manner = manner or Manner()
    found = find_files(source)
    stamps = [_stamp(file) for file in found.files]
    if not _holds_chats(found.files, manner):
        chats = None
    key = _key(found.files, encoder, manner, chats)
    folder = cache_dir / key
    for _ in range(_TRIES):
        if not folder.is_dir():
            try:
                _build(folder, found.files, encoder, manner, chats, progress)
            except OSError as error:
                raise DataError(
                    f"the token cache {cache_dir} could not be written: {error.strerror or error}. Make room, or set cache_dir "
                    "to a disk that has some."
                ) from error
            if stamps != [_stamp(file) for file in found.files]:
                shutil.rmtree(folder)
                raise DataError(
                    f"files of {source.path} changed while they were read: start again when they are at rest"
                )
            _keep_to_bound(cache_dir, folder)
        with suppress(OSError):
            os.utime(folder)
        try:
            return _open(folder, source, found)
        except DataError:
            if folder.is_dir():
                raise
    raise DataError(
        f"the token cache {cache_dir} is emptied while it is used: set cache_dir to a folder of this run's own"
    )


def user_cache_dir() -> Path:
    """Return where tokens are kept if nothing else is said: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomless" / "tokens"


def _holds_chats(files: list[TextFile], manner: Manner) -> bool:
    """Whether the first document that there is is a chat; others must be the same."""
    apart = replace(manner, notes=Counter())
    documents = (document for file in files for document in read_documents(file, apart, lambda _: None))
    return isinstance(next(documents, None), Conversation)


def _stamp(file: TextFile) -> tuple[int, int, int] | None:
    try:
        return _identity(file.path)
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _key(files: list[TextFile], encoder: Encoder, manner: Manner, chats: ChatEncoder | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    settings = [
        _code(),
        pyarrow.__version__,
        tokenizers.__version__,
        encoder.serialised,
        encoder.eos,
        encoder.start,
        encoder.anchor,
        manner.text_field,
        manner.encoding,
        manner.errors,
        chats.facts if chats is not None else None,
    ]
    digest.update(json.dumps(settings).encode())
    for file in files:
        try:
            content = _checksum(file.path)
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error
        digest.update(f"{file.kind} {file.compression} {content}\n".encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Return a digest of the code that makes tokens of text."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def _build(
    folder: Path,
    files: list[TextFile],
    encoder: Encoder,
    manner: Manner,
    chats: ChatEncoder | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = folder.with_name(f".{uuid.uuid4().hex}{_UNFINISHED}")
    temporary.mkdir()
    try:
        total_bytes = sum(file.size_bytes for file in files)

        def documents() -> Iterator[Any]:
            done = 0
            for file in files:

                def tell(position: int, before: int = done) -> None:
                    if progress is not None:
                        progress(before + position, total_bytes)

                for document in read_documents(file, manner, tell):
                    if isinstance(document, Conversation) == (chats is None):
                        raise DataError(
                            f"{file.path} holds chats and text, or other files of its source do: name them as two sources"
                        )
                    yield document
                done += file.size_bytes

        dtype = np.uint16 if encoder.vocabulary <= 1 << 16 else np.uint32
        starts, position = [0], 0
        with (temporary / "tokens.bin").open("wb") as file, (temporary / "learnt.bin").open("wb") as learnt_file:
            if chats is None:
                encoded = ((ids, None, is_last) for ids, is_last in encoder.documents(documents(), dtype))
            else:
                encoded = ((ids, learnt, True) for ids, learnt in chats.documents(documents(), dtype, manner.notes))
            for ids, learnt, is_last in encoded:
                file.write(ids.data)
                learnt_file.write(learnt.data if learnt is not None else b"")
                position += len(ids)
                if is_last:
                    starts.append(position)
        np.save(temporary / "documents.npy", np.array(starts, dtype=np.int64))
        header = {
            "dtype": np.dtype(dtype).name,
            "tokens": position,
            "text_bytes": total_bytes,
            "chats": chats is not None,
            "notes": manner.notes,
            "checksums": {name: _checksum(temporary / name) for name in ("tokens.bin", "learnt.bin", "documents.npy")},
        }
        (temporary / "header.json").write_text(json.dumps(header, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run that made the same one was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what runs that were killed left unfinished: nothing has been written there for a day."""
    for left in cache_dir.glob(f".*{_UNFINISHED}"):
        with suppress(OSError):  # another run may remove it at the same time
            last_written = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if last_written < time.time() - _ABANDONED_AFTER_S:
                shutil.rmtree(left)


def _keep_to_bound(cache_dir: Path, newest: Path) -> None:
    """Remove the stores that were not opened for longest, beyond what the folder may hold; ``newest`` stays."""
    bound = min(MOST_BYTES, shutil.disk_usage(cache_dir).total // 4)
    stores = []
    for folder in cache_dir.iterdir():
        with suppress(OSError):  # another run may remove it at the same time
            size_bytes = sum(path.stat().st_size for path in folder.iterdir())
            stores.append((folder == newest, folder.stat().st_mtime, size_bytes, folder))
    stores.sort(reverse=True)
    total_bytes = 0
    for is_newest, _, size_bytes, folder in stores:
        total_bytes += size_bytes
        if total_bytes > bound and not is_newest and (folder / "header.json").is_file():
            removed = folder.with_name(f".{uuid.uuid4().hex}{_UNFINISHED}")
            with suppress(OSError):
                folder.rename(removed)
                shutil.rmtree(removed)


def _open(folder: Path, source: DataSource, found: Found) -> TokenStore:
    path = folder / "tokens.bin"
    try:
        opened = _identity(path)
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        for name, expected in header["checksums"].items():
            if _checksum(folder / name) != expected:
                raise ValueError(f"{name} is not what was written")
        starts = np.load(folder / "documents.npy", allow_pickle=False)
        shape = (header["tokens"],)
        tokens = np.memmap(path, header["dtype"], "r", shape=shape) if shape[0] else np.zeros(0, header["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the token cache {folder} is damaged ({error}): remove that folder and start again") from error
    if len(tokens) == 0 and header["notes"]:
        raise DataError(f"{source.path} holds nothing to learn: {_told(Counter(header['notes']))}")
    if len(tokens) == 0:
        raise DataError(f"{source.path} holds no text")
    return TokenStore(
        name=source_name(source),
        key=folder.name,
        tokens=tokens,
        learnt=np.memmap(folder / "learnt.bin", np.bool_, "r", shape=shape) if header["chats"] else None,
        starts=starts,
        text_bytes=header["text_bytes"],
        passed_over=found.passed_over,
        notes=Counter(header["notes"]),
        file=path,
        opened=opened,
    )
