"""From a config to a model, an optimizer and a step that are ready to run.

The rehearsal assembles through here as well, with nothing to fill the weights from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from oomless import optim
from oomless.config import OPTIMIZER_DEFAULTS, TrainConfig
from oomless.errors import ConfigError, HardwareError
from oomless.memory.device import CudaDevice, Device, nowhere
from oomless.models import attention, build, form, save
from oomless.models.spec import ModelSpec, most_positions
from oomless.models.weights import adapter_file, open_file
from oomless.optim.base import MemoryLeanOptimizer
from oomless.techniques import (
    balancing,
    block_dropout,
    cheap_recompute,
    checkpointing,
    embeddings_on_host,
    experts,
    fp32_residual,
    frozen_layers,
    layer_parts,
    lora,
    mlp_tiles,
    offload_activations,
    one_gradient_buffer,
    quantization,
    rotary,
    selective_scan,
    sharding,
    stream_frozen,
    tied_layers,
    trainable,
    vocabulary_parts,
)
from oomless.techniques.peers import Peers
from oomless.training import kernels, rates
from oomless.training.distributed import ALONE, Ranks, environment, local_world_size, world_size
from oomless.training.loss import try_fused
from oomless.training.precision import LossScale, choose_dtype
from oomless.training.step import TrainingStep
from oomless.units import parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """What a run trains with."""

    model: Any
    optimizer: MemoryLeanOptimizer
    loss_scale: LossScale
    step: TrainingStep
    fused: frozenset[str]
    """The parts that are fused kernels."""

    notes: tuple[str, ...] = ()
    """What a person should know of how it came to be."""


def open_device(name: str) -> Device:
    """Return the device that ``gpu`` names: auto, cpu, cuda, cuda:1 or a size such as virtual:256MiB.

    Raises:
        HardwareError: the name is none of these, or no such GPU is visible.
    """
    if world_size() > 1 and name.startswith("cuda:"):
        raise HardwareError(
            f"torchrun gives each process a GPU of its own; got {name!r}: use --gpu cuda, or leave it out"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{environment('LOCAL_RANK', 0)}"
    if name == "cpu":
        return Device()
    kind, _, rest = name.partition(":")
    if kind == "virtual":
        from oomless.memory.virtual_gpu import VirtualGPU

        try:
            size_bytes = parse_bytes(rest)
        except ValueError as error:
            raise HardwareError(f"a virtual GPU is named by its size, such as virtual:256MiB; got {name!r}") from error
        if not size_bytes:
            raise HardwareError(
                f"a virtual GPU holds at least one byte; got {name!r}: name a size such as virtual:256MiB"
            )
        return VirtualGPU(size_bytes)
    if kind != "cuda" or not (rest == "" or rest.isdigit()):
        raise HardwareError(f"gpu is auto, cpu, cuda, cuda:1 or virtual:256MiB; got {name!r}")
    here = local_world_size()
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise HardwareError(
            f"each process needs a GPU of its own: {here} were started, and PyTorch sees {torch.cuda.device_count()}; use "
            f"--nproc-per-node {torch.cuda.device_count()}, or --gpu cpu"
        )
    if not torch.cuda.is_available() or int(rest or 0) >= torch.cuda.device_count():
        raise HardwareError(f"no GPU answers to {name!r}: PyTorch sees {torch.cuda.device_count()}; use --gpu cpu")
    return CudaDevice(int(rest or 0))


def assemble(spec: ModelSpec, config: TrainConfig, device: Device, *, fill: bool, ranks: Ranks = ALONE) -> Assembly:
    """Build the model of ``spec`` on ``device`` with everything that ``config`` asks for.

    ``fill`` loads the weights; without it they are left as they are allocated, for a rehearsal or a checkpoint to come. Each of
    several ``ranks`` holds its part of them, or all where they cannot be cut.

    Raises:
        ConfigError, HardwareError, ModelError: what is asked does not fit the model, the device or each other.
    """
    check_length(spec, config)
    config = rates.resolved(config, spec.config)
    if config.quantization == "mxfp4":
        spec.require_mxfp4()
    sharding.check(config, ranks.count)
    whole = sharding.why_whole(config)
    if ranks.count > 1 and whole is None:
        return _assemble_shards(spec, config, device, fill, ranks)

    mesh = ranks.mesh if sharding.cuts_bytes(config) else None

    def prepare(model: Any) -> None:
        tied_layers.join(model)
        trained = trainable.trained_modules(model, config)
        peers = None if mesh is None else Peers(model, mesh, device, across_layers=config.stream_frozen)
        if config.experts_on_host:
            experts.move_to_host(model, config.quantization, device, trained, peers)
        if config.quantization is not None:
            quantization.replace(model, config.quantization, trained, rehearsed=device.fake, peers=peers)
        if config.stream_frozen:
            stream_frozen.replace(model, device, trained, peers)
        if config.embeddings_on_host:
            embeddings_on_host.replace(model, device, trained)

    def cut(model: Any, materialise: Callable[[nn.Module], None]) -> None:
        if mesh is not None:
            head = model.get_output_embeddings()
            its_bias = [head] if config.bias == "all" and head.bias is not None else []
            vocabulary_parts.apply(model, mesh, [*trainable.trained_modules(model, config), *its_bias], device)

    model = build.build(
        spec,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        form=form.choose(spec, config.packing),
        prepare=prepare,
        cut=cut,
    )
    if fill:
        build.load_weights(model, spec, device=device)
    with device.phase("load"):
        if not fill:
            frozen_layers.rehearse_filling(model, device)
        trainable.apply(model, config, device, form.unreached(spec))
        notes = _go_on(model, spec, device) if fill else ()
        _shape(model, config, device)
    ready = _ready(model, config, device, ranks, None)
    if ranks.count > 1:
        held = "all but what is frozen and was cut" if mesh is not None else "the whole model"
        notes = (*notes, f"every GPU holds {held}: {whole}")
    return replace(ready, notes=(*ready.notes, *notes))


def _go_on(model: Any, spec: ModelSpec, device: Device) -> tuple[str, ...]:
    """Have the adapter that ``spec`` begins from, if any, in ``model``; return what is to be said of it."""
    folder = spec.adapter
    return () if folder is None else lora.go_on(model, folder, open_file(adapter_file(folder)), device)


def _assemble_shards(spec: ModelSpec, config: TrainConfig, device: Device, fill: bool, ranks: Ranks) -> Assembly:
    """Give the model its final form while nothing of it is allocated, then allocate and fill this process's part of it."""
    made: list[sharding.Sharded] = []

    def prepare(model: Any) -> None:
        save.require_own_names(model)
        trainable.apply(model, config, nowhere(), form.unreached(spec))
        _shape(model, config, device)

    def cut(model: Any, materialise: Callable[[nn.Module], None]) -> None:
        assert ranks.mesh is not None
        made.append(sharding.Sharded(model, ranks.mesh, materialise))

    model = build.build(
        spec,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        form=form.choose(spec, config.packing),
        prepare=prepare,
        cut=cut,
    )
    if config.optimizer == "adamw_8bit":
        sharding.check_blocks(model)
    if fill:
        build.load_weights(model, spec, device=device)
    with device.phase("load"):
        lora.initialise_parts(model, device)
        notes = _go_on(model, spec, device) if fill else ()
    ready = _ready(model, config, device, ranks, made[0])
    return replace(ready, notes=(*ready.notes, *notes))


def _shape(model: Any, config: TrainConfig, device: Device) -> None:
    """Give ``model``, in which it is settled what trains, the form that it trains in."""
    one_gradient_buffer.apply(model)
    wide = fp32_residual.wanted(model, config.fp32_residual)
    if wide:
        fp32_residual.apply(model)
    _save_activations(model, config, device, norm_dtype=model.dtype if wide else None)


def _ready(model: Any, config: TrainConfig, device: Device, ranks: Ranks, sharded: sharding.Sharded | None) -> Assembly:
    with device.phase("optimizer"):
        optimizer = _optimizer(model, config, device)
    with device.phase("load"):
        tries: dict[str, Callable[[], None]] = {
            kernels.UPDATES: optimizer.try_fused,
            kernels.LOSS: partial(try_fused, model, device),
            **layer_parts.trials(model, device.torch_device),
            **rotary.trials(model, device.torch_device),
        }
        if model.config._attn_implementation == attention.NAME:
            tries[kernels.DOCUMENTS] = partial(attention.try_one_launch, model, device.torch_device)
        fused, notes = kernels.choose(config, device, tries)
        optimizer.fused = kernels.UPDATES in fused
        layer_parts.fused_parts(model).update(fused)
        attention.attend_in_one_launch(model, kernels.DOCUMENTS in fused)
        loss_scale = LossScale(model.dtype, device)
        balance = balancing.of(model, config.router_aux_loss_coef, device)
    device.watch(model, optimizer)
    step = TrainingStep(
        model,
        optimizer,
        loss_scale,
        device,
        max_grad_norm=config.max_grad_norm or 0.0,
        loss_chunk_bytes=config.loss_chunk_bytes,
        label_smoothing=config.label_smoothing_factor,
        z_loss=config.z_loss,
        fused_loss=kernels.LOSS in fused,
        balance=balance,
        in_backward=config.optimizer_in_backward,
        ranks=ranks,
        sharded=sharded,
    )
    return Assembly(model=model, optimizer=optimizer, loss_scale=loss_scale, step=step, fused=fused, notes=notes)


def _save_activations(model: Any, config: TrainConfig, device: Device, norm_dtype: torch.dtype | None) -> None:
    """Apply the ways to keep less for backward, each on top of those before it."""
    block_dropout.apply(model)
    selective_scan.replace(model)
    if config.gradient_checkpointing:
        layers = checkpointing.apply(model, config.checkpointed_layers)
        if config.offload_activations:
            offload_activations.apply(model, layers, device)
    if config.cheap_recompute:
        cheap_recompute.apply(model, norm_dtype=norm_dtype)
    elif kernels.are_wanted(config, device):
        layer_parts.replace(model, norm_dtype=norm_dtype, plain=False)
    if kernels.are_wanted(config, device):
        rotary.replace(model)
    if config.mlp_tiles is not None:
        mlp_tiles.apply(model, config.mlp_tiles)


def check_length(spec: ModelSpec, config: TrainConfig) -> None:
    """Check that the model's positions reach as far as ``max_seq_length``.

    Raises:
        ConfigError: they do not.
    """
    longest = form.longest(spec, config.packing)
    if longest and config.max_seq_length > longest:
        unused = (most_positions(spec.config) or 0) - longest
        less = f" less the first {unused}, which its tokens do not have" if unused else ""
        raise ConfigError(
            f"max_seq_length must be at most the model's max_position_embeddings{less}, {longest}; got {config.max_seq_length}: "
            f"use {longest}"
        )


def _optimizer(model: Any, config: TrainConfig, device: Device) -> MemoryLeanOptimizer:
    if config.offload_optimizer and device.capacity_bytes is None:
        raise ConfigError("offload_optimizer has no effect on a CPU, whose memory is the host's; remove it")
    assert config.learning_rate is not None
    own = OPTIMIZER_DEFAULTS[config.optimizer]
    settings: dict[str, Any] = {"momentum": config.momentum} if "momentum" in own else {}
    if "adam_beta1" in own:
        settings |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    try:
        return optim.build(
            config.optimizer,
            parameter_groups(model, config),
            lr=config.learning_rate,
            seed=config.seed,
            offload=device if config.offload_optimizer else None,
            **settings,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parameter_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices decay, vectors do not; embed_tokens and lm_head have their own rate.

    Raises:
        ConfigError: ``embedding_learning_rate`` is given but neither embed_tokens nor lm_head trains, or
            ``weight_precision`` but all that trains is fp32.
    """
    embeddings = {id(parameter) for parameter in trainable.embedding_parameters(model)}
    groups: dict[tuple[bool, bool, bool], list[Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = (id(parameter) in embeddings, parameter.ndim > 1, parameter.dtype != torch.float32)
            groups.setdefault(kind, []).append(parameter)
    if config.weight_precision is not None and not any(sixteen_bit for _, _, sixteen_bit in groups):
        raise ConfigError("weight_precision has no effect: all that trains is fp32; remove it")
    if config.embedding_learning_rate is not None and not any(embedding for embedding, _, _ in groups):
        raise ConfigError("embedding_learning_rate has no effect: neither embed_tokens nor lm_head trains; remove it")
    embedding_rate = config.embedding_learning_rate or config.learning_rate
    return [
        {
            "params": [sharding.local(parameter) for parameter in parameters],
            "lr": embedding_rate if embedding else config.learning_rate,
            "peak_lr": embedding_rate if embedding else config.learning_rate,
            "embedding": embedding,
            "weight_decay": config.weight_decay if matrix else 0.0,
            "weight_precision": (config.weight_precision or "master") if sixteen_bit else None,
            **({"orthogonalise": matrix and not embedding} if config.optimizer == "muon" else {}),
        }
        for (embedding, matrix, sixteen_bit), parameters in groups.items()
    ]
