"""Trainings that are predicted and then run, with random weights: memory does not depend on their values."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from oomless.config import TrainConfig
from oomless.data.loader import micro_batches
from oomless.memory.device import Device
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.layout import Layout, usual_documents
from oomless.planning.plan import Target, plan
from oomless.planning.rehearse import play
from oomless.planning.throughput import throughput
from oomless.training.assemble import Assembly, assemble

LORA = {"trainable": "lora", "gradient_checkpointing": True}
FULL = {
    "trainable": "full",
    "gradient_checkpointing": True,
    "optimizer": "adamw_8bit",
    "weight_precision": "stochastic",
}
POINTS: tuple[dict[str, Any], ...] = (
    {"model": "SmolLM2-135M", "max_seq_length": 512, "trainable": "full"},
    {"model": "SmolLM2-135M", "max_seq_length": 2048, "trainable": "lora"},
    {"model": "Qwen2.5-0.5B", "max_seq_length": 512, **FULL, "optimizer": "adamw"},
    {"model": "Qwen2.5-0.5B", "max_seq_length": 2048, **FULL},
    {"model": "Qwen2.5-0.5B", "max_seq_length": 2048, "trainable": "lora"},
    {"model": "Llama-3.2-1B", "max_seq_length": 512, **LORA, "trainable": "lora+embed_tokens+lm_head"},
    {"model": "Llama-3.2-1B", "max_seq_length": 2048, **LORA},
    {"model": "Llama-3.2-1B", "max_seq_length": 2048, **FULL, "cheap_recompute": True},
    {"model": "gemma-2-2b", "max_seq_length": 1024, **LORA},
    {"model": "Llama-3.2-3B", "max_seq_length": 2048, **LORA},
)
"""Ten that between them fit on most GPUs."""

TINY = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
TINY_LENGTHS = 16
"""By so much a tiny point's blocks are shorter."""

WARM_UP, STEPS = 1, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One training, as it was predicted and as it went; nothing was measured of one that did not fit."""

    name: str
    fits: bool
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int
    predicted_tokens_per_second: float | None
    measured_allocated_bytes: int = 0
    measured_reserved_bytes: int = 0
    measured_tokens_per_second: float = 0.0
    error: str | None = None
    """What it ended with, where it was to fit and did not."""

    @property
    def allocated_error(self) -> float:
        """By what share of it the peak allocated was missed."""
        return self.predicted_allocated_bytes / self.measured_allocated_bytes - 1

    @property
    def reserved_error(self) -> float:
        """By what share of it the peak reserved was missed."""
        return self.predicted_reserved_bytes / self.measured_reserved_bytes - 1


def shrunk(spec: ModelSpec) -> ModelSpec:
    """Make the model of ``spec`` tiny, and return it."""
    for name, value in TINY.items():
        setattr(spec.config, name, value)
    spec.config.num_attention_heads, spec.config.num_key_value_heads, spec.config.head_dim = 4, 2, 32
    if getattr(spec.config, "layer_types", None):
        spec.config.layer_types = spec.config.layer_types[: TINY["num_hidden_layers"]]
    return spec


def measure(spec: ModelSpec, config: TrainConfig, device: Device) -> tuple[int, int]:
    """Return the peaks, allocated and reserved, of the run that is rehearsed for ``config``."""
    gc.collect()
    device.empty_cache()
    device.reset_peak()
    with device.active():
        play(assembled(spec, config, device), config)
    usage = device.usage()
    return usage.peak_allocated_bytes, usage.peak_reserved_bytes


def assembled(spec: ModelSpec, config: TrainConfig, device: Device) -> Assembly:
    """Return what ``assemble`` makes, its weights random numbers."""
    parts = assemble(spec, config, device, fill=False)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.02)  # in place, for a step is judged by its loss
        for parameter, state in parts.optimizer.state.items():
            if "master" in state:
                state["master"].copy_(parameter)
    return parts


def tokens_per_second(spec: ModelSpec, config: TrainConfig, device: Device) -> float:
    """Return the speed of the steps of ``config``; on tokens of every kind, since the gradient of one row alone is slow."""
    block = Layout.uniform(usual_documents(config), config).data(config).train.block(0)
    vocabulary = spec.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(vocabulary, size=config.max_seq_length)
    block = replace(block, input_ids=tokens, labels=tokens)
    seconds = []
    with device.active():
        parts = assembled(spec, config, device)
        for _ in range(WARM_UP + STEPS):
            with device.host():
                batches = list(micro_batches([block] * config.blocks_per_step, config.per_device_train_batch_size))
            device.wait()
            began = time.perf_counter()
            parts.step.run(batches)
            device.wait()
            seconds.append(time.perf_counter() - began)
    return config.blocks_per_step * config.max_seq_length / statistics.median(seconds[WARM_UP:])


def try_point(settings: dict[str, Any], device: Device, target: Target, *, tiny: bool) -> Point:
    """Predict the training of ``settings`` on ``target`` and, where it fits there, run it on ``device``."""
    spec = resolve_for_plan(settings["model"])
    if tiny:
        spec, settings = shrunk(spec), {**settings, "max_seq_length": settings["max_seq_length"] // TINY_LENGTHS}
    config = TrainConfig.from_mapping({"data": "-", "output_dir": "-", "packing": "concatenate", **settings})
    found = plan(spec, config, target)
    speed = None if found.work is None else throughput(found.work, target, config, ())
    point = Point(
        name=f"{settings['model']}, {settings['trainable']}, {config.max_seq_length:,} tokens",
        fits=found.fits,
        predicted_allocated_bytes=found.profile.peak_allocated_bytes,
        predicted_reserved_bytes=found.profile.peak_reserved_bytes,
        predicted_tokens_per_second=None if speed is None else speed.tokens_per_second,
    )
    if not found.fits:
        return point
    try:
        allocated, reserved = measure(spec, config, device)
        reached = tokens_per_second(spec, config, device)
    except torch.OutOfMemoryError as error:
        return replace(point, error=str(error).split(". ")[0])
    return replace(
        point,
        measured_allocated_bytes=allocated,
        measured_reserved_bytes=reserved,
        measured_tokens_per_second=reached,
    )
