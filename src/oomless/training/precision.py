"""Which numbers a run computes in, and the loss scale that fp16 needs.

fp16 reaches down to 6e-8 only, so gradients vanish unless the loss is multiplied up first. The scale is dynamic: halved
when a gradient overflows (that step changes nothing), doubled after a while without. Scale and decision stay on the
device; the host never waits for them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from oomless.config import Precision
from oomless.errors import GradientOverflowError, HardwareError
from oomless.memory.device import Device

GROWTH_STEPS = 200
START_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(precision: Precision, device: Device) -> torch.dtype:
    """Return the dtype of weights and arithmetic on ``device``.

    Raises:
        HardwareError: bf16 is asked of a GPU that cannot do it.
    """
    capability = device.compute_capability
    if precision == "auto":
        if capability is None:
            return torch.float32
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    if precision == "bf16" and capability is not None and capability < (8, 0):
        raise HardwareError(
            f"bf16 needs compute capability 8.0; {device.name} has {capability[0]}.{capability[1]}: use dtype fp16 or fp32"
        )
    return DTYPES[precision]


class LossScale:
    """The dynamic loss scale; 1 and unchanging unless ``dtype`` is fp16."""

    def __init__(self, dtype: torch.dtype, device: Device) -> None:
        self.dynamic = dtype == torch.float16
        start = START_SCALE if self.dynamic else 1.0
        self.scale = torch.full((), start, device=device.torch_device)
        self.steps_since_overflow = torch.zeros((), device=device.torch_device)

    def update(self, found_inf: Tensor) -> None:
        """Move the scale by whether this step's gradients overflowed; ``found_inf`` is a 0-dim tensor, 0 or 1."""
        if not self.dynamic:
            return
        overflowed = found_inf > 0
        steps = torch.where(overflowed, 0.0, self.steps_since_overflow + 1)
        grown = torch.where(steps >= GROWTH_STEPS, self.scale * 2, self.scale)
        self.scale.copy_(torch.where(overflowed, self.scale / 2, grown))
        self.steps_since_overflow.copy_(torch.where(steps >= GROWTH_STEPS, 0.0, steps))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint keeps."""
        return {"scale": self.scale, "steps_since_overflow": self.steps_since_overflow}


def explain_overflow(model: Any, run_forward_backward: Any) -> GradientOverflowError:
    """Run one forward and backward with hooks and return an error that names where numbers stop being finite."""
    first: list[str] = []

    def watch(name: str, where: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not first and any(isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
                first.append(f"the {where} of {name}")

        return hook

    handles = []
    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(watch(name, "output")))
            handles.append(module.register_full_backward_hook(watch(name, "gradient")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an embedding's inputs have no gradient to hook
            run_forward_backward()
    finally:
        for handle in handles:
            handle.remove()
    where = first[0] if first else "the gradient of a weight"
    return GradientOverflowError(
        f"fp16 overflows even at a loss scale of {SMALLEST_SCALE}: first in {where}. Use dtype bf16 on a GPU that has it "
        "(compute capability 8.0), else fp32, or lower learning_rate if this began in the middle of the run."
    )
