"""Several processes that train one model: who this one is, and what all of them have to agree on.

``torchrun`` starts one process for each GPU and says in the environment which is which. What each holds and computes of the model is
``techniques/sharding.py``; here is what goes around it. The groups in which they talk are those of ``groups.py``.

Whatever a process decides alone (a signal, a disk that is full) it tells the others before anyone acts on it, because a process
that goes its own way leaves the others waiting in a collective. One that runs out of memory inside a step leaves them there, and
all meet again (``guard.py``). A process that dies closes its connections, and the others end where they use them next (gloo), or
torchrun ends them (NCCL). Whichever fails first says why, and the others are silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from oomless.data.loader import MicroBatch
from oomless.data.pack import IGNORED
from oomless.errors import CheckpointError, ConfigError, DataError, OomlessError, TrainingError
from oomless.training.groups import Groups

_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Broken pipe", "TCPStore")
Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes of a run, and which this one is; by default the only one, for which everything here is free."""

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    """The processes as FSDP takes them; ``None`` for one alone."""

    groups: Groups | None = None
    """Those in which they talk; ``None`` where there are no others, or where they only pretend."""

    writers: tuple[int, ...] = (0,)
    """Those that write a run folder: the first of all, and the first on each machine that does not see its folder."""

    writer: int = 0
    """Which of them writes the folder that this process sees."""

    @property
    def control(self) -> dist.ProcessGroup | None:
        """Their group for decisions of the host."""
        return None if self.groups is None else self.groups.control

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes to the run folder that it sees."""
        return self.rank == self.writer

    @property
    def machines(self) -> int:
        """On how many machines the processes are."""
        return 1 if self.groups is None else len(self.groups.machines)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of ``items``, which is as long as every other's."""
        each = len(items) // self.count
        return items[self.rank * each : (self.rank + 1) * each]

    def share_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield every ``count``-th of ``batches``; as many and as large in every process, where need be with what predicts nothing."""
        while group := list(islice(batches, self.count)):
            nothing = replace(group[0], labels=torch.full_like(group[0].labels, IGNORED), target_count=0)
            yield _filled_up(group[self.rank], nothing) if self.rank < len(group) else nothing

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up ``tensor``, which lies on the device, over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of ``parameters``, which every process holds whole, over all processes, in place."""
        if self.count == 1:
            return
        reached = self.any_of([parameter.grad is not None for parameter in parameters])
        for parameter, anywhere in zip(parameters, reached, strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.sum(parameter.grad)

    def sum_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return the sums of ``counts``, int64 on the host, over all processes."""
        if self.groups is None:
            return counts
        with _disable_current_modes():
            summed = torch.from_numpy(counts.copy())
            dist.all_reduce(summed, group=self.control)
        return summed.numpy()

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any process has it set."""
        if self.groups is None:
            return list(flags)
        with _disable_current_modes():
            agreed = torch.tensor(flags, dtype=torch.uint8)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in agreed.tolist()]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any process."""
        return self.any_of([flag])[0]

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Return what ``function`` gives the first process, in all of them; what it raises there, all raise."""
        return self._from(0, function)

    def from_writer(self, function: Callable[[], Result]) -> Result:
        """Return what ``function`` gives the process that writes this one's run folder; what it raises in any, all raise."""
        return self._from(self.writer, function)

    def from_machine(self, function: Callable[[], Result]) -> Result:
        """Return what ``function`` gives the first process on this machine; what it raises in any, all raise."""
        return self._from(0 if self.groups is None else self.groups.firsts[self.rank], function)

    def _from(self, one: int, function: Callable[[], Result]) -> Result:
        if self.groups is None:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == one:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        told = self.groups.tell(outcome)
        for _, failure in told:
            if failure is not None:
                raise failure
        result: Result = told[one][0]
        return result

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Go on after the body, which reads text, only where it could in every process.

        Raises:
            DataError: the text changed, for this process or for another.
        """
        failure: DataError | None = None
        try:
            yield
        except DataError as error:
            failure = error
        if self.any(failure is not None):
            raise failure or DataError("the text changed for another process")

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Go on after the body only where it succeeded in every process; a collective inside it would not.

        Raises:
            CheckpointError: it failed in another process.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.groups is not None:
            told = self.groups.tell(None if failure is None else str(failure))
            others = [f"process {rank}: {text}" for rank, text in enumerate(told) if text and rank != self.rank]
            if failure is None and others:
                raise CheckpointError(f"{what} failed in another process ({'; '.join(others)})")
        if failure is not None:
            raise failure


def _filled_up(batch: MicroBatch, other: MicroBatch) -> MicroBatch:
    """Return ``batch`` with as many blocks as ``other``, which predicts nothing, has, the last of them taken from there."""
    there = len(batch.input_ids)
    if there == len(other.input_ids):
        return batch

    def filled_up(own: Tensor, others: Tensor) -> Tensor:
        return torch.cat([own, others[there:]])

    return replace(
        batch,
        input_ids=filled_up(batch.input_ids, other.input_ids),
        labels=filled_up(batch.labels, other.labels),
        position_ids=filled_up(batch.position_ids, other.position_ids),
        document_lengths=(*batch.document_lengths, *other.document_lengths[there:]),
    )


ALONE = Ranks()


class RanOut(torch.OutOfMemoryError):
    """One process ran out of memory with the least that can be tried; all of them raise this, together."""

    def __init__(self, rank: int, count: int, text: str) -> None:
        super().__init__(_ran_out(rank, count, text) + ", with the least that can be tried")


def _ran_out(rank: int, count: int, text: str) -> str:
    return f"process {rank} of {count} ran out of memory ({(text.splitlines() or [''])[0][:200]})"


def environment(name: str, default: int) -> int:
    """Return a number that torchrun sets.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(
            f"{name} is set by torchrun to a whole number; got {text!r}: start with torchrun, or unset it"
        )
    return int(text)


def world_size() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return max(1, environment("WORLD_SIZE", 1))


def machine_count() -> int:
    """Return on how many machines torchrun has started them."""
    return max(1, environment("GROUP_WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return how many processes torchrun has started on this machine."""
    return max(1, environment("LOCAL_WORLD_SIZE", world_size()))


_MET: list[Ranks] = []
"""The processes that this one trains with, while they are joined."""


@contextmanager
def joined(device_type: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started; alone where there are none. Within it they stay together.

    An error that passes through here is marked (``OomlessError.told``) in all processes but the one that it reaches first.

    Raises:
        TrainingError: they cannot be reached, one of them is lost later on, or this one ran out of memory.
    """
    count = world_size()
    if count == 1:
        yield ALONE
        return
    if _MET:  # the runs of a run in stages: to part and to meet again would leave old addresses in the way
        yield _MET[-1]
        return
    groups: Groups | None = None
    try:
        groups = Groups(device_type, count, environment("LOCAL_RANK", 0))
        _MET.append(Ranks(rank=groups.rank, count=count, mesh=groups.mesh, groups=groups))
        try:
            yield _MET[-1]
        finally:
            _MET.clear()
    except Exception as error:
        explained, first = _explained(error, count), groups is None or _is_first_failure(groups)
        if isinstance(explained, OomlessError):
            explained.told = not first
        if explained is error:
            raise
        raise explained from error
    dist.destroy_process_group()


def _explained(error: Exception, count: int) -> Exception:
    first_line = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, torch.OutOfMemoryError):
        said = str(error) if isinstance(error, RanOut) else _ran_out(environment("RANK", 0), count, first_line)
        return TrainingError(
            f"{said}, and all end. The last checkpoint is whole. `oomless plan` with the GPUs' number, as in --gpu 2xT4, names "
            "settings that fit; what leaves a step as it is may be changed with --resume"
        )
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER):
        return TrainingError(
            f"another of the {count} processes ended or cannot be reached, so process {environment('RANK', 0)} stops. The last "
            f"checkpoint is whole: go on with --resume{', on every machine' if machine_count() > 1 else ''} ({first_line})"
        )
    return error


def _is_first_failure(groups: Groups) -> bool:
    """Return whether no other process has failed before this one, which torchrun's own store remembers."""
    try:
        return groups.fail()
    except RuntimeError:  # torchrun is gone: better said twice than never
        return True


@contextmanager
def rehearsed(count: int) -> Iterator[Ranks]:
    """Be the first of ``count`` processes of which there are no others: collectives return at once and move nothing.

    Raises:
        ConfigError: this process has joined a real group.
    """
    if count == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise ConfigError("several GPUs are rehearsed before a process joins others, not afterwards")
    import torch.distributed._tools.fake_collectives  # noqa: F401 (registers what they return on fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Ranks(count=count, mesh=init_device_mesh("cpu", (count,)))
    finally:
        dist.destroy_process_group()
