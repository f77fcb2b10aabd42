"""The model, by its name or its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oomless.config.values import Count
from oomless.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model."""

    model: str
    """Folder of a model or of an adapter, or a Hugging Face name."""

    tokenizer: str | None = None
    """Tokenizer folder or name, where it is not the model's."""

    extend_tokenizer: Count | None = None
    """Add so many tokens for what the tokenizer cuts badly, learnt from `data`, with rows made of their pieces; in YAML also
    {tokens: 4000}. `trainable_rows: new` trains these rows alone."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


def tokens_to_add(value: Any) -> Any:
    """Return the number in ``{tokens: 4000}``; any other value of ``extend_tokenizer`` as it is.

    Raises:
        ConfigError: there is something else in it, or nothing.
    """
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"tokens"} or value["tokens"] is None:
        raise ConfigError(
            f"extend_tokenizer is a number of tokens, or {{tokens: 4000}}; got {dict(value)!r}", "extend_tokenizer"
        )
    return value["tokens"]
