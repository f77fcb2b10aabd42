"""``oomless plan``: does this training fit that GPU, and what fills it?

The answer comes from one rehearsal without a limit, and, where what it reserves is more than the GPU has, from a second
one at the GPU's own size: the allocator then gives cached memory back before it fails, as the real one does, and either
gets through or shows where the run would stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oomless.config import TrainConfig
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.device import Category
from oomless.memory.profile import MemoryProfile, Request
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import ModelSpec
from oomless.ops.attention import Kernel
from oomless.planning.rehearse import UNLIMITED_BYTES, Rehearsal, rehearse, virtual_device

FIXED: tuple[Category, ...] = ("weights", "gradients", "optimizer state")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The GPU that a plan is for."""

    name: str
    capacity_bytes: int
    """What CUDA reports as total."""

    outside_bytes: int
    """What the context and libraries take of it."""

    workspace_bytes: int
    """What cuBLAS takes from the allocator."""

    compute_capability: tuple[int, int]
    kernel: Kernel | None = None
    """The attention kernel; by default the one that this compute capability gets from PyTorch."""

    notes: tuple[str, ...] = ()
    """Where these figures come from, and how sure they are."""

    @property
    def usable_bytes(self) -> int:
        """What the caching allocator can have."""
        return self.capacity_bytes - self.outside_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a training needs, against what a GPU has."""

    model: str
    target: Target
    fits: bool
    profile: MemoryProfile
    """Of the run as it would go on this GPU where it fits, else as it would go without a limit."""

    stopped_at: Request | None
    """The request that the GPU could not serve; ``None`` where everything fits."""

    out_of_memory: str | None
    """PyTorch's message at that request."""

    parameters: int
    trainable_parameters: int
    device: VirtualGPU
    """What was rehearsed on, for a snapshot."""

    @property
    def needed_bytes(self) -> int:
        """The most that the allocator reserves."""
        return self.profile.peak_reserved_bytes

    @property
    def headroom_bytes(self) -> int:
        """What is left of the usable memory at the peak; negative where the run does not fit."""
        return self.target.usable_bytes - self.needed_bytes

    @property
    def fixed_bytes(self) -> int:
        """What no smaller batch and no shorter sequence changes: weights, all gradients and optimizer state."""
        timeline = self.profile.timeline.bytes_by_category
        return sum(max(timeline[category], default=0) for category in FIXED)

    @property
    def batch_cannot_help(self) -> bool:
        """Whether weights, gradients and optimizer state alone exceed the GPU."""
        return not self.fits and self.fixed_bytes > self.target.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the timeline is left to its own file."""
        profile = self.profile.to_dict()
        del profile["timeline"]
        return {
            "model": self.model,
            "gpu": self.target.name,
            "fits": self.fits,
            "capacity_bytes": self.target.capacity_bytes,
            "outside_bytes": self.target.outside_bytes,
            "usable_bytes": self.target.usable_bytes,
            "needed_bytes": self.needed_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fixed_bytes": self.fixed_bytes,
            "batch_cannot_help": self.batch_cannot_help,
            "out_of_memory": self.out_of_memory,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "notes": list(self.target.notes),
            "profile": profile,
        }


def plan(spec: ModelSpec, config: TrainConfig, target: Target, settings: AllocatorSettings | None = None) -> Plan:
    """Rehearse ``config`` with ``spec`` on ``target`` and return what it needs.

    Raises:
        UserError: what is asked for does not fit together; the same as training would say.
    """

    def run(capacity_bytes: int) -> Rehearsal:
        device = virtual_device(
            capacity_bytes,
            name=target.name,
            compute_capability=target.compute_capability,
            outside_bytes=target.outside_bytes,
            settings=settings,
        )
        return rehearse(spec, config, device, kernel=target.kernel, workspace_bytes=target.workspace_bytes)

    free = run(UNLIMITED_BYTES)
    shown, stopped_at, message = free, None, None
    fits = free.profile.peak_reserved_bytes <= target.usable_bytes
    if not fits:
        limited = run(target.capacity_bytes)
        fits, message = limited.out_of_memory is None, limited.out_of_memory
        if fits:
            shown = limited
        else:
            stopped_at = limited.profile.failures[-1] if limited.profile.failures else None
    return Plan(
        model=spec.name,
        target=target,
        fits=fits,
        profile=shown.profile,
        stopped_at=stopped_at,
        out_of_memory=message,
        parameters=free.parameters,
        trainable_parameters=free.trainable_parameters,
        device=shown.device,
    )
