"""Where the documents of a source come from: files, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from oomless.config import DataSource
from oomless.data.chat import Conversation
from oomless.data.files import TextFile, find_files
from oomless.data.hub import PREFIX, HubRows
from oomless.data.read import Manner, Pieces, read_documents
from oomless.errors import DataError

Document = Pieces | Conversation
_READ_AT_ONCE = 1 << 22


def open_source(source: DataSource, manner: Manner) -> Files | HubRows:
    """Return where the documents of ``source`` come from.

    Raises:
        DataError: there is nothing, or a setting of the source has no effect.
    """
    if source.path.startswith(PREFIX):
        return HubRows(source, manner)
    if source.revision is not None:
        raise DataError(f"revision has no effect on {source.path}: it is for names on the Hub, such as hf:owner/name")
    return Files(source, manner)


class Files:
    """The documents in files."""

    resumable = False

    def __init__(self, source: DataSource, manner: Manner) -> None:
        self.source, self.manner = source, manner
        found = find_files(source)
        self.files, self.passed_over = found.files, found.passed_over
        self.text_bytes = sum(file.size_bytes for file in self.files)
        self.stamps = [_stamp(file) for file in self.files]
        apart = replace(manner, notes=Counter())
        first = next((found for file in self.files for found in read_documents(file, apart, lambda _: None)), None)
        self.holds_chats = isinstance(first, Conversation)
        """Whether the first document is a chat; others must be the same."""

    def content(self) -> list[str]:
        """Return what tells these documents from any others."""
        facts = []
        for file in self.files:
            try:
                facts.append(f"{file.kind} {file.compression} {checksum(file.path)}")
            except OSError as error:
                raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error
        return facts

    def documents(self, progress: Callable[[int, int], None] | None) -> Iterator[Document]:
        """Yield the documents; ``progress`` is told how many of the files' bytes have been read, of how many."""
        done = 0
        for file in self.files:

            def tell(position: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + position, self.text_bytes)

            for document in read_documents(file, self.manner, tell):
                if isinstance(document, Conversation) != self.holds_chats:
                    raise DataError(
                        f"{file.path} holds chats and text, or other files of its source do: name them as two sources"
                    )
                yield document
            done += file.size_bytes

    def check_unchanged(self) -> None:
        """Check that no file was written to while it was read.

        Raises:
            DataError: one was.
        """
        if self.stamps != [_stamp(file) for file in self.files]:
            raise DataError(
                f"files of {self.source.path} changed while they were read: start again when they are at rest"
            )


def _stamp(file: TextFile) -> tuple[int, int, int] | None:
    try:
        return identity(file.path)
    except OSError:
        return None


def identity(path: Path) -> tuple[int, int, int]:
    """Return the file's inode, size and time of change."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def checksum(path: Path) -> str:
    """Return a digest of the file's content."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()
