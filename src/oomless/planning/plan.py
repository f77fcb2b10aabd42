"""``oomless plan``: does this training fit that GPU, and what fills it?

The answer comes from a rehearsal at the GPU's own size, where the allocator gives cached memory back before it fails, as the
real one does, and either gets through or shows where the run would stop; what it would have needed then comes from a second
one without a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from oomless import hardware
from oomless.catalogue import Gpu, Network, assumed_network, overhead
from oomless.config import TrainConfig
from oomless.errors import ConfigError, HardwareError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.device import Category
from oomless.memory.profile import MemoryProfile, Request
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.memory.work import Work
from oomless.models.spec import ModelSpec, resolve, resolve_for_plan
from oomless.ops.attention import Kernel
from oomless.planning.layout import Layout, read_layout, with_new_tokens
from oomless.planning.rehearse import UNLIMITED_BYTES, Rehearsal, rehearse, rehearse_briefly, virtual_device
from oomless.techniques.sharding import shared
from oomless.training import rates
from oomless.training.assemble import open_device
from oomless.training.distributed import local_world_size, machine_count, world_size
from oomless.training.life import total_steps
from oomless.units import GiB, format_bytes, format_rate

FIXED: tuple[Category, ...] = ("weights", "gradients", "optimizer state")
MARGIN = 0.02
"""Share of a real GPU's memory that a search leaves free: kernels take some for themselves while they run."""

HOST_SHARE = 0.8
"""Share of the host's memory that a search may fill by offloading; the system and the process itself need the rest."""

ASSUMED_HOST_BYTES = 12 * GiB
"""Host memory beside a GPU that is only named, where none is given: about what free notebooks have."""


TOKEN_BYTES = 8

MOST_TOKENS = 1 << 19
"""A pass of more that does not fit is not rehearsed to its end, which takes minutes: what it needs is told as at least so much."""

LARGEST_TENSOR_BYTES = 64 * GiB
"""Nor is what stops at a larger tensor, which no model has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The GPU that a plan is for."""

    name: str
    capacity_bytes: int
    """What CUDA reports as total, of one GPU where there are several."""

    outside_bytes: int
    """What the context and libraries take of it."""

    workspace_bytes: int
    """What cuBLAS takes from the allocator."""

    compute_capability: tuple[int, int]
    gpus: int = 1
    """How many train one model together, each with its part of it; what fits is told for each."""

    machines: int = 1
    """On how many machines they are, as many on each."""

    network_bytes_per_s: float | None = None
    """Peak rate of a machine's network in one direction; ``None`` where there is one machine, or it is not known."""

    gpu: Gpu | None = None
    """Its entry in the catalogue, for its rates; ``None`` for a size or a virtual GPU."""

    kernel: Kernel | None = None
    """The attention kernel; by default the one that this compute capability gets from PyTorch."""

    margin_bytes: int = 0
    """What a search leaves free, because the figures are not exact."""

    host_bytes: int | None = None
    """What may lie in host memory; ``None`` where it is not known to end."""

    notes: tuple[str, ...] = ()
    """Where these figures come from, and how sure they are."""

    @property
    def gpus_of_machine(self) -> int:
        """How many of the GPUs are on one machine."""
        return self.gpus // self.machines

    @property
    def usable_bytes(self) -> int:
        """What the caching allocator can have."""
        return self.capacity_bytes - self.outside_bytes

    def simulated(
        self,
        capacity_bytes: int,
        *,
        settings: AllocatorSettings | None = None,
        snapshot: bool = False,
    ) -> VirtualGPU:
        """Return this GPU to rehearse on, with so much memory; see ``virtual_device``."""
        return virtual_device(
            capacity_bytes,
            name=self.name,
            compute_capability=self.compute_capability,
            outside_bytes=self.outside_bytes,
            settings=settings,
            snapshot=snapshot,
        )


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
    work: Work | None
    """What a step computes and moves."""

    rates: str = ""
    """How fast the run learns, for a person."""

    whole: bool = True
    """Whether the profile is of all that a step asks for; else it ends at what could not be served, and more is needed."""

    device: VirtualGPU | None = None
    """What was rehearsed on, for a snapshot; ``None`` where another process did."""

    @property
    def needed_bytes(self) -> int:
        """The most that the allocator reserves; where the profile is not ``whole``, at least."""
        stopped_bytes = self.stopped_at.segment_bytes if self.stopped_at is not None and not self.whole else 0
        return self.profile.peak_reserved_bytes + stopped_bytes

    @property
    def headroom_bytes(self) -> int:
        """What is left of the usable memory at the peak; negative where the run does not fit."""
        return self.target.usable_bytes - self.needed_bytes

    @property
    def cached_bytes(self) -> int:
        """What the allocator holds at the peak and no tensor uses."""
        return self.needed_bytes - self.profile.peak_allocated_bytes

    @property
    def fixed_bytes(self) -> int:
        """What no smaller batch and no shorter sequence changes: weights, all gradients and optimizer state; or of these at least."""
        timeline = self.profile.timeline.bytes_by_category
        stopped = self.stopped_at if not self.whole else None
        begun = "forward" in self.profile.phases
        more_bytes = 0 if stopped is None or begun else stopped.size_bytes
        return sum(max(timeline[category], default=0) for category in FIXED) + more_bytes

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
            "gpus": self.target.gpus,
            "machines": self.target.machines,
            "network_bytes_per_s": self.target.network_bytes_per_s,
            "fits": self.fits,
            "capacity_bytes": self.target.capacity_bytes,
            "outside_bytes": self.target.outside_bytes,
            "usable_bytes": self.target.usable_bytes,
            "needed_bytes": self.needed_bytes,
            "needed_at_least": not self.whole,
            "headroom_bytes": self.headroom_bytes,
            "fixed_bytes": self.fixed_bytes,
            "batch_cannot_help": self.batch_cannot_help,
            "out_of_memory": self.out_of_memory,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "notes": list(self.target.notes),
            "rates": self.rates,
            "profile": profile,
        }


def targets_for(
    texts: Sequence[str], host_bytes: int | None = None, network_bytes_per_s: float | None = None
) -> list[Target]:
    """Return what each of ``texts`` names, as ``target_for`` does.

    Raises:
        ConfigError: a network is given, and none of them are several machines.
        HardwareError: as ``target_for``.
    """
    found = [target_for(text, host_bytes, network_bytes_per_s) for text in texts]
    if network_bytes_per_s is not None and all(target.machines == 1 for target in found):
        raise ConfigError(
            f"--network is of several machines; got it for {', '.join(texts)}, where it has no effect: leave it out, or give machines x GPUs, "
            "as in --gpu 2x8xH100"
        )
    return found


def target_for(text: str, host_bytes: int | None = None, network_bytes_per_s: float | None = None) -> Target:
    """Return the GPU that ``text`` names: the catalogue's (T4), a size (24GiB), virtual:256MiB, or auto for the one here.

    A count before it (2xT4) means several that train together, two counts (2x8xH100) several machines with so many each; of those
    that are here, as many as torchrun has started processes.

    ``host_bytes`` is the memory of each machine; by default what is free here, or ``ASSUMED_HOST_BYTES`` beside a GPU that is
    only named. ``network_bytes_per_s`` is what connects them, where there are several; by default the catalogue's assumption.

    Raises:
        HardwareError: it names none, or there is none here.
    """
    if text.startswith("virtual:"):
        device = open_device(text)
        return Target(
            name=text,
            capacity_bytes=device.capacity_bytes or 0,
            outside_bytes=0,
            workspace_bytes=0,
            compute_capability=device.compute_capability or (8, 0),
            gpus=world_size(),
            kernel="auto",
            host_bytes=usable_host_bytes(hardware.available_host_bytes() if host_bytes is None else host_bytes),
        )
    found = hardware.resolve(text)
    if found is None:
        raise HardwareError(
            "a plan is for a GPU and none is here: name one, such as --gpu T4, RTX4090, A100-40G or 24GiB"
        )
    if found.detected:
        found = replace(found, count=world_size(), machines=machine_count())
    workspace = overhead("cublas workspace", found.gpu)
    notes = [f"memory of {found.gpu.name}: {found.gpu.usable_source}"]
    for item in found.outside_allocator:
        low, high = format_bytes(item.bytes_low), format_bytes(item.bytes_high)
        notes.append(
            f"{item.name} outside the allocator: {format_bytes(item.bytes_expected)} ({low} to {high}); {item.source}"
        )
    host = host_bytes
    if host is None:
        host = hardware.available_host_bytes() if found.detected else ASSUMED_HOST_BYTES
    margin_bytes = found.capacity_bytes - found.capacity_low_bytes + int(MARGIN * found.capacity_bytes)
    if found.count > 1:
        notes.append(
            f"sizes are those of each of the {found.count} GPUs, rehearsed on one stream: on CUDA gathered weights have a pool of their "
            "own, which was not measured"
        )
    network: Network | None = None
    if found.machines > 1:
        network = assumed_network(found.gpu, found.count // found.machines)
        if network_bytes_per_s is not None:
            network = Network(bytes_per_s=network_bytes_per_s, source="given")
        notes.append(f"network of each machine: {format_rate(network.bytes_per_s)}, {network.source}")
    notes.append(
        f"a search leaves {format_bytes(margin_bytes)} free: {MARGIN:.0%} for what kernels take for themselves, and the range of "
        f"what lies outside; of {format_bytes(host)} of {'each' if found.machines > 1 else 'the'} host's memory{' (assumed)' if host_bytes is None and not found.detected else ''} it "
        f"uses {HOST_SHARE:.0%} at most"
    )
    return Target(
        name=str(found),
        margin_bytes=margin_bytes,
        host_bytes=usable_host_bytes(host) // (local_world_size() if found.detected else found.count // found.machines),
        gpus=found.count,
        machines=found.machines,
        network_bytes_per_s=None if network is None else network.bytes_per_s,
        capacity_bytes=found.gpu.usable_bytes,
        outside_bytes=sum(item.bytes_expected for item in found.outside_allocator),
        workspace_bytes=workspace.bytes_expected if workspace is not None else 0,
        compute_capability=found.gpu.capability or (8, 0),
        gpu=found.gpu,
        notes=tuple(notes),
    )


def usable_host_bytes(host_bytes: int) -> int:
    """Return how much of a machine's memory may be filled."""
    return int(HOST_SHARE * host_bytes)


def plan(
    spec: ModelSpec,
    config: TrainConfig,
    target: Target,
    settings: AllocatorSettings | None = None,
    *,
    snapshot: bool = False,
    layout: Layout | None = None,
) -> Plan:
    """Rehearse ``config`` with ``spec`` on ``target`` and return what it needs; ``snapshot`` keeps what one is made of.

    ``layout`` says how its text lies in blocks; see ``rehearse``.

    Raises:
        UserError: what is asked for does not fit together; the same as training would say.
    """
    config = shared(config, target.gpus)
    require_tokens(config, target)
    how: dict[str, Any] = {"settings": settings, "snapshot": snapshot, "layout": layout}
    found = rehearse_on(target, spec, config, target.capacity_bytes, **how)
    if found.out_of_memory is None:
        return plan_of(spec, target, found)
    tokens = config.per_device_train_batch_size * config.max_seq_length
    largest_bytes = max((failure.size_bytes for failure in found.profile.failures), default=0)
    if tokens > MOST_TOKENS or largest_bytes > LARGEST_TENSOR_BYTES:
        return plan_of(spec, target, found, stopped=found)
    return plan_of(spec, target, rehearse_on(target, spec, config, UNLIMITED_BYTES, **how), stopped=found)


def plan_of(spec: ModelSpec, target: Target, found: Rehearsal, *, stopped: Rehearsal | None = None) -> Plan:
    """Return the plan that ``found`` is; it may have gone on without a limit where the GPU's own memory ``stopped`` another."""
    failures = () if stopped is None else stopped.profile.failures
    return Plan(
        model=spec.name,
        target=target,
        fits=stopped is None,
        profile=found.profile,
        stopped_at=failures[-1] if failures else None,
        out_of_memory=None if stopped is None else stopped.out_of_memory,
        parameters=found.parameters,
        trainable_parameters=found.trainable_parameters,
        work=found.work,
        whole=found is not stopped,
        device=found.device,
    )


def rehearse_on(
    target: Target,
    spec: ModelSpec,
    config: TrainConfig,
    capacity_bytes: int,
    settings: AllocatorSettings | None = None,
    *,
    snapshot: bool = False,
    layout: Layout | None = None,
) -> Rehearsal:
    """Rehearse the whole run of ``config``, each process's settings where there are several, on ``target`` with so much memory."""
    how: dict[str, Any] = {
        "kernel": target.kernel,
        "workspace_bytes": target.workspace_bytes,
        "gpus": target.gpus,
        "layout": layout,
    }
    open_device = partial(target.simulated, capacity_bytes, settings=settings, snapshot=snapshot)
    if snapshot:  # which names the module of everything
        return rehearse(spec, config, open_device(), **how)
    return rehearse_briefly(spec, config, open_device, **how)


def require_tokens(config: TrainConfig, target: Target) -> None:
    """Check that the tokens of a pass fit, which is asked before so many are made.

    Raises:
        ConfigError: their ids alone do not.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        blocks, length = getattr(config, name), config.max_seq_length
        if blocks * length * TOKEN_BYTES > target.usable_bytes:
            raise ConfigError(
                f"the ids of {blocks} x {length} tokens alone take {format_bytes(blocks * length * TOKEN_BYTES)} of the "
                f"{format_bytes(target.usable_bytes)} that {target.name} has: lower {name} or max_seq_length",
                *(name, "max_seq_length"),
            )


def require_host(length: int, target: Target) -> None:
    """Check that the tokens of one block of ``length`` may lie in the host's memory, where each run makes them.

    Raises:
        ConfigError: they may not, so that nothing can be trained.
    """
    if target.host_bytes is not None and length * TOKEN_BYTES > target.host_bytes:
        raise ConfigError(
            f"the ids of one block of {length} tokens alone take {format_bytes(length * TOKEN_BYTES)} of host memory, of which "
            f"{format_bytes(target.host_bytes)} may be used: give more with --host-memory, such as 12GiB",
            "max_seq_length",
        )


def plan_training(config: TrainConfig, *, network_bytes_per_s: float | None = None, snapshot: bool = False) -> Plan:
    """Return the plan of ``config`` for the GPU that it names; model and GPU may both be the catalogue's.

    ``network_bytes_per_s`` is what connects several machines; see ``target_for``.

    Raises:
        UserError: model, GPU or settings do not fit together.
    """
    spec = resolve_for_plan(config.model, trust_remote_code=config.trust_remote_code)
    target = targets_for([config.gpu], None, network_bytes_per_s)[0]
    return _plan_of_text(spec, config, target, snapshot=snapshot)


def predict(config: TrainConfig) -> Plan | None:
    """Return the plan of a training that is about to start here; ``None`` on a plain CPU, which has no such limit."""
    device = open_device(config.gpu)
    if device.capacity_bytes is None:
        return None
    spec = resolve(config.model, trust_remote_code=config.trust_remote_code)
    target = target_for(config.gpu if config.gpu.startswith("virtual:") else "auto")
    return _plan_of_text(spec, config, target)


def _plan_of_text(spec: ModelSpec, config: TrainConfig, target: Target, *, snapshot: bool = False) -> Plan:
    with with_new_tokens(spec, config.to_dict()) as (grown, settings):
        extended = TrainConfig.from_mapping(settings)
        layout = read_layout(extended)
        found = plan(grown, extended, target, snapshot=snapshot, layout=layout)
        own = shared(extended, target.gpus)
        steps = total_steps(own, None if layout is None else layout.blocks_per_epoch, target.gpus)
        return replace(found, rates=rates.said(own, grown.config, steps))
