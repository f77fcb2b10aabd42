"""The exceptions of oomless.

    OomlessError
    ├── UserError              what the user gave cannot work: one message, exit code 2, no traceback
    │   ├── ConfigError        an unknown, malformed or contradictory option
    │   ├── HardwareError      a GPU that is not there, not known, or cannot do what is asked
    │   ├── ModelError         a model or tokenizer that cannot be read or does not fit together
    │   │   └── UnplannableError   a model whose own code fails in a rehearsal, whatever the settings
    │   ├── DataError          text that cannot be found, read or decoded; a damaged token cache
    │   └── CheckpointError    a checkpoint or run folder that cannot be written, read or resumed
    └── TrainingError          the run itself went wrong; it is stopped rather than continued silently
        ├── AuditError         a parameter trains that should not, or does not that should
        ├── GradientOverflowError  fp16 gradients stay non-finite; names the module
        └── HostMemoryError    the host's memory nears its end

Every message says the rule, what was got, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OomlessError(Exception):
    """Base of every exception that oomless raises on purpose."""

    told: bool | None = None
    """Of several processes that end together, whether another one says why; ``None`` where each came to it by itself."""


class UserError(OomlessError):
    """What the user gave cannot work; shown as one message without a traceback, exit code 2."""


class ConfigError(UserError):
    """An unknown, malformed or contradictory option; ``settings`` are those that contradict."""

    def __init__(self, message: str = "", *settings: str) -> None:
        super().__init__(message)
        self.settings = settings


class HardwareError(UserError):
    """A GPU that is not there, not known, or cannot do what is asked of it."""


class ModelError(UserError):
    """A model or tokenizer that cannot be read or does not fit together."""


class UnplannableError(ModelError):
    """A model whose own code fails in a rehearsal, whatever the settings; training may still do."""


class DataError(UserError):
    """Text that cannot be found, read or decoded, or a damaged token cache."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be written, read or resumed."""


class TrainingError(OomlessError):
    """The run itself went wrong and was stopped rather than continued silently."""


class AuditError(TrainingError):
    """A parameter trains that should not, or does not train that should."""


class GradientOverflowError(TrainingError):
    """Gradients in fp16 stay non-finite at the smallest loss scale; the message names the module."""


class HostMemoryError(TrainingError):
    """The host's memory nears its end; the run was stopped before the kernel would kill it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    by_folded_name = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(by_folded_name), n=1, cutoff=0.5)
    return f" Did you mean '{by_folded_name[close[0]]}'?" if close else ""
