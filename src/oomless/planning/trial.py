"""Short rehearsals for a search: does one candidate fit, what does it need, how much work is it?

A trial plays a run at the capacity that may be used until the heaviest step is known. Where it runs out of memory, so does the
whole run, which begins with the same requests (the probe before them leaves nothing behind); what passes is rehearsed whole before
it is chosen. Trials run in processes of their own
and are kept on disk, by everything that decides them: the model, the settings, the GPU, and the code itself.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from oomless import optim
from oomless.config import TrainConfig
from oomless.errors import UnplannableError, UserError
from oomless.kept import Kept, key_of, user_folder
from oomless.memory.device import Phase
from oomless.memory.profile import MemoryProfile, Request
from oomless.memory.work import Work
from oomless.models.spec import ModelSpec
from oomless.optim.base import MemoryLeanOptimizer
from oomless.optim.offload import SMALLEST_OFFLOADED
from oomless.planning.layout import Layout
from oomless.planning.plan import FIXED, Plan, Target, plan_of, rehearse_on, require_tokens
from oomless.planning.rehearse import UNLIMITED_BYTES, rehearse_briefly, virtual_device
from oomless.planning.strategies import Quality, rungs
from oomless.techniques import cheap_recompute, embeddings_on_host, mlp_tiles
from oomless.techniques.checkpointing import layers_of_backward
from oomless.techniques.experts import stacks_on_device
from oomless.techniques.kinds import is_linear
from oomless.techniques.sharding import is_cut, local, shared
from oomless.training.assemble import assemble
from oomless.training.distributed import rehearsed

Settings = dict[str, Any]
Trainable = tuple[tuple[tuple[int, ...], str, bool], ...]
"""Shape and dtype of each parameter, and whether Muon makes its update orthogonal."""

MANY_MODULES = 100
"""Importing so many takes longer than forks do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one candidate came to."""

    fits: bool
    needed_bytes: int
    """The most that was reserved; where it does not fit, until then."""

    passes_bytes: int = 0
    """The most that was allocated in forward and backward passes."""

    host_bytes: int = 0
    """The most that lay in host memory."""

    held_bytes: dict[str, int] = field(default_factory=dict)
    """Weights, gradients and optimizer state at their largest."""

    stopped_at: dict[str, Any] | None = None
    """The request that could not be served, as a ``Request``'s fields."""

    work: dict[str, Any] | None = None
    """What a step computes and moves, as a ``Work``'s fields; ``None`` where it does not fit."""

    refused: str | None = None
    """Why the settings do not go together, where that is what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a choice of trainable parts and frozen bits puts on the GPU before it trains."""

    weight_bytes: int
    layers: int
    """How many can be checkpointed."""

    trainable: Trainable
    """What trains, in the optimizer's order."""

    trainable_bytes: int
    """Of the weights, those that train: what their gradients take."""

    movable: dict[str, int]
    """Bytes of the weights that each setting for frozen ones would move to the host; without those that would move nothing."""

    cheap_recompute: bool = False
    """Whether the model has parts for it."""

    mlp_tiles: bool = False
    """Whether each layer has an MLP for it."""

    refused: str | None = None

    def __post_init__(self) -> None:
        hashable = tuple((tuple(shape), *others) for shape, *others in self.trainable)  # JSON has made lists of them
        object.__setattr__(self, "trainable", hashable)

    def rungs(self, pins: Settings) -> list[Settings]:
        """Return the ways to keep less for backward that agree with ``pins``; see ``strategies.rungs``."""
        return rungs(pins, self.layers, cheap_recompute=self.cheap_recompute, mlp_tiles=self.mlp_tiles)

    def state_bytes(self, quality: Quality) -> int:
        """Return the bytes of the optimizer's state."""
        return state_bytes(self.trainable, quality.optimizer, quality.weight_precision)[0]

    @property
    def sixteen_bit(self) -> bool:
        """Whether any of what trains has 16 bits."""
        return any(kind != "float32" for _, kind, _ in self.trainable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """The whole run, rehearsed: two steps, an evaluation and a save."""

    fits: bool
    """Below what may be used, the margin taken off."""

    plan: dict[str, Any] | None = None
    """A ``Plan``'s fields that the search does not know already, where it fits."""

    def as_plan(self, setting: Setting) -> Plan:
        """Return the plan."""
        assert self.plan is not None
        profile = MemoryProfile.from_dict(self.plan["profile"])
        work = None if self.plan["work"] is None else Work.from_dict(self.plan["work"])
        known = {"model": setting.spec.name, "target": setting.target, "work": work}
        return Plan(**{**self.plan, **known, "profile": profile})


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all trials of a search share."""

    spec: ModelSpec
    target: Target
    base: Settings
    """The settings that the user gave."""

    layout: Layout | None = None
    """How the text lies in blocks, where it is at hand."""

    def config(self, settings: Settings) -> TrainConfig:
        """Return the run with ``settings``.

        Raises:
            ConfigError: they do not go together.
        """
        config = shared(TrainConfig.from_mapping({**self.base, **settings}), self.target.gpus)
        require_tokens(config, self.target)
        return config


def try_out(setting: Setting, settings: Settings, *, limited: bool = True) -> Trial:
    """Rehearse one step of the run with ``settings`` at the capacity that may be used, or without an end of memory."""
    target = setting.target
    capacity_bytes = target.capacity_bytes - target.margin_bytes if limited else UNLIMITED_BYTES

    try:
        found = rehearse_briefly(
            setting.spec,
            setting.config(settings),
            lambda: target.simulated(capacity_bytes),
            kernel=target.kernel,
            workspace_bytes=target.workspace_bytes,
            whole=False,
            gpus=target.gpus,
            layout=setting.layout,
        )
    except UnplannableError:
        raise  # no other settings help
    except UserError as error:
        return Trial(fits=False, needed_bytes=0, refused=str(error))
    timeline = found.profile.timeline.bytes_by_category
    failures: tuple[Request, ...] = found.profile.failures
    return Trial(
        fits=found.out_of_memory is None,
        needed_bytes=found.profile.peak_reserved_bytes,
        passes_bytes=_most(found.profile, "forward", "loss", "backward"),
        host_bytes=found.device.host_peak_allocated_bytes,
        held_bytes={category: max(timeline[category], default=0) for category in FIXED},
        stopped_at=asdict(failures[-1]) if found.out_of_memory is not None and failures else None,
        work=asdict(found.work) if found.out_of_memory is None and found.work is not None else None,
    )


def _most(profile: MemoryProfile, *phases: Phase) -> int:
    return max((profile.phases[name].allocated_bytes for name in phases if name in profile.phases), default=0)


def prove(setting: Setting, settings: Settings) -> Proof:
    """Rehearse the whole run with ``settings`` in the memory that may be used; that is what the plan says it needs."""
    target, config = setting.target, setting.config(settings)
    usable = target.capacity_bytes - target.margin_bytes
    found = rehearse_on(target, setting.spec, config, usable, layout=setting.layout)
    if found.out_of_memory is not None:
        return Proof(fits=False)
    profile = replace(found.profile, capacity_bytes=target.capacity_bytes)
    whole = plan_of(setting.spec, target, replace(found, profile=profile))
    kept = {one.name: getattr(whole, one.name) for one in fields(Plan)}
    for name in ("model", "target", "device"):
        del kept[name]
    kept["profile"] = whole.profile.to_dict()
    kept["work"] = whole.work and asdict(whole.work)
    return Proof(fits=True, plan=kept)


def measure_parts(setting: Setting, settings: Settings) -> Parts:
    """Build, but do not run, the model with the trainable parts of ``settings``."""
    device = virtual_device(compute_capability=setting.target.compute_capability)
    try:
        config = setting.config(settings)
        with rehearsed(setting.target.gpus) as ranks, device.active():
            built = assemble(setting.spec, config, device, fill=False, ranks=ranks)
            model = built.model
            layers = len(layers_of_backward(model))
            parameters = [local(parameter) for parameter in model.parameters()]
            trained = [(parameter, group) for group in built.optimizer.param_groups for parameter in group["params"]]
    except UserError as error:
        return Parts(weight_bytes=0, layers=0, trainable=(), trainable_bytes=0, movable={}, refused=str(error))
    linear = [module.weight for module in model.modules() if is_linear(module)]
    stacks = list(stacks_on_device(model))
    frozen = {
        "stream_frozen": [*linear, *stacks],
        "experts_on_host": stacks,
        "embeddings_on_host": []
        if config.tied_weights
        else [t.weight for _, t in embeddings_on_host.tables(model, [])],
    }
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*parameters, *model.buffers())}
    return Parts(
        weight_bytes=sum(held.values()),
        layers=layers,
        trainable=tuple(
            (tuple(p.shape), str(p.dtype).removeprefix("torch."), group.get("orthogonalise", False))
            for p, group in trained
            # Whether 8-bit state is made for a part of a vector is told by the whole; a bound may leave it out.
            if setting.target.gpus == 1 or p.ndim > 1
        ),
        trainable_bytes=sum(p.nbytes for p, _ in trained),
        movable={name: size_bytes for name, weights in frozen.items() if (size_bytes := _bytes_of_frozen(weights))},
        cheap_recompute=cheap_recompute.applies(model),
        mlp_tiles=mlp_tiles.applies(model),
    )


def _bytes_of_frozen(weights: Iterable[Any]) -> int:
    """Return what each process has at least of those that do not train, where they are cut by rows or, to lie on the host, by bytes."""
    return sum(
        int(weight.nbytes // (weight.device_mesh.size() if is_cut(weight) else 1))
        for weight in weights
        if not weight.requires_grad
    )


@cache
def state_bytes(trainable: Trainable, optimizer: str, precision: str | None) -> tuple[int, int]:
    """Return the bytes of the optimizer's state, and how many of them could lie in host memory; nothing is allocated."""
    counts = Counter(trainable)  # a layer's are those of the one before
    built = _built(tuple(counts), optimizer, precision, torch.device("meta"))
    total = movable = 0
    for (parameter, state), count in zip(built.state.items(), counts.values(), strict=True):
        for name, tensor in state.items():
            total += count * tensor.nbytes
            if name in built.sliced_state and parameter.numel() >= SMALLEST_OFFLOADED:
                movable += count * tensor.nbytes
    return total, movable


@cache
def host_bytes_of_state(trainable: Trainable, optimizer: str, precision: str | None) -> int:
    """Return the most that lies in host memory while offloaded state is made, which is made for real on a virtual GPU."""
    device = virtual_device()
    with device.active():
        _built(trainable, optimizer, precision, device.torch_device, offload=device)
    return device.host_peak_allocated_bytes


def _built(
    trainable: Trainable, optimizer: str, precision: str | None, where: torch.device, **how: Any
) -> MemoryLeanOptimizer:
    groups: list[dict[str, Any]] = []
    # Not one for each: torch compares every group with all before it.
    for (sixteen_bit, orthogonal), alike in groupby(trainable, lambda one: (one[1] != "float32", one[2])):
        parameters = [torch.empty(shape, dtype=getattr(torch, kind), device=where) for shape, kind, _ in alike]
        groups.append({"params": parameters, "weight_precision": (precision or "master") if sixteen_bit else None})
        if optimizer == "muon":
            groups[-1]["orthogonalise"] = orthogonal
    return optim.build(optimizer, groups, lr=1.0, **how)


class Laboratory:
    """Makes trials of one setting, several at a time, each once.

    Args:
        setting: what all of them share.
        processes: how many at a time; 1 makes them in this process.
        folder: where results are kept from one search to the next; ``None`` keeps none.
    """

    def __init__(self, setting: Setting, processes: int, folder: Path | None) -> None:
        self.setting = setting
        self.made = 0
        self._results: dict[str, Any] = {}
        # What code of the model's own does may change with no word in any key.
        self._kept = None if folder is None or setting.base.get("trust_remote_code") else Kept(folder)
        self._pool: ProcessPoolExecutor | None = None
        self._retired: list[ProcessPoolExecutor] = []
        self._ended: Any = None
        self._processes = processes

    @property
    def processes(self) -> int:
        """How many trials are made at a time."""
        return self._processes

    def close(self) -> None:
        """End the processes, and keep what is kept within its bound."""
        if self._kept is not None:
            self._kept.clear_oldest()
        self.drop()

    def drop(self) -> None:
        """End the processes, whatever they are at; what is asked for later gets new ones."""
        pools = [pool for pool in (*self._retired, self._pool) if pool is not None]
        if pools:
            self._ended.value = True
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        self._retired, self._pool, self._ended = [], None, None

    def parts(self, settings: Settings) -> Parts:
        """Return what a choice of parts puts on the GPU; always in this process, whose forks then have what it imported."""
        key = self._key("parts", settings)
        if key not in self._results and not self._read(key, Parts):
            imported = len(sys.modules)
            self._keep(key, measure_parts(self.setting, settings))
            if self._pool is not None and len(sys.modules) > imported + MANY_MODULES:
                self._retired.append(self._pool)  # new forks need not import it all again
                self._pool = None
        found: Parts = self._results[key]
        return found

    def trials(self, candidates: Sequence[Settings], *, limited: bool = True) -> list[Trial]:
        """Return what each candidate came to, in their order; without an end of memory, for its work, where not ``limited``."""
        function = partial(try_out, limited=limited)
        keys = [self._key_of_trial(settings, limited=limited) for settings in candidates]
        open_ones = {
            key: settings
            for key, settings in zip(keys, candidates, strict=True)
            if key not in self._results and not self._read(key, Trial)
        }
        self.made += len(open_ones)
        # What is learned here, such as what operators return, forks know from their beginning.
        if self._processes == 1 or (self._pool is None and len(open_ones) == 1):
            for key, settings in open_ones.items():
                self._keep(key, function(self.setting, settings))
        else:
            running = {key: self._submit(function, settings) for key, settings in open_ones.items()}
            for key, future in running.items():
                self._keep(key, future.result())
        return [self._results[key] for key in keys]

    def _key_of_trial(self, settings: Settings, *, limited: bool) -> str:
        """Return the key of a trial whose result is what is asked for: what is refused, or never comes to the limit, goes as without one."""
        below, free = self._key("trial", settings), self._key("unlimited trial", settings)
        if limited:
            target, known = self.setting.target, self._results.get(free)
            usable_bytes = target.usable_bytes - target.margin_bytes
            alike = known is not None and (known.refused or (known.fits and known.needed_bytes <= usable_bytes))
            return free if alike and below not in self._results else below
        return below if below in self._results and self._results[below].fits else free

    def proof(self, settings: Settings) -> Callable[[], Proof]:
        """Begin to rehearse the whole run; call what is returned to wait for what came of it."""
        key = self._key("prove", settings)
        if key in self._results or self._read(key, Proof):
            return lambda: self._results[key]
        self.made += 1
        running = self._submit(prove, settings) if self._processes > 1 else None

        def wait() -> Proof:
            if key not in self._results:
                self._keep(key, prove(self.setting, settings) if running is None else running.result())
            found: Proof = self._results[key]
            return found

        return wait

    def _submit(self, function: Any, settings: Settings) -> Future[Any]:
        if self._pool is None:
            # A fork has everything imported already. It computes on one thread, as a fork of OpenMP's threads cannot.
            way = get_context("fork" if sys.platform == "linux" else "spawn")
            if self._ended is None:  # no Event: a parent that is killed may hold its lock for ever
                self._ended = way.RawValue("b", False)
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=way, initializer=_begin_process, initargs=(os.getpid(), self._ended)
            )
        return self._pool.submit(function, self.setting, settings)

    def _key(self, what: str, settings: Settings) -> str:
        shared = self.setting
        return key_of(
            *(
                what,
                shared.spec.config.to_json_string(),
                asdict(replace(shared.target, notes=(), host_bytes=None, network_bytes_per_s=None)),
            ),
            None if shared.layout is None else asdict(shared.layout),
            {name: value for name, value in {**shared.base, **settings}.items() if name not in _WITHOUT_EFFECT},
        )

    def _read(self, key: str, kind: Any) -> bool:
        found = None if self._kept is None else self._kept.get(key)
        try:
            self._results[key] = kind(**(found or {}))
        except TypeError:
            return False
        return True

    def _keep(self, key: str, result: Any) -> None:
        self._results[key] = result
        # What was refused may have been for the want of something that is installed tomorrow.
        if self._kept is not None and getattr(result, "refused", None) is None:
            self._kept.put(key, asdict(result))


POLL_S = 0.05
"""So often a process looks whether it is to end."""


def _begin_process(parent: int, ended: Any) -> None:
    """Compute on one thread, leave Ctrl-C to the parent, and end when ``ended`` is set, or with the parent, however it ends."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: the collector need not look through it again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end() -> None:
        while os.getppid() == parent and not ended.value:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


_WITHOUT_EFFECT = {"data", "output_dir", "model", "tokenizer", "cache_dir", "gpu", "seed", "max_steps", "max_tokens"}


def results_folder() -> Path:
    """Return where results are kept: in the user's cache folder."""
    return user_folder() / "trials"
