"""Weights that lie elsewhere and come to the device for a product, the next one while one is used.

Which is next is what came next the time before, at the same place of the same layer's forward or backward; so a first pass fetches
nothing ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import _C, Tensor, nn

from oomless.techniques import in_flight
from oomless.techniques.kinds import layer_of

Coming = tuple[Tensor, Callable[[], None]]
"""A tensor on the device, and what is to be called before it is read."""

_LONGEST_VISIT = 1 << 10


class Fetched:
    """Brings weights of ``model`` to the device, the next one while one is used.

    Args:
        model: in whose layers the weights are used.
        fetch: begins to bring the weight of a module.
        across_layers: whether the next may be of another layer.
    """

    def __init__(self, model: nn.Module, fetch: Callable[[Any], Coming], *, across_layers: bool) -> None:
        self._model, self._fetch, self._across_layers = weakref.ref(model), fetch, across_layers
        self._layers: dict[int, str] = {}
        self._after: dict[tuple[bool, str, int], weakref.ref[nn.Module]] = {}
        self._place = (False, "", 0)
        """Whether backward has begun, the layer, and how many weights it has used since."""

        self._coming: tuple[nn.Module, Coming] | None = None
        in_flight.note(model, self.clear, lambda: None if self._coming is None else self._coming[1][0])

    def take(self, user: nn.Module) -> Tensor:
        """Return the weight of ``user`` on the device, and begin to fetch the one that came after it the last time."""
        if self._coming is not None and self._coming[0] is not user:
            self._drop()
        (_, (weight, wait)), self._coming = self._coming or (user, self._fetch(user)), None
        wait()
        self._after[self._place] = weakref.ref(user)
        self._place = self._next_place(user)
        following = self._after.get(self._place)
        expected = None if following is None else following()
        if expected is not None and (self._across_layers or self._layer(expected) == self._place[1]):
            self._coming = (expected, self._fetch(expected))
        return weight

    def clear(self) -> None:
        """Let go of what is on the device, as after a step that was cut short; the next one comes by as the first did."""
        with suppress(RuntimeError):  # what comes from other processes may not: one of them let go of it first
            self._drop()
        self._coming = None
        self._after.clear()
        self._place = (False, "", 0)

    def _next_place(self, user: nn.Module) -> tuple[bool, str, int]:
        visit = (_C._current_graph_task_id() != -1, self._layer(user))
        used = self._place[2] if self._place[:2] == visit and self._place[2] < _LONGEST_VISIT else 0
        return *visit, used + 1

    def _layer(self, user: nn.Module) -> str:
        model = self._model()
        if model is not None and not self._layers:
            self._layers = {id(module): layer_of(name) for name, module in model.named_modules()}
        return self._layers[id(user)]

    def _drop(self) -> None:
        if self._coming is not None:
            _, (_, wait) = self._coming
            wait()
            self._coming = None
