"""The trainability audit: what was asked to train does, and nothing else does.

Before step 1 every trainable parameter must be in exactly one group of the optimizer. After the first steps each must
have got a gradient and have moved, and no other may have. Movement is seen by a checksum (the sum of the tensor's bits
as integers), so the audit keeps no copy of any weight. A parameter may need a few steps to move: LoRA's first matrix
has no gradient until the second has moved, an expert none until a token is sent to it, and fp16 skips steps that
overflow. A small parameter that is rounded by chance may rest for as long as a warmup takes, so it is asked for a gradient
only. One that rests although the optimizer has updated it gets updates that its dtype is too coarse for: that is said, and
ends the run only where nothing else moves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oomless.errors import AuditError
from oomless.memory.device import Device
from oomless.techniques import sharding
from oomless.units import counted

PATIENCE_STEPS = 5
SURE_TO_MOVE_ELEMENTS = 1 << 20
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class TrainabilityAudit:
    """Watches the first steps of a run; ``after_step`` returns ``True`` when it has seen all it needs."""

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        device: Device,
        say: Callable[[str], None] = print,
        any_of: Callable[[Sequence[bool]], Sequence[bool]] = tuple,
    ) -> None:
        """Look at what ``model`` on ``device`` is now; ``any_of`` tells what any process saw, where each holds a part of all."""
        self.device, self.say = device, say
        self.named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        self.any_of = any_of
        self.optimizer = optimizer
        self.steps = 0
        self._check_groups()
        self.before = {name: self._checksum(parameter) for name, parameter in self.named}
        self.without_gradient = {name for name, parameter in self.named if parameter.requires_grad}
        self.watched = self.without_gradient - self._moved_by_chance()
        self.unmoved = set(self.watched)
        self._hooks = [
            # Not a method: what a parameter's hook holds is never collected as garbage, and would hold the parameters.
            parameter.register_post_accumulate_grad_hook(partial(_got_gradient, self.without_gradient, name))  # type: ignore[no-untyped-call]
            for name, parameter in self.named
            if parameter.requires_grad
        ]

    def _check_groups(self) -> None:
        times: dict[int, int] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                times[id(parameter)] = times.get(id(parameter), 0) + 1
        for name, parameter in self.named:
            expected = 1 if parameter.requires_grad else 0
            found = times.get(id(sharding.local(parameter)), 0)
            if found != expected:
                raise AuditError(f"{name} must be in {expected} of the optimizer's groups; it is in {found}")

    def _moved_by_chance(self) -> set[str]:
        """Return the parameters that are rounded stochastically and too small for some element to move in a few steps."""
        groups = (group for group in self.optimizer.param_groups if group.get("weight_precision") == "stochastic")
        rounded = {id(parameter) for group in groups for parameter in group["params"]}
        return {
            name
            for name, parameter in self.named
            if id(parameter) in rounded and parameter.numel() < SURE_TO_MOVE_ELEMENTS
        }

    def _checksum(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return checksums of all that a small update may move: the weight, its fp32 master, its 8 bits of correction."""
        part = sharding.local(parameter)
        state = self.optimizer.state.get(part, {})
        sums: list[int] = []
        for tensor in (*(state[name] for name in ("master", "correction") if name in state), part):
            once = partial(_add_checksum, sums, tensor, self.device)
            self.device.repeating(("checksum", tensor.shape, tensor.dtype), once)
        return tuple(sums)

    def after_step(self) -> bool:
        """Compare every parameter with its start.

        Raises:
            AuditError: a frozen parameter moved, a trainable one has no gradient or no update, or none has moved in time.
        """
        if self.without_gradient and not self.device.fake:
            raise AuditError(_report("should train but have no gradient", self.without_gradient))
        # May run out of memory, and be asked again.
        seen = self.any_of([self._checksum(parameter) != self.before[name] for name, parameter in self.named])
        if self.device.fake:
            return False  # nothing has a value, and layers that are repeated have no gradients of their own
        self.steps += 1
        moved = {name for (name, _), moves in zip(self.named, seen, strict=True) if moves}
        frozen = {name for name, parameter in self.named if not parameter.requires_grad}
        if moved & frozen:
            raise AuditError(_report("should be frozen but moved", moved & frozen))
        self.unmoved -= moved
        if self.unmoved and self.steps < PATIENCE_STEPS:
            return False
        if self.unmoved:
            self._judge_rest()
        for hook in self._hooks:
            hook.remove()
        return True

    def _judge_rest(self) -> None:
        """Say why parameters rest.

        Raises:
            AuditError: they get no updates, or nothing else moves.
        """
        resting = {name: sharding.local(parameter) for name, parameter in self.named if name in self.unmoved}
        idle = {name for name, part in resting.items() if not float(self.optimizer.state[part]["step"])}
        if idle:
            raise AuditError(_report(f"should train but got no update in {self.steps} steps", idle))
        if resting.keys() == self.watched:
            raise AuditError(
                f"the run was stopped: no parameter moved in {self.steps} steps; raise learning_rate, or choose a finer "
                "weight_precision or dtype"
            )
        self.say(
            f"{_listed(self.unmoved)} did not move in {self.steps} steps: the updates are 0 or too small for their dtype. The "
            "run goes on; to train them too raise learning_rate, or choose a finer weight_precision or dtype"
        )


def _got_gradient(without_gradient: set[str], name: str, parameter: Tensor) -> None:
    without_gradient.discard(name)


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor's bits, read as integers of its width: 0-dim."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def _add_checksum(sums: list[int], tensor: Tensor, device: Device) -> None:
    sums.append(device.number(checksum(tensor)))


def _report(what: str, names: Collection[str]) -> str:
    return f"the run was stopped: {counted(len(names), 'parameter')} {what}: {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more
