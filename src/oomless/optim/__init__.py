"""Optimizers for training under a hard memory limit; ``docs/optimizers.md`` compares them."""

from oomless.optim.adafactor import Adafactor
from oomless.optim.adamw import AdamW
from oomless.optim.adamw_8bit import AdamW8bit
from oomless.optim.base import DEFAULT_SLICE_BYTES, MemoryLeanOptimizer
from oomless.optim.build import NAMES, build
from oomless.optim.fused_backward import FusedBackward
from oomless.optim.gradients import clip_coefficient, global_gradient_norm
from oomless.optim.muon import Muon
from oomless.optim.projected import Apollo, ApolloMini, GaLore
from oomless.optim.sgd import SGD

__all__ = [
    "DEFAULT_SLICE_BYTES",
    "NAMES",
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Apollo",
    "ApolloMini",
    "FusedBackward",
    "GaLore",
    "MemoryLeanOptimizer",
    "Muon",
    "build",
    "clip_coefficient",
    "global_gradient_norm",
]
