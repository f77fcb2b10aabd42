"""What is noted beside a model whose tokenizer was extended: what for, and which rows are new."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from oomless.errors import ModelError
from oomless.units import counted, format_bytes

FILE = "extended_tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """How a tokenizer and a model were extended."""

    model: str
    """The model that was extended, as it was named."""

    tokenizer: str | None
    asked: int | None
    """How many tokens were to be learnt; ``None`` where they were in the tokenizer, and had no rows."""

    key: str = ""
    """Of all that it rests on."""

    first: int
    """The id of the first new token; the others follow."""

    added: int
    rows: int
    """How many the embedding has now."""

    rows_bytes: int
    """What the rows that were added take as weights."""

    existing: int = 0
    """Joins that were tokens already."""

    words: int = 0
    """In the text that was learnt from, between spaces; 0 where there was none to read."""

    text_bytes: int = 0
    tokens_before: int = 0
    tokens_after: int = 0

    @property
    def new_rows(self) -> str:
        """The rows of the new tokens, as ``trainable_rows`` names them."""
        return f"{self.first}-{self.first + self.added - 1}"

    def notes(self) -> tuple[str, ...]:
        """Return what is to be said of it."""
        size = f"their rows take {format_bytes(self.rows_bytes)} more as weights"
        if self.asked is None:
            return (
                f"{counted(self.added, 'token')} of the tokenizer had no row in the embedding of {self.model}: each begins as the mean of "
                f"its pieces, and learns where embed_tokens trains (trainable_rows: new trains these alone); {size}",
            )
        if not self.words:
            return (
                f"{counted(self.added, 'token')} are taken as given for the tokenizer of {self.model}: the text is not read here; {size}",
            )
        before, after = self.tokens_before / self.words, self.tokens_after / self.words
        each = self.text_bytes / self.tokens_before, self.text_bytes / self.tokens_after
        passed = f"; {counted(self.existing, 'join')} that are tokens already passed over" if self.existing else ""
        fewer = f" of {self.asked:,} asked for: the text has no more" if self.added < self.asked else ""
        return (
            f"the tokenizer of {self.model} has {counted(self.added, 'new token')}{fewer}: {before:.2f} tokens a word before, {after:.2f} "
            f"now ({each[0]:.2f} and {each[1]:.2f} bytes a token){passed}; {size}",
        )

    def write(self, folder: Path) -> None:
        """Write it into ``folder``."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def read(folder: Path) -> Extension | None:
    """Return what is noted in ``folder``; ``None`` where nothing is.

    Raises:
        ModelError: it is damaged.
    """
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        return Extension(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / FILE} is damaged: {error}") from error
