"""Where an operator puts the gradient of a parameter: into one buffer, however often the parameter is used.

Autograd wants every backward to *return* a gradient. For a matrix that already has a ``.grad`` (the second micro-batch),
or that is used twice (an embedding tied to its head), this means a second and a third tensor of the matrix's size that
live only to be added. The operators of this room can add into ``parameter.grad`` themselves:

``"new"``       ordinary autograd: a new tensor is returned. Right everywhere.
``"in_place"``  the operator adds into ``parameter.grad``, making it where there is none, and returns nothing. Autograd does
                not count this as a gradient: hooks on the parameter do not fire for this use.
``"final"``     the operator takes the buffer out of ``parameter.grad``, adds into it, and returns that same tensor to
                autograd, which puts it back without a copy, after every other use: hooks fire once, for the whole.

A parameter used once wants ``"final"``. A tied matrix wants ``"in_place"`` where backward comes by first (the head) and
``"final"`` where it comes by last (the embedding). Both add to what ``.grad`` held before, so they are for
``loss.backward()`` alone, never for ``torch.autograd.grad`` or a loss that is scaled afterwards.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

GradientDestination = Literal["new", "in_place", "final"]


def take_buffer(destination: GradientDestination, parameter: Tensor) -> Tensor | None:
    """Return the gradient to add into, taken out of ``parameter``; ``None`` where a new one must be made.

    Raises:
        ValueError: a destination other than "new" for a tensor that has no ``.grad``, because it is not a leaf.
    """
    if destination == "new":
        return None
    if not parameter.is_leaf:
        raise ValueError(f'gradients of a computed tensor are "new"; got {destination!r}: pass the parameter itself')
    buffer, parameter.grad = parameter.grad, None
    return buffer


def deliver(destination: GradientDestination, parameter: Tensor, buffer: Tensor) -> Tensor | None:
    """Return what backward must return for ``parameter``, whose finished gradient is ``buffer``."""
    if destination == "in_place":
        parameter.grad = buffer
        return None
    return buffer
