"""What every optimizer here shares.

*State exists from the start.* It is allocated when the optimizer is made, not in the first step, so a run that does not
fit fails before it has trained, and the second step needs no more than the first.

*Nothing waits for the device.* The factor that unscales and clips gradients, and the flag that says they overflowed,
are 0-dim tensors that the update kernels read; where the flag is set they change nothing.

*Temporaries are bounded.* An update never allocates a second tensor of the size of the embedding: what must be
converted is converted a slice at a time. Slices are whole vectors of the CPU's kernels, whose scalar tails round
differently, so that the size of a slice changes no result.

A 16-bit parameter keeps an fp32 master copy in the state (``master``): a typical update is far below what 16 bits can
add to a weight. The master is what the optimizer updates; the parameter is rounded from it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SLICE_BYTES = 64 << 20
VECTOR_ELEMENTS = 64


class MemoryLeanOptimizer(Optimizer):
    """Base of the optimizers: holds state, slices 16-bit parameters and hands fp32 slices to ``update``.

    ``slice_bytes`` is the most that one step allocates for the fp32 copy of 16-bit gradients (at least 256).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any], slice_bytes: int = SLICE_BYTES
    ) -> None:
        self.slice_elements = max(1, slice_bytes // 4 // VECTOR_ELEMENTS) * VECTOR_ELEMENTS
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            state = {"step": torch.zeros((), device=parameter.device)}
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().to(torch.float32)
            state |= {name: torch.zeros_like(parameter, dtype=torch.float32) for name in self.buffers()}
            self.state[parameter] = state

    @abstractmethod
    def buffers(self) -> tuple[str, ...]:
        """Names of the fp32 state tensors of a parameter's shape."""

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        buffers: list[Tensor],
        step: Tensor,
        group: dict[str, Any],
        inverse_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update fp32 ``weight`` and ``buffers`` in place from ``gradient`` / ``inverse_scale``, all of one shape."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, *, gradient_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient; what the gradients hold afterwards is undefined.

        Args:
            gradient_scale: 0-dim fp32 on the device; multiplies the gradients.
            found_inf: 0-dim fp32 on the device; where it is 1 the step changes nothing.
        """
        inverse = None if gradient_scale is None else 1 / gradient_scale
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group, inverse, found_inf)

    def _step_parameter(
        self, parameter: nn.Parameter, group: dict[str, Any], inverse: Tensor | None, found_inf: Tensor | None
    ) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        buffers = [state[name] for name in self.buffers()]
        if "master" not in state:
            self.update(parameter.detach(), parameter.grad, buffers, state["step"].clone(), group, inverse, found_inf)
        else:
            flat = [t.view(-1) for t in (parameter.detach(), parameter.grad, state["master"], *buffers)]
            for start in range(0, parameter.numel(), self.slice_elements):
                weight, gradient, master, *parts = (t[start : start + self.slice_elements] for t in flat)
                self.update(master, gradient.float(), parts, state["step"].clone(), group, inverse, found_inf)
                weight.copy_(master)
        state["step"] += 1 if found_inf is None else 1 - found_inf

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of ``parameter`` by name."""
        return dict(self.state[parameter])

    def load_state_tensors(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Fill the state of ``parameter`` from what ``state_tensors`` returned.

        Raises:
            ValueError: names, shapes or dtypes differ, so the tensors are another optimizer's.
        """
        state = self.state[parameter]
        own, given = ({n: (tuple(t.shape), t.dtype) for n, t in sorted(ts.items())} for ts in (state, tensors))
        if own != given:
            raise ValueError(f"the tensors of this optimizer's state must be {own}; got {given}")
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: PyTorch's would round the fp32 state to the dtype of its parameter.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("fp32 state must stay fp32; use load_state_tensors for each parameter")


def global_gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together: 0-dim, fp32, accumulated in fp32; on CUDA without any copy."""
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients are multiplied by so that their global norm is at most ``max_norm``: 0-dim, at most 1."""
    coefficient: Tensor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return coefficient
