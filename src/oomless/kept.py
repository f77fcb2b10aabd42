"""What is kept between runs in the user's cache folder: small results, each under a key of all that it rests on.

A folder has a bound: beyond it the results that were not used for longest go. Several processes may read, write and clear it
at once: a result is written beside its place and moved there, and one that is gone or damaged is as if it had not been kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

RESTS_ON = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy", "safetensors")
"""Whose versions decide what a rehearsal finds; that one is missing decides it too."""

MOST_FILES = 4096
"""Of a few KiB each."""


def user_folder() -> Path:
    """Return the package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomless"


def key_of(*facts: Any) -> str:
    """Return the key of what follows from ``facts``, from this package as it is, and from the versions of what it rests on."""
    text = json.dumps([_package(), _versions(), *facts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _package() -> str:
    """Return a digest of the package's own source and data, the catalogue among it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in Path(__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(RESTS_ON)
    for name in RESTS_ON:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Kept:
    """The results in ``folder``, at most about ``most_files``; nothing fails because one cannot be kept."""

    def __init__(self, folder: Path, most_files: int = MOST_FILES) -> None:
        self.folder = folder
        self.most_files = most_files

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the result under ``key``, or ``None``."""
        path = self.folder / f"{key}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            os.utime(path)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep ``result`` under ``key``."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", encoding="utf-8", dir=self.folder, suffix=".new", delete=False) as file:
                file.write(json.dumps(result))
            Path(file.name).replace(self.folder / f"{key}.json")

    def clear_oldest(self) -> None:
        """Remove what is beyond the bound, down to three quarters of it, so that not every search has to."""
        used = []
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):  # another process has removed it
                    used.append((path.stat().st_mtime, path))
        if len(used) > self.most_files:
            for _, path in sorted(used)[: len(used) - self.most_files * 3 // 4]:
                with suppress(OSError):
                    path.unlink()
