"""Updates inside the backward pass: each gradient is used and freed as soon as it is complete.

The gradients of a whole model (2 or 4 bytes a parameter) never exist together; at most those of a few layers
do. The idea is that of LOMO (Lv et al., 2023) and of torch's tutorial on optimizer steps in the backward
pass.

What it costs in freedom:

- **Accumulation** over several micro-batches must keep the sum somewhere, so it brings the gradients back:
  all but the last micro-batch run inside ``with fused.accumulate():``, where gradients add up as usual; the
  last one adds its own and updates. Peak memory is then that of the ordinary step, minus what the last
  backward frees on its way.
- **Clipping by the global norm** is refused: the norm is known only after the last gradient, when the first
  has been applied. Use an optimizer whose updates are bounded by themselves (Adafactor clips each update)
  instead.
- **Overflow** in fp16 is judged per parameter: a parameter whose gradient has an infinity or NaN is not
  updated, the others are. ``finish`` returns the flag, so that the loss scale can still be lowered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oomless.optim.base import MemoryLeanOptimizer
from oomless.optim.gradients import nonfinite_gradients


class FusedBackward:
    """Attach ``optimizer`` to the backward pass; after each pass call ``finish`` instead of
    ``optimizer.step``.

    Args:
        optimizer: any optimizer of this package.
        check_overflow: look for infinities and NaN in each gradient, for fp16.
        max_gradient_norm: must stay None; there so that a config's setting can be passed and refused.

    Raises:
        ValueError: ``max_gradient_norm`` is set.
    """

    def __init__(
        self,
        optimizer: MemoryLeanOptimizer,
        *,
        check_overflow: bool = False,
        max_gradient_norm: float | None = None,
    ) -> None:
        if max_gradient_norm is not None:
            raise ValueError(
                "clipping by the global norm cannot be fused into the backward pass: it is known only after "
                f"the first gradients have been applied; got max_gradient_norm={max_gradient_norm}; "
                "drop it or do not fuse"
            )
        self.optimizer = optimizer
        self.gradient_scale: Tensor | None = None
        """Multiplies every gradient as it is read (1 / loss scale); set it before the backward pass."""
        self._check_overflow = check_overflow
        self._accumulating = False
        self._updated: set[Tensor] = set()
        self._found_inf: Tensor | None = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(group))
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def _hook(self, group: dict[str, Any]) -> Any:
        def update(parameter: Tensor) -> None:
            if self._accumulating:
                return
            if parameter in self._updated:
                raise RuntimeError(
                    "a parameter got a second gradient since the last FusedBackward.finish(); call finish() "
                    "after each backward pass, run all but the last micro-batch inside accumulate(), and use "
                    "non-reentrant checkpointing"
                )
            gradient = parameter.grad
            assert gradient is not None
            found_inf = self._judge(gradient) if self._check_overflow else None
            self.optimizer.step_parameter(
                parameter, gradient, group, gradient_scale=self.gradient_scale, found_inf=found_inf
            )
            parameter.grad = None
            self._updated.add(parameter)

        return update

    def _judge(self, gradient: Tensor) -> Tensor:
        found_inf = nonfinite_gradients([gradient], slice_bytes=self.optimizer.slice_bytes)
        self._found_inf = found_inf if self._found_inf is None else torch.maximum(self._found_inf, found_inf)
        return found_inf

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward passes add to ``.grad`` and update nothing: for all but the last micro-batch."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def finish(self) -> Tensor | None:
        """End an optimizer step. Returns the overflow flag (0-dim fp32), None where it is not checked."""
        self._updated.clear()
        # No gradient is left to apply; this tells learning-rate schedulers that a step was made.
        self.optimizer.step()
        found_inf, self._found_inf = self._found_inf, None
        return found_inf

    def detach(self) -> None:
        """Take the hooks off; afterwards ``optimizer.step`` works as usual. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
