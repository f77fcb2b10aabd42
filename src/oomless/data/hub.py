"""A data set on the Hugging Face Hub, streamed through ``datasets``: ``hf:owner/name`` or ``hf:owner/name:config``.

The revision is settled first, as a commit, and what is kept is kept by it. Without a network the copy in the Hub's own cache
is read, which is said. Rows are read in order, and where that stopped can be said and gone back to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oomless.config import DataSource
from oomless.data import records
from oomless.data.chat import Conversation
from oomless.data.read import Manner, Pieces
from oomless.errors import DataError, nearest

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+|[\w.-]+)(?::([^:]+))?")
_FROM_CACHE = "read from the Hub's cache, as the Hub could not be asked"


class HubRows:
    """The documents of one split of a data set on the Hub."""

    resumable = True

    def __init__(self, source: DataSource, manner: Manner) -> None:
        match = _NAME.fullmatch(source.path)
        if match is None:
            raise DataError(f"a name on the Hub is hf:owner/name or hf:owner/name:config; got {source.path!r}")
        for name in ("exclude", "encoding"):
            if getattr(source, name) is not None:
                raise DataError(f"{name} has no effect on {source.path}: it is for files; remove it")
        self.source, self.manner = source, manner
        self.name, self.config = match[1], match[2]
        self.place, self.commit = self._settle(source.revision)
        self.rows, self.split = self._open()
        names = self.rows.column_names or list(next(iter(self.rows.take(1)), {}))
        self.columns = records.columns_of(source.path, names, manner)
        self.rows = self.rows.select_columns(self.columns)
        self.form = records.form_of(names, manner)
        self.holds_chats = self.form is not None
        self.passed_over: dict[str, int] = {}
        self.row = self.text_bytes = 0

    def content(self) -> list[str]:
        """Return what tells these documents from any others."""
        return [self.name, self.config or "", self.split, self.commit, *self.columns]

    def documents(self, progress: Callable[[int, int], None] | None) -> Iterator[Pieces | Conversation]:
        """Yield the documents that follow; ``progress`` is told the bytes of text so far, twice, since nobody knows how many come."""
        try:
            for record in self.rows:
                self.row += 1
                self.text_bytes += sum(len(value) for value in record.values() if isinstance(value, str))
                if progress is not None:
                    progress(self.text_bytes, self.text_bytes)
                yield records.as_document(f"{self.source.path}, row {self.row}", record, self.form, self.manner)
        except DataError:
            raise
        except Exception as error:  # the library raises what its readers and the network do
            raise DataError(
                f"{self.source.path} could not be read beyond row {self.row}: {error}. What was read is kept: the same command goes "
                "on from there."
            ) from error

    def state(self) -> dict[str, Any]:
        """Return how far the rows have been read."""
        return {"rows": self.rows.state_dict(), "row": self.row, "text_bytes": self.text_bytes}

    def go_to(self, state: dict[str, Any]) -> None:
        """Go on behind the rows that ``state`` had read."""
        self.rows.load_state_dict(state["rows"])
        self.row, self.text_bytes = state["row"], state["text_bytes"]

    def check_unchanged(self) -> None:
        """A commit never changes."""

    def _settle(self, revision: str | None) -> tuple[str, str]:
        """Return where to read, and the commit that ``revision`` is."""
        try:
            from huggingface_hub import HfApi, snapshot_download
            from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
        except ImportError as error:
            raise _needs_datasets(self.source) from error
        try:
            return self.name, str(HfApi().dataset_info(self.name, revision=revision, timeout=30).sha)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise DataError(
                f"{self.source.path} cannot be had: {str(error).strip().splitlines()[-1]} Correct its name or revision, or log in with "
                "hf auth login."
            ) from error
        except Exception as unreachable:  # no network has many faces
            try:
                folder = snapshot_download(self.name, repo_type="dataset", revision=revision, local_files_only=True)
            except Exception as error:
                raise DataError(
                    f"{self.source.path} needs the Hub, which cannot be reached, and there is no copy of it in the Hub's cache: "
                    f"connect, or download it to a folder and name that ({str(unreachable).strip().splitlines()[0]})"
                ) from error
        self.manner.notes[_FROM_CACHE] += 1
        return folder, Path(folder).name

    def _open(self) -> tuple[Any, str]:
        """Return the rows of the split to read, and its name."""
        try:
            import datasets
        except ImportError as error:
            raise _needs_datasets(self.source) from error
        revision = {"revision": self.commit} if self.place == self.name else {}
        try:
            splits = datasets.load_dataset(self.place, self.config, streaming=True, **revision)
        except Exception as error:
            raise DataError(f"{self.source.path} cannot be read: {str(error).strip()}") from error
        wanted = self.source.split or (next(iter(splits)) if len(splits) == 1 else "train")
        if wanted not in splits:
            raise DataError(
                f"{self.source.path} has the splits {', '.join(splits)}, and no {wanted!r}.{nearest(wanted, splits)} Set split to "
                "one of them."
            )
        return splits[wanted], wanted


def _needs_datasets(source: DataSource) -> DataError:
    return DataError(f"{source.path} is read through datasets: pip install 'oomless[hub]'")
