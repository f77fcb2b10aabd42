"""What a user may say: frozen dataclasses, filled from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from oomless.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One source of text."""

    path: str
    """A file, a folder (searched recursively) or a glob."""

    weight: float = 1.0
    """Share of the training tokens in relation to the other sources' weights."""

    text_field: str = "text"
    """The field of a ``.jsonl`` or ``.parquet`` record that holds the text."""

    name: str | None = None
    """What the source is called in metrics; by default its path's last part."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"a data source's weight must be above 0; got {self.weight} for {self.path}")
