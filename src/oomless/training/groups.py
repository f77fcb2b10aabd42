"""The groups in which the processes of a run talk, made anew in place after one of them ran out of memory inside a step.

Two groups: the first moves weights and gradients (NCCL on GPUs, gloo on CPUs); the second, gloo on every machine, is for
decisions of the host, and waits for days where the first would take a process for hung: the first process may be tokenising,
or writing a checkpoint. Of several machines a third, of the first process of each, moves files.

A process that gives an attempt up says so in torchrun's store and ends its connections. So the others, wherever they wait for it,
get an error; those that compute get it at their next collective or micro-batch. The store tells it from a process that died. Then all meet
under a new prefix of the store. NCCL's collectives are aborted, as they may lie on the GPU unfinished. gloo closes a
connection when nothing refers to its group any more: so nobody keeps a group, all ask the mesh for it, which knows it by name, and
the names are the same in each attempt.
"""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer is given up: some process hangs."""

PATIENCE = timedelta(days=7)
"""So long may one process prepare or write while the others wait."""

FAILURES = "oomless/failures"
"""Where the store counts the processes that ended with an error."""


class Groups:
    """The groups of this attempt, on devices of ``device_type``; the processes meet where one is made.

    ``local_rank`` is this process's place among the ``count`` on its own machine, which follow each other.
    """

    def __init__(self, device_type: str, count: int, local_rank: int) -> None:
        self.backend = "nccl" if device_type == "cuda" else "gloo"
        self.attempt = 0
        self._device_type, self._count = device_type, count
        dist.init_process_group(self.backend, timeout=COLLECTIVE_TIMEOUT)
        self.rank = dist.get_rank()
        self._store = dist.distributed_c10d._get_default_store()
        self.control: dist.ProcessGroup | None = None
        self.between: dist.ProcessGroup | None = None
        self._local_rank = local_rank
        self.firsts: tuple[int, ...] = ()
        """Of each process the first on its machine."""

        self.mesh = self._complete()

    def _complete(self) -> DeviceMesh:
        """Make what there is beside the first group, always in the same order, so that the names are those of the attempt before."""
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not self.firsts:
            self.firsts = tuple(self.tell(self.rank - self._local_rank))
        if len(self.machines) > 1:
            self.between = dist.new_group(list(self.machines), backend="gloo", timeout=PATIENCE)
        return init_device_mesh(self._device_type, (self._count,))

    @property
    def machines(self) -> tuple[int, ...]:
        """The first process of each machine, in order."""
        return tuple(sorted(set(self.firsts)))

    def fail(self) -> bool:
        """Count this process among those that ended with an error, and return whether it is the first."""
        return self._store.add(FAILURES, 1) == 1

    @property
    def _over(self) -> str:
        return f"oomless/over/{self.attempt}"

    def is_over(self) -> bool:
        """Return whether some process gave this attempt up."""
        try:
            return bool(self._store.check([self._over]))
        except RuntimeError:  # the store is gone, and who kept it
            return False

    def check(self) -> None:
        """Let a process that computes know what it would learn at its next collective, which may be far.

        Raises:
            RuntimeError: some process gave this attempt up, or torchrun has ended where the store is.
        """
        if self._store.check([self._over]):
            raise RuntimeError("another process gave the step up")

    def leave(self) -> None:
        """Give this attempt up: from now on every collective of the others with this process fails, and none is in flight here."""
        self._store.set(self._over, "")
        self.control = self.between = None
        getattr(self.mesh, "_pg_registry", {}).clear()  # where torch.compile would look groups up
        with _disable_current_modes():
            dist.distributed_c10d._abort_process_group()
        gc.collect()

    def meet(self) -> None:
        """Meet the others, which left the same attempt, in new groups.

        Raises:
            RuntimeError: one of them ended with an error, or is not there in time.
        """
        self.attempt += 1
        place, give_up_at = f"oomless/met/{self.attempt}", time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
        self._store.add(place, 1)
        while self._store.add(place, 0) < self._count:
            if self._store.add(FAILURES, 0) or time.monotonic() > give_up_at:
                raise RuntimeError("TCPStore: another process did not come back after one had run out of memory")
            time.sleep(0.005)
        with _disable_current_modes():
            dist.init_process_group(
                self.backend,
                store=PrefixStore(f"oomless/attempt/{self.attempt}", self._store),
                rank=self.rank,
                world_size=self._count,
                timeout=COLLECTIVE_TIMEOUT,
            )
            self._complete()

    def tell(self, what: Any) -> list[Any]:
        """Return what every process says, by rank, where this one says ``what``."""
        told: list[Any] = [None] * self._count
        with _disable_current_modes():
            dist.all_gather_object(told, what, group=self.control)
        return told
