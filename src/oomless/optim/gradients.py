"""The norm of all gradients and its clipping coefficient, left on the device.

``torch.nn.utils.clip_grad_norm_`` computes sixteen-bit norms in sixteen bits, and scales the gradients in
another pass over memory. Here the norm is accumulated in fp32, and clipping is a number that the optimizer
multiplies in as it reads (``step(gradient_scale=...)``): one read of the gradients, no write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from oomless.optim.base import DEFAULT_SLICE_BYTES


@torch.no_grad()
def global_gradient_norm(parameters: Iterable[Tensor], *, slice_bytes: int = DEFAULT_SLICE_BYTES) -> Tensor:
    """Return the 2-norm of all gradients taken as one vector: 0-dim fp32, on the first gradient's device.

    Parameters without a gradient are left out. Sixteen-bit gradients are widened at most ``slice_bytes`` at a
    time.

    Raises:
        ValueError: no parameter has a gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient; run a backward pass first")
    norms = [
        torch.linalg.vector_norm(part, dtype=torch.float32).to(gradients[0].device)
        for gradient in gradients
        for part in _parts(gradient, slice_bytes)
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor, at most 1, that brings ``norm`` down to ``max_norm``: 0-dim fp32."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _parts(gradient: Tensor, slice_bytes: int) -> Iterator[Tensor]:
    if gradient.dtype == torch.float32 or 4 * gradient.numel() <= slice_bytes:
        return iter((gradient,))
    return iter(torch.split(gradient.view(-1), slice_bytes // 4))
