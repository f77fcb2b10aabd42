"""The rehearsal: a run's own script, on a virtual GPU with tensors that hold nothing.

There is no formula here. ``training.assemble`` builds what will train, ``training.script`` does what a run does (probe, heaviest
blocks, evaluation, steps, checkpoints, final model), and the tracker books every storage in the simulated allocator. It is a run
shortened to a few steps, with blank text for its data and nothing on a disk. What a rehearsal adds is what only the real thing has:

*Blocks.* Their tokens do not matter, but how documents lie in them does (``layout``).

*Kernels.* Where CUDA takes another attention kernel than the CPU, attention calls that kernel's own operator.

*What lies outside the allocator*: the CUDA context and libraries, from the catalogue, and cuBLAS's workspaces, which the
allocator does hold: one for the thread that runs the step, one for autograd's.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from oomless.config import TrainConfig
from oomless.errors import OomlessError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.device import Device
from oomless.memory.profile import MemoryProfile
from oomless.memory.repeated_layers import CannotRepeat, repeated_layers
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.memory.work import Work
from oomless.models import save, verify
from oomless.models.blame import blamed
from oomless.models.layout import Savable
from oomless.models.spec import ModelSpec
from oomless.ops.attention import Kernel, attention_kernel, kernel_for
from oomless.ops.repeating import repeating_by
from oomless.optim.base import MemoryLeanOptimizer
from oomless.planning.layout import SHORT_RUN_STEPS, Layout, usual_documents
from oomless.techniques import frozen_layers, in_flight, lora, offload_activations, sharding, trainable
from oomless.techniques.checkpointing import decoder_layers, layers_of_backward
from oomless.training import checkpoint, script
from oomless.training.assemble import Assembly, assemble
from oomless.training.distributed import ALONE, Ranks, rehearsed
from oomless.training.life import Keeper, Life, total_steps
from oomless.training.listening import Listener, RunResult
from oomless.training.precision import choose_dtype
from oomless.training.step import passes_of

UNLIMITED_BYTES = 1 << 50
STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What a rehearsal found."""

    profile: MemoryProfile
    device: VirtualGPU
    parameters: int
    trainable_parameters: int
    work: Work | None
    """What the last step computed and moved."""

    out_of_memory: str | None
    """The device's message where the capacity was reached, else ``None``."""


def virtual_device(
    capacity_bytes: int = UNLIMITED_BYTES,
    *,
    name: str = "virtual GPU",
    compute_capability: tuple[int, int] = (8, 0),
    outside_bytes: int = 0,
    settings: AllocatorSettings | None = None,
    snapshot: bool = False,
) -> VirtualGPU:
    """Return a GPU to rehearse on: tensors hold nothing, and every event is kept (also for a ``snapshot``)."""
    return VirtualGPU(
        capacity_bytes,
        name=name,
        compute_capability=compute_capability,
        outside_bytes=outside_bytes,
        settings=settings,
        record_history=True,
        snapshot_history=snapshot,
        fake=True,
    )


def rehearse(
    spec: ModelSpec,
    config: TrainConfig,
    device: VirtualGPU,
    *,
    kernel: Kernel | None = None,
    layout: Layout | None = None,
    workspace_bytes: int = 0,
    steps: int = STEPS,
    whole: bool = True,
    run_all_layers: bool = True,
    gpus: int = 1,
) -> Rehearsal:
    """Play the run of ``config`` on ``device``, of ``steps`` optimizer steps.

    Args:
        spec: the model; its weights are not needed.
        config: the run; its data is not read.
        device: a virtual GPU, usually from ``virtual_device``.
        kernel: the attention kernel; by default the one that the device's compute capability gets from PyTorch.
        layout: how documents lie in its blocks; by default two fill each, or one where they are concatenated.
        workspace_bytes: what cuBLAS takes from the allocator at a thread's first product.
        steps: optimizer steps; from two on the peak is that of a long run. A short run of known text is played whole.
        whole: or only as far as the first step's memory is known, whose work is then counted.
        run_all_layers: or only some of each kind, and repeat what they ask for; modules inside of layers are then not named.
        gpus: how many train together; what is rehearsed is the first, whose parts are the largest.

    Raises:
        CannotRepeat: without ``run_all_layers``, where these layers have to be run.
        UserError: what is asked for does not fit together; the same as training would say. Or the model's own code fails, or
            wants to know values.
    """
    failure = None
    parts: Assembly | None = None
    with rehearsed(gpus) as ranks, device.active(), _seldom_collecting():
        try:
            chosen = kernel or kernel_for(device.compute_capability or (8, 0), choose_dtype(config.dtype, device))
            with attention_kernel(chosen), repeating_by(device.repeating):
                parts = assemble(spec, config, device, fill=False, ranks=ranks)
                device.skim = not whole
                repeat_updates(parts.optimizer, device)
                device.book_workspaces(workspace_bytes)
                after = parts.step.fused is None
                with nullcontext() if run_all_layers else layers_repeated(parts.model, device, updates_after=after):
                    play(parts, config, layout, steps, ranks, whole=whole)
        except torch.OutOfMemoryError as error:
            failure = str(error)
        except Exception as error:
            told = None if isinstance(error, (OomlessError, CannotRepeat)) else blamed(error)
            if told is None:
                raise
            raise told from error
    model = parts.model if parts is not None else None
    return Rehearsal(
        profile=device.profile(),
        device=device,
        work=device.work(),
        parameters=sum(row.parameters for row in trainable.table(model)) if model is not None else 0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad) if model is not None else 0,
        out_of_memory=failure,
    )


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Look for garbage in cycles seldom inside: a rehearsal makes many objects and drops them by itself."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def rehearse_briefly(
    spec: ModelSpec, config: TrainConfig, open_device: Callable[[], VirtualGPU], **how: Any
) -> Rehearsal:
    """Return what ``rehearse`` with ``how`` finds, running as few layers as it can."""
    if how.get("gpus", 1) == 1 or sharding.why_whole(config) is not None:  # parts are gathered one layer ahead
        with suppress(CannotRepeat):
            return rehearse(spec, config, open_device(), run_all_layers=False, **how)
    return rehearse(spec, config, open_device(), **how)


def repeat_updates(optimizer: MemoryLeanOptimizer, device: VirtualGPU) -> None:
    """Let ``optimizer`` run the update of each kind of parameter once a step, and ask again for what it asked for the others.

    What an update asks for follows from shapes, dtypes and settings, all of which are in the key.
    """
    update = optimizer._update
    done: Counter[Tensor] = Counter()

    def update_or_repeat(
        parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor], *scaling: Tensor | None
    ) -> None:
        done[parameter] += 1
        kinds = tuple((name, tensor.shape, tensor.dtype) for name, tensor in state.items())
        given = tuple(tensor is not None for tensor in scaling)
        key = (done[parameter], id(group), parameter.shape, parameter.dtype, gradient.dtype, kinds, given)
        with device.counting_update():
            device.repeating(key, lambda: update(parameter, gradient, group, state, *scaling))

    optimizer._update = update_or_repeat  # type: ignore[method-assign, assignment]


def layers_repeated(model: Any, device: VirtualGPU, *, updates_after: bool = False) -> AbstractContextManager[None]:
    """Run only some of the layers of ``model`` inside; see ``memory.repeated_layers``.

    Of layers that lie beside some that hold others all run, unless parameters are only updated after backward (``updates_after``).
    """
    every = decoder_layers(model)
    parts = {id(part) for layer in every for part in layer.modules() if part is not layer}
    layers = [layer for layer in every if id(layer) not in parts]
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    nested = len(layers) < len(every)
    if len(types) != len(layers) or (nested and not updates_after):
        types = range(len(layers))  # each is of a kind of its own, and runs
    elif nested:
        types = _types_among_nested(layers, every, types)
    backward = {id(layer) for layer in layers_of_backward(model)}
    out = [offload_activations.goes_out(layer) for layer in layers]
    kinds = [
        # The second frees no input of the layer before, which the model itself holds.
        (
            kind,
            id(layer) in backward,
            goes_out and min(place, 2),
            *(_facts(name, part) for name, part in layer.named_modules()),
        )
        for place, (kind, layer, goes_out) in enumerate(zip(types, layers, out, strict=True))
    ]
    return repeated_layers(model, layers, kinds, device, partial(in_flight.coming, model))


def _types_among_nested(layers: Sequence[Any], every: Sequence[Any], types: Sequence[Any]) -> list[Any]:
    """Return the types of ``layers``, of which some hold others of ``every``, as Zamba's hybrid layers do.

    Such a layer is of a kind of its own, and runs: its backward leaves a gradient of the embeddings, which it is given too. What
    lies before the last of them finds such a gradient in its backward, and what lies behind does not.
    """
    held = {id(layer) for layer in every}
    holds = [sum(id(part) in held for part in layer.modules()) > 1 for layer in layers]
    last = max(place for place, own in enumerate(holds) if own)
    return [place if own else (kind, place > last) for place, (own, kind) in enumerate(zip(holds, types, strict=True))]


def _facts(name: str, module: nn.Module) -> tuple[Any, ...]:
    """Return what decides which operators ``module`` runs on which sizes."""
    plain = sorted(
        (key, value)
        for key, value in vars(module).items()
        if key != "layer_idx" and isinstance(value, (bool, int, float, str, NoneType))
    )
    replaced = sorted(
        (key, getattr(value, "__qualname__", type(value).__name__))
        for key, value in vars(module).items()
        if callable(value)
    )
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    sizes = tuple((key, tuple(t.shape), t.dtype, t.requires_grad) for key, t in tensors)
    return name, type(module), tuple(plain), tuple(replaced), sizes


def play(
    parts: Assembly,
    config: TrainConfig,
    layout: Layout | None = None,
    steps: int = STEPS,
    ranks: Ranks = ALONE,
    *,
    whole: bool = True,
) -> None:
    """Play the run of ``config`` with ``parts`` on blank text of ``layout``; the rest is as in ``rehearse``."""
    layout = layout or Layout.uniform(usual_documents(config), config)
    life = Life(
        shortened(config, layout, steps, ranks.count),
        parts.step.device,
        ranks,
        Listener(),
        data=layout.data(config, ranks.count),
        assembly=parts,
        keeper=NoFolder(),
        result=RunResult(output_dir=Path()),
    )
    if whole:
        script.probe(life)
        script.play(life)
    else:
        script.begin(life)  # the first step's memory is then known, and its work counted


class NoFolder(Keeper):
    """Brings to the host what would be written, and keeps nothing."""

    def __init__(self) -> None:
        self._saved_step: int | None = None

    def record(self, metrics: dict[str, Any]) -> None:  # noqa: D102
        pass

    def prompts(self, life: Life) -> Sequence[Sequence[int]]:  # noqa: D102
        return [[0]] * len(life.config.sample_prompts or ())

    def text(self, tokens: Sequence[int], new: Sequence[int]) -> str:  # noqa: D102
        return ""

    def save(self, life: Life) -> None:  # noqa: D102
        if life.step == self._saved_step:
            return
        parts = life.assembly
        with life.device.phase("save"):
            beside = checkpoint.trainer_tensors(parts.model, parts.optimizer, parts.loss_scale)
            bring(checkpoint.weights_to_save(parts.model, life.device) | beside, life.device)
        self._saved_step = life.step

    def save_on_the_way(self, life: Life) -> None:  # noqa: D102
        self.save(life)

    def go_back(self, life: Life, leave_out: Iterable[int] = ()) -> str | None:  # noqa: D102
        return None

    def save_model(self, life: Life) -> Path | None:  # noqa: D102
        model, device = life.assembly.model, life.device
        adapted = checkpoint.is_adapted(model)
        # What is read from the base's files is not here; of an adapter alone the files are taken again.
        if (
            frozen_layers.has_frozen_layers(model)
            or sharding.has_parts(model)
            or (adapted and not life.config.merge_lora)
        ):
            return None
        with device.phase("save"):
            if adapted:
                lora.merge(model, device)
                bring(lora.plain_tensors(model), device)
            verify.live_logits(model, device)
        return None


def bring(tensors: Mapping[str, Savable], device: Device) -> None:
    """Bring each of ``tensors`` to the host and forget it; of those of one shape the first alone is run."""
    for tensor in tensors.values():
        once = partial(_bring_one, tensor, device)
        if isinstance(tensor, Tensor):
            device.repeating(("bring", tensor.shape, tensor.stride(), tensor.dtype), once)
        else:
            once()


def _bring_one(tensor: Savable, device: Device) -> None:
    for host in save.to_host({"": tensor}, device):
        del host


def shortened(config: TrainConfig, layout: Layout, steps: int, gpus: int = 1) -> TrainConfig:
    """Return the run of ``config`` in at most so many ``steps``, or whole where it is short and its text known.

    One that is cut short evaluates and saves after its first step if at all, and accumulates over fewer passes: further ones ask
    for the same again.
    """
    total = total_steps(config, layout.blocks_per_epoch, gpus)
    short = total is not None and total <= (SHORT_RUN_STEPS if layout.blocks_per_epoch is not None else steps)
    config = replace(
        config,
        max_steps=total if short else steps,
        max_tokens=None,
        num_train_epochs=None,
        logging_steps=1,
        preemption_grace_s=None,
        host_reserve_bytes=0,  # this machine's memory is not the run's
    )
    if short:
        return config
    passes = passes_of(config) * gpus * min(2, len(layout.train))
    return replace(
        config,
        tokens_per_step=None,
        gradient_accumulation_steps=min(config.gradient_accumulation_steps, passes),
        eval_steps=1 if config.eval_steps else None,
        save_steps=1 if config.save_steps or config.save_minutes else None,
    )
