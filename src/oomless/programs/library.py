"""``oomless.rehearsal``: the rehearsal of a training loop of one's own, in this very process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oomless.memory.profile import MemoryProfile
from oomless.planning.plan import target_for
from oomless.programs.child import owner_of
from oomless.programs.stage import Stage


class Rehearsed:
    """The GPU inside ``with oomless.rehearsal(...)``, and afterwards what was found."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    @property
    def profile(self) -> MemoryProfile:
        """What was held so far, when, and for what."""
        return self._stage.gpu.profile()

    @property
    def needed_bytes(self) -> int:
        """The most that the allocator reserved so far."""
        return self._stage.gpu.usage().peak_reserved_bytes

    @property
    def line(self) -> str:
        """The line of your own code at which most was allocated; empty where it was none."""
        return str(self._stage.highest_line or "")


@contextmanager
def rehearsal(gpu: str, *, own: str | None = None) -> Iterator[Rehearsed]:
    """Let ``cuda`` be the named GPU inside, without a GPU: tensors on it have sizes and no values, and memory ends where its does.

    Models are to be made inside, and put on the device ``cuda``. While it lasts, torch and transformers are patched in this
    process (``programs/cuda.py`` lists where); after it they are as before.

    Args:
        gpu: a name from the catalogue (``T4``), or a size (``24GiB``). Of several (``2xT4``, or ``2x8xH100`` on two machines) it
            is the first, and this the first of as many processes.
        own: the folder whose lines are told; by default that of the file which calls.

    Raises:
        HardwareError: no such GPU is known.
        torch.OutOfMemoryError: inside, where the GPU's memory ends, with the message that PyTorch would give.

    Example:
        >>> import torch, oomless
        >>> with oomless.rehearsal("T4") as gpu:
        ...     model = torch.nn.Linear(1024, 1024, device="cuda")
        ...     model(torch.ones(8, 1024, device="cuda")).sum().backward()
        >>> gpu.needed_bytes < 100 * 2**20
        True
    """
    target = target_for(gpu)
    folder = Path(own or sys._getframe(2).f_code.co_filename).resolve()
    stage = Stage(target, owner_of(folder if folder.is_dir() else folder.parent))
    with stage.active():
        yield Rehearsed(stage)
