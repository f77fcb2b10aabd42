"""A GPU that is not there, on which somebody else's program runs: who uses it is watched, and when it was fullest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from oomless.memory.device import Phase
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.planning.plan import Target
from oomless.programs import cuda, kernels, libraries
from oomless.programs.function_mode import AsIfOnCuda
from oomless.programs.several import Processes
from oomless.programs.stand_ins import StandIns


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the user's own code."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


class Stage:
    """The rehearsed GPU, and what is noted of the program on it.

    Args:
        target: the GPU.
        own: whether a file is the user's own, so that its lines are told.
        limited: whether memory ends where the GPU's does.
        snapshot: keep what a memory snapshot needs.
    """

    def __init__(
        self, target: Target, own: Callable[[str], bool], *, limited: bool = True, snapshot: bool = False
    ) -> None:
        self.gpu = VirtualGPU(
            target.capacity_bytes if limited else 1 << 50,
            name=target.name,
            compute_capability=target.compute_capability,
            outside_bytes=target.outside_bytes,
            record_history=True,
            snapshot_history=snapshot,
        )
        self.target, self.own = target, own
        self.stand_ins = StandIns(self.gpu, target.workspace_bytes, self._asked)
        self.processes = Processes(target.gpus, self._label_bucket, self.stand_ins, target.machines)
        self.mode = AsIfOnCuda(self.stand_ins, self.gpu)
        self.steps = 0
        self.after_step: Callable[[], None] = lambda: None
        self.highest_line: Line | None = None
        self._highest_bytes = 0
        self._depth = 0
        self._watched: nn.Module | None = None
        self._phases = ExitStack()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the GPU be there, as far as Python code can see."""
        with ExitStack() as stack:
            changes = (
                cuda.changes(self.gpu, self.processes.of_machine) + self.mode.changes() + self.mode.casting.changes()
            )
            changes += libraries.changes(self.stand_ins) + kernels.changes(self.stand_ins)
            stack.enter_context(cuda.patched(changes))
            stack.enter_context(self.processes.active())
            stack.enter_context(self.mode)
            stack.enter_context(self.stand_ins)
            for handle in (
                nn.modules.module.register_module_forward_pre_hook(self._module_started),
                nn.modules.module.register_module_forward_hook(self._module_ended, always_call=True),
                register_optimizer_step_pre_hook(self._step_started),
                register_optimizer_step_post_hook(self._step_ended),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self._phases)
            self._enter("load")
            yield

    # What the program does

    def _enter(self, phase: Phase) -> None:
        self._phases.close()
        self._phases.enter_context(self.gpu.phase(phase))

    def _module_started(self, module: nn.Module, inputs: Any) -> None:
        if self._depth == 0 and not self.mode.in_backward:
            self._enter("forward" if module.training else "evaluation")
            known = self._watched is not None and any(module is part for part in self._watched.modules())
            if not known and any(self.stand_ins.is_on_gpu(parameter) for parameter in module.parameters()):
                self._watched = module
                self.gpu.watch(module)
        self._depth += 1

    def _module_ended(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def _step_started(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._enter("optimizer")

    def _step_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        states = optimizer.state.values()
        tensors = [
            v for state in states if isinstance(state, dict) for v in state.values() if hasattr(v, "untyped_storage")
        ]
        self.gpu.label(tensors, "optimizer state")
        self._enter("other")
        self._depth = 0
        self.steps += 1
        self.after_step()

    def _label_bucket(self, bucket: Tensor) -> None:
        self.gpu.label([bucket], "gradients")

    def _asked(self) -> None:
        """Note the user's line where memory was never fuller; called after each allocation on the GPU."""
        now = self.gpu.allocator.statistics.allocated_bytes
        if now > self._highest_bytes:
            self._highest_bytes = now
            self.highest_line = self.line()

    def line(self, frame: Any = None) -> Line | None:
        """Return the innermost line of the user's own code that runs, or that runs in ``frame``."""
        frame = frame or sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if self.own(name):
                return Line(file=Path(name).name, number=frame.f_lineno, function=frame.f_code.co_name)
            frame = frame.f_back
        return None
