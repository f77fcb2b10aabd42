"""A run on several machines: whether they see one run folder or each its own, and what has to be the same on all.

What is on a machine is found out where the run begins, by a mark in the folder, and no setting says it. Of a folder that all see the
first process is the writer, as on one machine. Where a machine does not see it, its first process writes there all that the first one
writes here (``exchange.py``).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.config.data import SOURCES
from oomless.data.prepare import PreparedData
from oomless.errors import CheckpointError, ConfigError
from oomless.training import checkpoint
from oomless.training.checkpoint import Checkpoint
from oomless.training.distributed import Ranks
from oomless.training.exchange import exchange, whole_files
from oomless.training.run_files import MARKS, METRICS

_PLACES = ("model", "tokenizer", "output_dir", "cache_dir")
"""Settings that say where something lies on a machine; what lies there is compared instead."""


def settled(ranks: Ranks, run: Path, say: Callable[[str], None]) -> Ranks:
    """Return ``ranks`` with who writes to the folder ``run``, which is made: one process of those that see the same; ``say`` is told.

    Raises:
        CheckpointError: it cannot be written.
    """
    groups = ranks.groups
    if groups is None or ranks.machines == 1:
        return ranks
    by_chance = ranks.from_first(lambda: uuid.uuid4().hex)
    marks = {first: run / MARKS.replace("*", f"{by_chance}-{first}") for first in groups.machines}
    own = marks.get(ranks.rank)
    try:
        with ranks.together("the run folder"), checkpoint.clear_disk_errors(f"the run folder {run}"):
            if own is not None:
                run.mkdir(parents=True, exist_ok=True)
                own.touch()
        # Nobody has looked for these names before, so no file system answers from what it remembers.
        writer = ranks.from_machine(lambda: min(first for first, mark in marks.items() if mark.exists()))
        writers = tuple(sorted(set(groups.tell(writer))))
    finally:
        if own is not None:
            own.unlink(missing_ok=True)
    how = "which see one run folder" if len(writers) == 1 else f"with {len(writers)} run folders, each of them whole"
    say(f"{ranks.machines} machines, {how}")
    return replace(ranks, writer=writer, writers=writers)


def require_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Check that all machines train the same; ``facts`` are plain values by what they are called.

    Raises:
        ConfigError: they do not.
    """
    if ranks.machines == 1:
        return
    assert ranks.groups is not None
    told = ranks.groups.tell(dict(facts))
    for rank, theirs in enumerate(told):
        for name in {**told[0], **theirs}:
            one, other = told[0].get(name), theirs.get(name)
            if one != other:
                shown = f" ({one!r} and {other!r})" if len(f"{one!r}{other!r}") < 200 else ""
                raise ConfigError(
                    f"every machine must have the same {name}: the first one and that of process {rank} differ{shown}; give both the same, "
                    "and start again"
                )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that have to be the same on all machines: all but where things lie."""
    return {name: value for name, value in config.to_dict().items() if name not in (*SOURCES, *_PLACES)}


def facts_of(data: PreparedData) -> dict[str, Any]:
    """Return what has to be the same of the text."""
    held_out = {name: (len(blocks), data.bytes_per_token[name]) for name, blocks in data.evaluation.items()}
    return {"text": data.train.fingerprint, "text to evaluate": held_out}


def newest_on_all(
    ranks: Ranks, run: Path, look: Callable[[], Checkpoint | None], say: Callable[[str], None]
) -> Checkpoint | None:
    """Return the newest undamaged checkpoint on any machine, which then lies in the folder ``run`` of all; ``None`` where there is none.

    ``look`` finds the newest in this machine's.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    found = ranks.from_writer(look)
    if ranks.groups is None or len(ranks.writers) == 1:
        return found
    told = ranks.groups.tell(None if found is None else (found.step, checkpoint.stamp(found)))
    newest = max((one for one in told if one is not None), default=None, key=lambda one: one[0])
    if newest is None:
        return None
    newest_one = Checkpoint(folder=run / f"checkpoint-{newest[0]}", step=newest[0])
    missing = [writer for writer in ranks.writers if told[writer] != newest]
    if missing:
        source = told.index(newest)
        with ranks.together(METRICS), checkpoint.clear_disk_errors(str(run / METRICS)):
            if ranks.rank in missing:
                (run / METRICS).unlink(missing_ok=True)
            measured = whole_files(run, METRICS) if ranks.rank == source else ()
            exchange(ranks, run, measured, receives=ranks.rank in missing)
        _bring(ranks, newest_one.folder, source, missing, say)
        with ranks.together(newest_one.folder.name):
            if ranks.rank in missing and (problem := checkpoint.damage(newest_one)):
                raise CheckpointError(f"{newest_one.folder} did not come over whole: {problem}")
    return newest_one


def on_all(ranks: Ranks, folder: Path, say: Callable[[str], None]) -> None:
    """Bring ``folder`` to the machines that do not have it, if any has.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    if ranks.groups is None or len(ranks.writers) == 1:
        return
    there = ranks.groups.tell(folder.is_dir())
    missing = [writer for writer in ranks.writers if not there[writer]]
    if missing and any(there):
        _bring(ranks, folder, there.index(True), missing, say)


def _bring(ranks: Ranks, folder: Path, source: int, missing: Sequence[int], say: Callable[[str], None]) -> None:
    """Bring what lies in ``folder`` on the machine of the process ``source`` to those of the processes ``missing``."""
    say(f"{folder.name} comes from the machine of process {source} to that of process {', '.join(map(str, missing))}")
    receives, beside = ranks.rank in missing, checkpoint.temporary_folder(folder)
    with checkpoint.clear_disk_errors(str(folder)):
        with ranks.together(folder.name):
            if receives:
                checkpoint.delete(beside)
                beside.mkdir(parents=True)
        with ranks.together(folder.name):
            sent = whole_files(folder) if ranks.rank == source else ()
            exchange(ranks, beside if receives else folder, sent, receives=receives)
        with ranks.together(folder.name):
            if receives:
                checkpoint.put_in_place(folder)
