"""Run each MLP over a part of the tokens at a time.

Saves: what an MLP keeps between its projections, all but its input, and what it holds while it runs: 4 to 6 times its inner
width for each token, divided by the number of tiles. Costs: the MLP's forward once more, or nothing more with gradient
checkpointing, which makes it again anyway (``ops.tiled``).

For MLPs that are known to treat every token alone (``layer_parts.gated_mlp``); experts behind a router and others
that might mix tokens are refused.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.ops.tiled import Function, tiled
from oomless.techniques import in_flight
from oomless.techniques.checkpointing import decoder_layers
from oomless.techniques.layer_parts import gated_mlp


def applies(model: Any) -> bool:
    """Return whether ``apply`` can cut every layer of ``model``."""
    layers = decoder_layers(model)
    return bool(layers) and all(any(gated_mlp(module) for module in layer.modules()) for layer in layers)


def apply(model: Any, tiles: int) -> None:
    """Cut the work of every MLP of ``model`` into ``tiles``; call after ``layer_parts.replace``.

    Raises:
        ConfigError: a layer has no MLP that is known to treat every token alone, or there are no layers.
    """
    layers = decoder_layers(model)
    for layer in layers:
        found = [module for module in layer.modules() if gated_mlp(module) is not None]
        for module in found:
            module.forward = _Tiles(module, tiles, model)
        if not found:
            raise ConfigError(
                f"mlp_tiles is for MLPs that treat every token alone; {type(layer).__name__} has none that is known to: "
                "remove it"
            )
    if not layers:
        raise ConfigError(f"mlp_tiles has no effect: {type(model).__name__} has no layers that are known; remove it")


class _Tiles:
    """The forward of one MLP of ``model``."""

    def __init__(self, module: nn.Module, tiles: int, model: Any) -> None:
        # They hold this: strong references would keep all from dying.
        self.module, self.model = weakref.ref(module), weakref.ref(model)
        self.parts = gated_mlp(module)
        self.own: Function | None = vars(module).get("forward")
        self.tiles = tiles
        dropouts = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.p > 0]
        self.dropout = bool(dropouts)
        for part in dropouts:  # a tile is no block: masks are ordinary ones (block_dropout)
            vars(part).pop("forward", None)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module()
        assert module is not None
        function = self.own or partial(type(module).forward, module)
        return tiled(
            function,
            module,
            x,
            tiles=self.tiles,
            destination="final",
            preserve_rng_state=self.dropout and module.training,
            alike=not in_flight.has_any(self.model()),
        )
