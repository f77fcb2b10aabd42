"""Run a module that treats every token alone over a few tokens at a time, forward and backward.

Replaces ``function(x)`` for an MLP. Ordinary autograd keeps all that lies between its projections: 4 to 6 times the MLP's
inner width for each token. Here only ``x`` is kept; backward computes a tile again, takes its gradients and drops it, so
that one tile's inner numbers exist at a time. Costs one more forward of the module, and none more where gradient
checkpointing makes the layer again and nothing behind the module is kept: ``x`` is saved before the module runs, so
recomputation stops there.

Each parameter gets one gradient for the whole, so hooks on it fire once. The tiles' gradients are summed in its dtype:
in 16 bits one rounding for each tile, as when as many micro-batches are accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from oomless.ops.gradient_buffer import GradientDestination, deliver, take_buffer
from oomless.ops.random_state import random_states, random_states_set
from oomless.ops.repeating import for_each, slices

Function = Callable[[Tensor], Tensor]


def tiled(
    function: Function,
    module: nn.Module,
    x: Tensor,
    *,
    tiles: int,
    destination: GradientDestination = "new",
    preserve_rng_state: bool = False,
    alike: bool = True,
) -> Tensor:
    """Return ``function(x)``: [..., E].

    Args:
        function: from [1, tokens, D] to [1, tokens, E], each token by itself; uses the parameters of ``module`` alone.
        module: whose parameters train.
        x: [..., D].
        tiles: into how many parts the tokens are cut.
        destination: where the gradients of the parameters go; "in_place" is not for this operator.
        preserve_rng_state: compute a tile again with the random numbers of its forward, for a module with dropout.
        alike: all tiles but the first ask for the same, so that a rehearsal need not run each.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return _forward(function, x, tiles, alike)
    work = _Work(function, module, parameters, tiles, destination, preserve_rng_state, alike)
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    work.saved = _Saved.apply(x, anchor)  # type: ignore[no-untyped-call]
    result: Tensor = _Tiled.apply(x, work, *parameters)  # type: ignore[no-untyped-call]
    return result


class _Work:
    """One call: what its backward needs to know."""

    def __init__(
        self,
        function: Function,
        module: nn.Module,
        parameters: list[nn.Parameter],
        tiles: int,
        destination: GradientDestination,
        preserve_rng_state: bool,
        alike: bool,
    ) -> None:
        self.function, self.module, self.parameters, self.tiles = function, module, parameters, tiles
        self.destination, self.preserve_rng_state, self.alike = destination, preserve_rng_state, alike
        self.saved: Any = None
        self.rng_states: list[Tensor] = []


class _Saved(torch.autograd.Function):
    """Saves ``x`` at once, where ``_Tiled`` could do so only after it has run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise AssertionError("nothing is computed from this output")


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, work: _Work, *_parameters: Tensor) -> Tensor:
        ctx.work = work
        if work.preserve_rng_state:
            work.rng_states = random_states(x)
        return _forward(work.function, x, work.tiles, work.alike)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        if work.saved is None:
            raise RuntimeError("the tensors that tiled saved have been freed; run the forward pass again")
        (x,) = work.saved.grad_fn.saved_tensors
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            work.saved = None
        x_rows, gradient_rows = x.reshape(1, -1, x.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1])
        x_gradient = torch.empty_like(x_rows) if ctx.needs_input_grad[0] else None
        stand_ins = [parameter.detach().requires_grad_() for parameter in work.parameters]
        for stand_in, parameter in zip(stand_ins, work.parameters, strict=True):
            stand_in.grad = take_buffer(work.destination, parameter)
        with (
            torch.enable_grad(),
            _stand_in(work.module, work.parameters, stand_ins),
            random_states_set(work.rng_states, x),
        ):

            def go_back(part: slice) -> None:
                tile = x_rows[:, part].detach().requires_grad_(x_gradient is not None)
                torch.autograd.backward(work.function(tile), gradient_rows[:, part])
                if x_gradient is not None:
                    x_gradient[:, part] = tile.grad

            first, *others = _parts(x_rows, work.tiles)
            go_back(first)  # makes the gradients that the others add to
            _do(others, go_back, alike=work.alike)
        gradients = []
        for stand_in, parameter in zip(stand_ins, work.parameters, strict=True):
            whole, stand_in.grad = stand_in.grad, None
            gradients.append(whole if whole is None else deliver(work.destination, parameter, whole))
        return (None if x_gradient is None else x_gradient.view_as(x), None, *gradients)


def _forward(function: Function, x: Tensor, tiles: int, alike: bool) -> Tensor:
    x_rows = x.reshape(1, -1, x.shape[-1])
    first, *others = _parts(x_rows, tiles)
    tile = function(x_rows[:, first])
    result = tile.new_empty(1, x_rows.shape[1], tile.shape[-1])
    result[:, first] = tile
    del tile

    def go_on(part: slice) -> None:
        result[:, part] = function(x_rows[:, part])

    _do(others, go_on, alike=alike)
    return result.view(*x.shape[:-1], -1)


def _do(parts: list[slice], function: Callable[[slice], None], *, alike: bool) -> None:
    if alike:
        for_each(parts, function, object())
    else:
        for part in parts:
            function(part)


def _parts(x_rows: Tensor, tiles: int) -> list[slice]:
    tokens = x_rows.shape[1]
    return slices(tokens, -(-tokens // tiles))


@contextmanager
def _stand_in(module: nn.Module, parameters: Sequence[Tensor], stand_ins: Sequence[Tensor]) -> Iterator[None]:
    """Inside, ``module`` computes with ``stand_ins``, whose gradients are no business of the parameters' hooks."""
    by_id = {id(parameter): stand_in for parameter, stand_in in zip(parameters, stand_ins, strict=True)}
    places: list[tuple[dict[str, Any], str]] = [
        (owner._parameters, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if id(parameter) in by_id
    ]
    before = [where[name] for where, name in places]
    for where, name in places:
        where[name] = by_id[id(where[name])]
    try:
        yield
    finally:
        for (where, name), parameter in zip(places, before, strict=True):
            where[name] = parameter
