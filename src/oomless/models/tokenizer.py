"""The tokenizer of a model, tried before it is trusted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from oomless.config import adapter
from oomless.errors import ModelError

_TRIED = "Tried: 12 words, \u00e9, \u4e16\u754c, \U0001f600.\n\tAnd a second line."


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the fast tokenizer in a folder or under a Hugging Face name; it has encoded and decoded a text.

    Raises:
        ModelError: there is none, or it cannot be read or does not work.
    """
    from transformers import AutoTokenizer

    adapted = adapter.folder_of(name)
    if adapted is not None and not (adapted / "tokenizer_config.json").is_file():
        name = adapter.base_of(adapted)
    _check_merges(Path(name).expanduser() / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if tokenizer.is_fast:
            tokenizer.decode(tokenizer(_TRIED)["input_ids"])
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # every class raises its own, and a panic of the library is no Exception
        raise ModelError(
            f"no tokenizer could be read from {name!r}: give the folder or name of one with --tokenizer ({str(error).strip()})"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"oomless needs a fast tokenizer (tokenizer.json); {name!r} has only a Python one")
    return tokenizer


def _check_merges(file: Path) -> None:
    """Refuse merges whose second parts lack ``continuing_subword_prefix``: the library cuts as many bytes, and may end the process."""
    said = file.read_bytes() if file.is_file() else b""
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', said):
        return
    try:
        model = json.loads(said)["model"]
        prefix: str = model["continuing_subword_prefix"]
        seconds = [merge.split(" ")[-1] if isinstance(merge, str) else merge[1] for merge in model.get("merges", [])]
        other = next((second for second in seconds if not second.startswith(prefix)), None)
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # the library refuses it by itself
    if other is not None:
        raise ModelError(
            f"{file} says that what goes on a word begins with {prefix!r} (continuing_subword_prefix), and merges {other!r}, which "
            "does not: set it to null, or give another tokenizer with --tokenizer"
        )
