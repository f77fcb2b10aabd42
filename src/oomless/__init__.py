"""Train language models on the GPU you have, and do not run out of memory.

Importing this package loads no torch, touches no GPU and sets no variable: public names load when used.

    import oomless

    config = oomless.TrainConfig(model="...", data=(oomless.DataSource(path="..."),), output_dir="...")
    result = oomless.train(config)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomless.config import DataSource, TrainConfig
    from oomless.models.attention import use_packed_attention
    from oomless.planning.choose import choose_training
    from oomless.planning.layers import fewest_checkpointed_layers
    from oomless.programs.library import rehearsal
    from oomless.training.listening import Listener, RunResult
    from oomless.training.loop import train
    from oomless.training.loss import causal_lm_loss

__version__ = "0.1.0.dev0"

_HOMES = {
    "DataSource": "oomless.config",
    "TrainConfig": "oomless.config",
    "Listener": "oomless.training.listening",
    "RunResult": "oomless.training.listening",
    "train": "oomless.training.loop",
    "causal_lm_loss": "oomless.training.loss",
    "choose_training": "oomless.planning.choose",
    "fewest_checkpointed_layers": "oomless.planning.layers",
    "rehearsal": "oomless.programs.library",
    "use_packed_attention": "oomless.models.attention",
}
__all__ = [
    "DataSource",
    "Listener",
    "RunResult",
    "TrainConfig",
    "causal_lm_loss",
    "choose_training",
    "fewest_checkpointed_layers",
    "rehearsal",
    "train",
    "use_packed_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'oomless' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
