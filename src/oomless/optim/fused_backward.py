"""Updates inside the backward pass: each gradient is used and freed as soon as it is complete.

The gradients of a whole model (2 or 4 bytes a parameter) never exist together; at most those of a few layers do. The idea
is that of LOMO (Lv et al., 2023) and of torch's tutorial on optimizer steps in the backward pass.

What it costs in freedom:

- **Accumulation** over several micro-batches must keep the sum somewhere, so it brings the gradients back: only the last
  micro-batch's backward, inside ``updating``, adds its own and updates. Peak memory is then that of the ordinary step, minus
  what the last backward frees on its way.
- **Clipping by the global norm** is impossible: the norm is known only after the last gradient, when the first has been
  applied. Adafactor clips each update by itself.
- **Overflow** is judged for each parameter: one whose gradient has an infinity or NaN is not updated, the others are.
  ``finish`` says whether there was one, so that the loss scale can still be lowered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oomless.optim.base import MemoryLeanOptimizer
from oomless.optim.gradients import global_gradient_norm


class FusedBackward:
    """Attach ``optimizer``, any of this package, to the backward passes inside ``updating``.

    After each of them call ``finish`` instead of ``optimizer.step``. ``complete`` is given each gradient before it is used, to add in
    place what other processes have of it.
    """

    def __init__(
        self, optimizer: MemoryLeanOptimizer, complete: Callable[[Tensor], object] = lambda gradient: None
    ) -> None:
        self.optimizer, self._complete = optimizer, complete
        self._gradient_scale: Tensor | None = None
        self._updating = self._changes_nothing = False
        self._updated: set[Tensor] = set()
        self._norm: Tensor | None = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), number))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not self._updating:
            return
        if parameter in self._updated:
            raise RuntimeError(
                "a parameter got a second gradient since the last FusedBackward.finish(); call finish() after each "
                "backward pass inside updating(), and use non-reentrant checkpointing"
            )
        gradient = parameter.grad
        assert gradient is not None
        self._complete(gradient)
        norm = global_gradient_norm([parameter], slice_bytes=self.optimizer.slice_bytes)
        self._norm = norm if self._norm is None else torch.hypot(self._norm, norm)
        found_inf = torch.ones_like(norm) if self._changes_nothing else _not_finite(norm)
        self.optimizer.step_parameter(
            parameter, gradient, group, gradient_scale=self._gradient_scale, found_inf=found_inf
        )
        parameter.grad = None
        self._updated.add(parameter)

    @contextmanager
    def updating(self, gradient_scale: Tensor | None = None, *, changes_nothing: bool = False) -> Iterator[None]:
        """Inside, a parameter is updated as soon as backward has its gradient; for the last micro-batch of a step.

        ``gradient_scale``, a 0-dim fp32 tensor, multiplies every gradient as it is read (1 / loss scale). With
        ``changes_nothing`` updates are made as after an overflow: all of their work, and no change.
        """
        self._updating, self._gradient_scale, self._changes_nothing = True, gradient_scale, changes_nothing
        try:
            yield
        finally:
            self._updating, self._gradient_scale = False, None

    def finish(self) -> tuple[Tensor, Tensor]:
        """End an optimizer step; return the norm of all its gradients, and 1 where it is not finite, else 0 (0-dim, fp32).

        Raises:
            RuntimeError: nothing was updated since the last call.
        """
        norm, self._norm = self._norm, None
        if norm is None:
            raise RuntimeError("no parameter was updated: run a backward pass inside updating() before finish()")
        self._updated.clear()
        # No gradient is left to apply; this tells learning-rate schedulers that a step was made.
        self.optimizer.step()
        return norm, _not_finite(norm)

    def abandon(self) -> None:
        """Forget a backward pass that failed; the caller sees to the weights that it had updated."""
        self._norm = None
        self._updated.clear()

    def detach(self) -> None:
        """Take the hooks off; afterwards ``optimizer.step`` works as usual. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(owner: weakref.ref[FusedBackward], number: int) -> Any:
    """Return what a parameter of group ``number`` does with its gradient.

    What a parameter's hook holds is never collected as garbage, so it must not hold the parameters.
    """

    def update(parameter: Tensor) -> None:
        fused = owner()
        if fused is not None:
            fused._update(parameter, fused.optimizer.param_groups[number])

    return update


def _not_finite(norm: Tensor) -> Tensor:
    return norm.isfinite().logical_not().float()
