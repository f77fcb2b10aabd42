"""How many tokens a run will read, and so how long it would take: known where the run is given a length, else from its files.

A plan does not tokenise: it is made before the data is on the machine, or in seconds where that would take an hour. Files of plain
text are weighed at ``BYTES_PER_TOKEN``; what is compressed says too little, and then no duration is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from oomless.config import TrainConfig
from oomless.data.files import find_files
from oomless.errors import UserError
from oomless.units import counted

BYTES_PER_TOKEN = (3.0, 5.0)
"""UTF-8 bytes in a token of code and of English prose with today's vocabularies; assumed. Other languages can have fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The tokens of a whole run."""

    tokens_low: int
    tokens_high: int
    basis: str


def tokens_to_read(config: TrainConfig, gpus: int = 1) -> Reading | None:
    """Return what the run of ``config`` on ``gpus`` reads; ``None`` where that depends on data that is not here, or whose size says little."""
    step = config.blocks_per_step * config.max_seq_length * gpus
    if config.max_steps is not None:
        tokens = config.max_steps * step
        return Reading(tokens_low=tokens, tokens_high=tokens, basis=counted(config.max_steps, "step"))
    if config.max_tokens is not None:
        tokens = -(-config.max_tokens // step) * step
        return Reading(tokens_low=tokens, tokens_high=tokens, basis="max_tokens")
    try:
        files = [file for source in config.data for file in find_files(source).files]
    except UserError:
        return None
    if any(file.compression or file.kind in ("parquet", "arrow", "ipynb", "pdf", "docx") for file in files):
        return None
    epochs, size_bytes = config.num_train_epochs or 1.0, sum(file.size_bytes for file in files)
    epochs /= 1 - (config.replay or 0.0)  # what is replayed comes beside them
    fewest, most = BYTES_PER_TOKEN
    return Reading(
        tokens_low=max(step, int(epochs * size_bytes / most)),
        tokens_high=max(step, int(epochs * size_bytes / fewest)),
        basis=f"{counted(len(files), 'file')} at {fewest:g} to {most:g} bytes a token, assumed",
    )
