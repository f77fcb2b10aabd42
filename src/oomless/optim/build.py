"""From an optimizer's name in a config to the optimizer; a setting that would have no effect is an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from oomless.errors import nearest
from oomless.optim.adafactor import Adafactor
from oomless.optim.adamw import AdamW
from oomless.optim.adamw_8bit import AdamW8bit
from oomless.optim.base import DEFAULT_SLICE_BYTES, MemoryLeanOptimizer, Parameters
from oomless.optim.muon import Muon
from oomless.optim.offload import HostMemory
from oomless.optim.projected import Apollo, ApolloMini, GaLore
from oomless.optim.sgd import SGD

_CLASSES: dict[str, Callable[..., MemoryLeanOptimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "adafactor": Adafactor,
    "sgd": SGD,
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "galore": GaLore,
    "muon": Muon,
}
NAMES: tuple[str, ...] = tuple(_CLASSES)
"""The names that ``build`` knows."""

_COMMON = {"parameters", "lr", "weight_decay", "weight_precision", "slice_bytes", "seed", "offload"}


def hyperparameters(name: str) -> frozenset[str]:
    """Return the names of the settings that the optimizer takes beyond those that all take.

    Raises:
        ValueError: as ``build``.
    """
    return frozenset(inspect.signature(_class(name)).parameters) - _COMMON


def build(
    name: str,
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    weight_precision: str | None = None,
    slice_bytes: int = DEFAULT_SLICE_BYTES,
    seed: int = 0,
    offload: HostMemory | None = None,
    **settings: Any,
) -> MemoryLeanOptimizer:
    """Return the optimizer called ``name`` over ``parameters`` (tensors, or groups as for torch's
    optimizers).

    ``settings`` are those of the optimizer itself (``betas``, ``eps``, ``momentum`` ...); ``None`` stands for
    its default.

    Raises:
        ValueError: the name is unknown, the optimizer does not use a setting, or a value is out of range.
    """
    optimizer_class = _class(name)
    known = hyperparameters(name)
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in known:
            raise ValueError(
                f"optimizer {name!r} uses {', '.join(sorted(known)) or 'no settings of its own'}; "
                f"got {key!r}, which would have no effect; drop it.{nearest(key, known)}"
            )
    return optimizer_class(
        parameters,
        lr=lr,
        weight_decay=weight_decay,
        weight_precision=weight_precision,
        slice_bytes=slice_bytes,
        seed=seed,
        offload=offload,
        **given,
    )


def _class(name: str) -> Callable[..., MemoryLeanOptimizer]:
    if name not in _CLASSES:
        raise ValueError(f"an optimizer is one of {', '.join(NAMES)}; got {name!r}.{nearest(name, NAMES)}")
    return _CLASSES[name]
