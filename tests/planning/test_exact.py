"""The rehearsal against the real CPU run in the same tracker: equal to the byte."""

import itertools

import pytest
import torch

from oomless.config import DataSource, TrainConfig
from oomless.memory.profile import CATEGORIES
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.planning.layout import Layout
from oomless.planning.rehearse import play, rehearse, virtual_device
from oomless.training.assemble import assemble

LENGTHS = (20, 1, 43)
TRAINABLE = [
    {"trainable": "full"},
    {"trainable": "lm_head", "tied_weights": "untied"},
    {"trainable": "embed_tokens", "tied_weights": "shared"},
    {"trainable": "lora+lm_head", "tied_weights": "shared", "lora_r": 4},
    {"trainable": "model.layers.1.*"},
]
ROUTES = [
    {"optimizer": "adamw", "dtype": "fp32"},
    {"optimizer": "sgd", "dtype": "bf16", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    {"dtype": "fp16", "fp32_residual": True, "per_device_train_batch_size": 3, "loss_chunk_bytes": 1 << 16},
    {"optimizer": "adafactor", "dtype": "bf16", "weight_precision": "stochastic", "optimizer_in_backward": True},
    {"optimizer": "adamw_8bit", "dtype": "bf16", "weight_precision": "correction", "gradient_accumulation_steps": 2},
]
SAVING = {"gradient_checkpointing": True, "checkpointed_layers": 3, "offload_activations": True}
LEAN_ROUTES = [
    TRAINABLE[3] | SAVING | {"optimizer": "sgd", "dtype": "bf16", "cheap_recompute": True, "mlp_tiles": 3},
    {"optimizer": "adafactor", "dtype": "fp16", "cheap_recompute": True, "gradient_accumulation_steps": 2},
    SAVING | {"optimizer": "adamw_8bit", "dtype": "fp16", "mlp_tiles": 2, "optimizer_in_backward": True},
]
CASES = [
    (architecture, trainable | route)
    for architecture, trainable, route in itertools.product(
        ("llama", "gemma", "gemma2", "qwen2", "qwen3"), TRAINABLE, ROUTES
    )
    if not (trainable.get("tied_weights") == "untied" and route.get("gradient_checkpointing"))
]


QUANTIZED = [
    {"trainable": "lm_head", "tied_weights": "untied", "quantization": "nf4", "dtype": "fp16"},
    {"trainable": "lora+lm_head+embed_tokens", "quantization": "nf4", "dtype": "bf16", "gradient_checkpointing": True},
    {"trainable": "model.layers.1.*", "quantization": "int8", "dtype": "bf16"},
    {"trainable": "lora+lm_head", "tied_weights": "shared", "stream_frozen": True, "gradient_checkpointing": True},
    {"trainable": "lora", "stream_frozen": True, "gradient_checkpointing": True, "mlp_tiles": 8},
    {"trainable": "lora+lm_head+embed_tokens", "trainable_rows": "3,7-40", "quantization": "nf4", "dtype": "bf16"},
    {"trainable": "lm_head", "tied_weights": "untied", "trainable_rows": "3,7-40", "stream_frozen": True},
]
CASES += itertools.product(("llama", "gemma", "qwen2"), QUANTIZED)
CASES += [
    ("llama", {"trainable": "lora", "lora_dropout": 0.3, "gradient_checkpointing": True, "mlp_tiles": tiles})
    for tiles in (None, 2)
]


RECURRENT = {"packing": "concatenate"}
CASES += [
    ("mamba", RECURRENT | {"trainable": "full", "optimizer": "adamw", "dtype": "bf16"}),
    ("mamba", RECURRENT | {"trainable": "lora", "lora_r": 4, "dtype": "fp16", "gradient_checkpointing": True}),
    ("mamba", RECURRENT | {"trainable": "lm_head", "tied_weights": "untied", "quantization": "nf4", "dtype": "bf16"}),
]


def both_profiles(folder, settings, lengths=LENGTHS):
    spec = resolve(str(folder))
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=sum(lengths),
        **settings,
    )
    real = VirtualGPU(1 << 40, name="virtual GPU", record_history=True)
    with real.active():
        play(assemble(spec, config, real, fill=True), config, Layout.uniform(lengths, config))
    fake = rehearse(spec, config, virtual_device(), kernel="auto", layout=Layout.uniform(lengths, config))
    return real.profile(max_points=None), fake.device.profile(max_points=None)


def identify(case):
    return "-".join(str(value) for value in case.values()) if isinstance(case, dict) else case


def test_attention_that_drops_weights(make_checkpoint):
    """Its masks are drawn block by block."""
    folder = make_checkpoint("llama", attention_dropout=0.2)
    real, fake = both_profiles(folder, {"dtype": "fp32", "optimizer": "sgd", "per_device_train_batch_size": 3})
    assert fake.peak_bytes_by_category == real.peak_bytes_by_category
    assert fake.phases == real.phases


@pytest.mark.parametrize(("architecture", "settings"), CASES, ids=identify)
def test_fake_is_real_to_the_byte(make_checkpoint, architecture, settings):
    real, fake = both_profiles(make_checkpoint(architecture, tied=True), settings)
    assert fake.peak_allocated_bytes == real.peak_allocated_bytes
    assert fake.peak_reserved_bytes == real.peak_reserved_bytes
    assert fake.peak_bytes_by_category == real.peak_bytes_by_category
    assert fake.phases == real.phases
    for profile in (real, fake):
        timeline = profile.timeline
        sums = [sum(sizes) for sizes in zip(*(timeline.bytes_by_category[c] for c in CATEGORIES), strict=True)]
        assert tuple(sums) == timeline.allocated_bytes
        assert max(timeline.allocated_bytes) == profile.peak_allocated_bytes


@pytest.mark.parametrize("route", LEAN_ROUTES, ids=identify)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_lean_activations_are_exact_too(make_checkpoint, architecture, route):
    folder = make_checkpoint(architecture, tied=True, num_hidden_layers=4)
    real, fake = both_profiles(folder, route)
    assert fake.peak_allocated_bytes == real.peak_allocated_bytes
    assert fake.peak_reserved_bytes == real.peak_reserved_bytes
    assert fake.peak_bytes_by_category == real.peak_bytes_by_category
    assert fake.phases == real.phases


OFFLOADED = [
    {"optimizer": "apollo", "dtype": "bf16", "weight_precision": "master"},
    {"optimizer": "galore", "dtype": "fp32", "optimizer_in_backward": True},
    {"optimizer": "muon", "dtype": "fp16", "weight_precision": "correction"},
]


@pytest.mark.parametrize("route", OFFLOADED, ids=identify)
def test_offloaded_state_is_exact_too(make_checkpoint, route):
    folder = make_checkpoint("llama", tied=True, hidden_size=256)
    real, fake = both_profiles(folder, route | {"offload_optimizer": True})
    assert fake.peak_allocated_bytes == real.peak_allocated_bytes
    assert fake.peak_reserved_bytes == real.peak_reserved_bytes
    assert fake.peak_bytes_by_category == real.peak_bytes_by_category
    assert fake.phases == real.phases


def test_a_change_is_seen(make_checkpoint):
    """The comparison can fail: one more token per block changes the peak."""
    folder = make_checkpoint("llama", tied=True)
    first, _ = both_profiles(folder, TRAINABLE[0] | ROUTES[0])
    _, second = both_profiles(folder, TRAINABLE[0] | ROUTES[0], lengths=(20, 1, 44))
    assert first.peak_allocated_bytes != second.peak_allocated_bytes


def test_parameters_are_counted(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=32,
        trainable="lm_head",
        tied_weights="untied",
    )
    found = rehearse(resolve(str(folder)), config, virtual_device())
    assert found.trainable_parameters == 512 * 64
    assert found.parameters == sum(p.numel() for p in torch.nn.ParameterList(_model(folder).parameters())) + 512 * 64


def _model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
