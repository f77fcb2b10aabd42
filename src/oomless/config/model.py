"""The model, by its name or its folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model."""

    model: str
    """Folder of a model or of an adapter, or a Hugging Face name."""

    tokenizer: str | None = None
    """Tokenizer folder or name, where it is not the model's."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
