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
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tokenizers

from oomless.config import DataSource
from oomless.data.build import UNFINISHED, build
from oomless.data.chat import ChatEncoder
from oomless.data.encode import Encoder
from oomless.data.read import Manner
from oomless.data.sources import checksum, identity, open_source
from oomless.errors import DataError
from oomless.units import counted, format_bytes

MOST_BYTES = 64 << 30
"""What the stores of one folder may take, where that is no more than a quarter of the disk."""
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
    passed_over: Mapping[str, int]
    """Files of the source that were not read, by what they are."""
    notes: Counter[str] = field(default_factory=Counter)
    """What else a person should know of how the rest was read."""
    contents: str = "0"
    """A hash of the tokens, of where documents begin, and of what is learnt; the key is also of the code that made them."""
    text: str = "0"
    """A hash of the text, whatever tokens it became."""
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
            now = identity(self.file)
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
    documents = open_source(source, manner)
    if not documents.holds_chats:
        chats = None
    content = documents.content()
    key = _key(content, encoder, manner, chats)
    folder = cache_dir / key
    for _ in range(_TRIES):
        if not folder.is_dir():
            try:
                build(folder, documents, encoder, manner, chats, progress)
            except OSError as error:
                raise DataError(
                    f"the token cache {cache_dir} could not be written: {error.strerror or error}. Make room, or set cache_dir "
                    "to a disk that has some."
                ) from error
            try:
                documents.check_unchanged()
            except DataError:
                shutil.rmtree(folder)
                raise
            _keep_to_bound(cache_dir, folder)
        with suppress(OSError):
            os.utime(folder)
        try:
            return _open(folder, source, documents.passed_over, content)
        except DataError:
            if folder.is_dir():
                raise
    raise DataError(
        f"the token cache {cache_dir} is emptied while it is used: set cache_dir to a folder of this run's own"
    )


def user_cache_dir() -> Path:
    """Return where tokens are kept if nothing else is said: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomless" / "tokens"


def _key(content: list[str], encoder: Encoder, manner: Manner, chats: ChatEncoder | None) -> str:
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
        manner.deduplicate,
        chats.facts if chats is not None else None,
    ]
    digest.update(json.dumps([settings, content]).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Return a digest of the code that makes tokens of text."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
            removed = folder.with_name(f".{uuid.uuid4().hex}{UNFINISHED}")
            with suppress(OSError):
                folder.rename(removed)
                shutil.rmtree(removed)


def _open(folder: Path, source: DataSource, passed_over: Mapping[str, int], content: list[str]) -> TokenStore:
    path = folder / "tokens.bin"
    try:
        opened = identity(path)
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        for name, expected in header["checksums"].items():
            if checksum(folder / name) != expected:
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
        passed_over=passed_over,
        notes=Counter(header["notes"]),
        contents=hashlib.blake2b(json.dumps(header["checksums"], sort_keys=True).encode(), digest_size=16).hexdigest(),
        text=hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest(),
        file=path,
        opened=opened,
    )
