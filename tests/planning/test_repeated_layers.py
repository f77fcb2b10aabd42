"""A rehearsal that runs some layers of each kind is, at every event, the rehearsal that runs them all."""

import copy
from dataclasses import replace

import pytest

from oomless.config import DataSource, TrainConfig
from oomless.memory import virtual_gpu
from oomless.memory.repeated_layers import CannotRepeat
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve, resolve_for_plan
from oomless.ops import attention, gated_product, rms_norm
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.training.step import TrainingStep

LORA = {"trainable": "lora+embed_tokens+lm_head", "lora_r": 4, "dtype": "bf16"}
CHECKPOINTED = {"gradient_checkpointing": True, "checkpointed_layers": 5}
WIDE = {"hidden_size": 256, "intermediate_size": 768}
CASES = [
    ("llama", {"optimizer": "adamw", "dtype": "bf16", "gradient_accumulation_steps": 2, "kernel": "flash"}),
    ("llama", {"optimizer": "adamw_8bit", "dtype": "bf16", "optimizer_in_backward": True, **CHECKPOINTED}),
    ("qwen3", {"optimizer": "apollo", "dtype": "fp16", "cheap_recompute": True, "optimizer_in_backward": True}),
    ("gemma", {"optimizer": "adafactor", "dtype": "fp16", "gradient_checkpointing": True, "cheap_recompute": True,
               "optimizer_in_backward": True, "gradient_accumulation_steps": 4}),
    ("gemma2", {"optimizer": "sgd", "dtype": "bf16", "mlp_tiles": 3, "per_device_train_batch_size": 2}),
    ("llama", {"optimizer": "adamw", "dtype": "bf16", "offload_optimizer": True, "optimizer_in_backward": True, **WIDE}),
    ("qwen2", {**LORA, **CHECKPOINTED, "quantization": "nf4", "cheap_recompute": True, "mlp_tiles": 2, "kernel": "flash"}),
    ("llama", {**LORA, "quantization": "int8", "gradient_accumulation_steps": 3, "lora_dropout": 0.1}),
    ("llama", {**LORA, "stream_frozen": True, "gradient_checkpointing": True}),
    ("llama", {**LORA, "stream_frozen": True, "gradient_accumulation_steps": 3}),
    ("qwen3", {**LORA, **CHECKPOINTED, "stream_frozen": True, "cheap_recompute": True, "gradient_accumulation_steps": 2}),
    ("gemma", {"trainable": "lora", "dtype": "bf16", "stream_frozen": True, "gradient_checkpointing": True, "mlp_tiles": 2,
               "offload_activations": True, "gradient_accumulation_steps": 3, "cheap_recompute": True}),
    ("llama", {"trainable": "lm_head", "quantization": "nf4", "dtype": "bf16", "embeddings_on_host": True}),
    ("llama", {"optimizer": "adamw", "dtype": "bf16", "gradient_checkpointing": True, "offload_activations": True,
               "gradient_accumulation_steps": 3}),
    ("gemma2", {"optimizer": "sgd", "dtype": "bf16", **CHECKPOINTED, "offload_activations": True, "mlp_tiles": 2}),
    ("qwen2", {**LORA, "gradient_checkpointing": True, "quantization": "nf4", "cheap_recompute": True,
               "offload_activations": True, "optimizer_in_backward": True}),
    ("llama", {"trainable": "lora", "dtype": "fp16", "checkpointed_layers": 7, "gradient_checkpointing": True,
               "offload_activations": True, "per_device_train_batch_size": 2, "kernel": "efficient"}),
    ("llama", {"trainable": "model.layers.5.*", "dtype": "bf16"}),
    ("mixtral", {"optimizer": "adamw", "dtype": "bf16", "label_smoothing_factor": 0.1, "weight_decay": 0.1}),
    ("mixtral", {"trainable": "lora", "dtype": "bf16", "experts_on_host": True}),
]  # fmt: skip
LAYERS = {"num_hidden_layers": 8}


def rehearsal(folder, settings, *, run_all_layers, capacity_bytes=1 << 40, gpus=1):
    """Two steps, an evaluation and a save."""
    spec = resolve(str(folder))
    kernel = settings.get("kernel", "auto")
    settings = {name: value for name, value in settings.items() if name != "kernel"}
    settings = {"data": (DataSource(path="none"),), "output_dir": "none", "max_seq_length": 64, **settings}
    device = virtual_device(capacity_bytes)
    return rehearse(
        spec,
        TrainConfig(model=str(folder), **settings),
        device,
        kernel=kernel,
        run_all_layers=run_all_layers,
        gpus=gpus,
    )


def in_the_books(found):
    profile = found.device.profile(max_points=None)
    # Neither the end of the model is of the run, nor in which order autograd lets go of what a failure leaves.
    timeline = profile.timeline
    count = profile.failures[0].event if profile.failures else found.profile.event_count
    fixed = {name: timeline.bytes_by_category[name][:count] for name in ("weights", "gradients", "optimizer state")}
    work = found.work
    counted = (sorted(work.of_passes), sorted(work.of_update), work.link_bytes_of_passes, work.link_bytes_of_update)
    failures = [(failure.event, failure.phase, failure.operation, failure.size_bytes) for failure in profile.failures]
    host_bytes = found.device.host_peak_allocated_bytes
    levels = timeline.allocated_bytes[:count], timeline.reserved_bytes[:count], timeline.phases[:count]
    return count, levels, fixed, counted, failures, host_bytes


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_the_same_at_every_event(make_checkpoint, architecture, settings):
    shape = {name: settings[name] for name in WIDE if name in settings}
    settings = {name: value for name, value in settings.items() if name not in WIDE}
    folder = make_checkpoint(architecture, tied=settings.get("trainable") != "lm_head", **LAYERS, **shape)
    every = rehearsal(folder, settings, run_all_layers=True)
    some = rehearsal(folder, settings, run_all_layers=False)
    assert in_the_books(some) == in_the_books(every)
    assert some.parameters == every.parameters


ZAMBA = dict(
    **dict(
        model_type="zamba", mamba_d_state=4, mamba_dt_rank=4, n_mamba_heads=2, attention_head_dim=32, hidden_size=32
    ),
    layers_block_type=["hybrid" if place in (2, 6, 7) else "linear_attention" for place in range(13)],
    num_hidden_layers=13,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "dtype": "bf16", "gradient_accumulation_steps": 2},
        {**LORA, "quantization": "nf4", "gradient_checkpointing": True, "cheap_recompute": True},
        {"optimizer": "sgd", "dtype": "bf16", "optimizer_in_backward": True},
    ],
    ids=lambda settings: settings.get("optimizer", settings.get("trainable")),
)
def test_layers_between_those_that_hold_layers(make_checkpoint, settings):
    """Zamba's hybrid layers all run, and leave a gradient of the embeddings from the last of them on; of the others some do."""
    folder = make_checkpoint("llama", tied=True, **ZAMBA)
    settings = settings | {"packing": "concatenate"}
    every, some = (rehearsal(folder, settings, run_all_layers=way) for way in (True, False))
    assert in_the_books(some) == in_the_books(every)
    assert some.parameters == every.parameters


def test_what_comes_ahead_must_be_the_next_layers_own(make_checkpoint):
    """Some layers here have wider heads, and what runs after the first and last of the others is one of them each time."""
    types = ["full_attention" if place in (3, 6, 10) else "sliding_attention" for place in range(11)]
    folder = make_checkpoint("gemma4", num_hidden_layers=11, layer_types=types)
    settings = {**LORA, "trainable": "lora", "stream_frozen": True, "gradient_accumulation_steps": 2}
    with pytest.raises(CannotRepeat, match="what comes ahead"):
        rehearsal(folder, settings, run_all_layers=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "dtype": "bf16", "offload_optimizer": True, "save_steps": 1, **WIDE},
        {**LORA, "quantization": "nf4", "weight_precision": "correction", "save_steps": 1},
    ],
    ids=lambda settings: settings.get("optimizer", "lora"),
)
def test_what_asks_for_the_same_is_run_once(make_checkpoint, monkeypatch, settings):
    """Updates, checksums, and what a save brings to the host."""
    settings = dict(settings)
    folder = make_checkpoint("llama", tied=True, **{name: settings.pop(name) for name in WIDE if name in settings})
    some = rehearsal(folder, settings, run_all_layers=True)
    monkeypatch.setattr(VirtualGPU, "repeating", lambda self, key, function: function())
    every = rehearsal(folder, settings, run_all_layers=True)
    assert in_the_books(some) == in_the_books(every)


def test_a_table_of_rotations_goes_with_the_last_of_its_kind():
    """Every sixth layer of Gemma 4 has its own; the model here is narrow."""
    spec = resolve_for_plan("google/gemma-4-31B")
    config = copy.deepcopy(spec.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = 30, text.layer_types[:30]
    text.hidden_size, text.intermediate_size, text.vocab_size = 64, 96, 512
    run = TrainConfig(
        model="gemma-4", data=(DataSource(path="none"),), output_dir="none", max_seq_length=64, trainable="lora"
    )
    every, some = (
        rehearse(replace(spec, config=config), run, virtual_device(1 << 40), run_all_layers=way, steps=1, whole=False)
        for way in (True, False)
    )
    assert in_the_books(some) == in_the_books(every)


@pytest.mark.parametrize(
    "settings", [{**LORA, "cheap_recompute": True}, {"optimizer": "sgd", "dtype": "fp16"}], ids=["lora", "full"]
)
@pytest.mark.parametrize("shape", ["gemma2", "gpt-oss"])
def test_parts_of_one_size_are_run_once(make_checkpoint, gpt_oss_checkpoint, monkeypatch, shape, settings):
    """Slices of norms and of gated products, chunks of queries."""
    folder = gpt_oss_checkpoint if shape == "gpt-oss" else make_checkpoint("gemma2", tied=True)
    if shape == "gpt-oss":
        settings = {name: value for name, value in settings.items() if name != "cheap_recompute"}
    monkeypatch.setattr(rms_norm, "SLICE_BYTES", 20_000)
    monkeypatch.setattr(gated_product, "SLICE_BYTES", 20_000)
    monkeypatch.setattr(attention, "SCORE_BYTES", 20_000)
    calls, scores = [], attention._scores_attention
    monkeypatch.setattr(attention, "_scores_attention", lambda *given: (calls.append(1), scores(*given))[1])
    some = rehearsal(folder, settings, run_all_layers=True)
    once = len(calls)
    monkeypatch.setattr(VirtualGPU, "repeating", lambda self, key, function: function())
    every = rehearsal(folder, settings, run_all_layers=True)
    assert in_the_books(some) == in_the_books(every)
    assert len(calls) > 3 * once > 0


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"architecture": "gemma2"}, {**LORA, "quantization": "nf4"}),
        ({"architecture": "gemma2"}, {"dtype": "bf16", **CHECKPOINTED}),
        ({"architecture": "mixtral", "num_local_experts": 16}, {**LORA, "quantization": "nf4"}),
    ],
    ids=str,
)
def test_a_trial_leaves_out_what_changes_no_peak(make_checkpoint, monkeypatch, shape, settings):
    spec = resolve(str(make_checkpoint(**shape, tied=True, **LAYERS)))
    run = TrainConfig(model="x", data=(DataSource(path="none"),), output_dir="none", max_seq_length=256, **settings)
    for module in (rms_norm, gated_product):
        monkeypatch.setattr(module, "SLICE_BYTES", 20_000)

    def trial():
        found = rehearse(spec, run, virtual_device(1 << 40), whole=False, run_all_layers=False)
        profile, work = found.device.profile(max_points=None), found.work
        levels = {name: max(levels) for name, levels in profile.timeline.bytes_by_category.items()}
        peaks = profile.peak_allocated_bytes, profile.peak_reserved_bytes, profile.phases, levels
        return (peaks, sorted(work.of_passes), sorted(work.of_update)), profile.event_count

    some, events = trial()
    monkeypatch.setattr(virtual_gpu._Row, "leaves_out", lambda *given: False)
    every, all_events = trial()
    assert some == every
    assert events < 0.9 * all_events


@pytest.mark.parametrize(
    "settings",
    [
        {**LORA, **CHECKPOINTED, "quantization": "nf4", "sharding": "replicate"},
        {"optimizer": "adafactor", "dtype": "bf16", "cheap_recompute": True, "gradient_accumulation_steps": 3},
    ],
    ids=lambda settings: settings.get("optimizer", "lora"),
)
def test_the_same_where_each_of_two_gpus_holds_the_whole(make_checkpoint, settings):
    """What both exchange among it."""
    folder = make_checkpoint("llama", tied=True, **LAYERS)
    every, some = (rehearsal(folder, settings, run_all_layers=way, gpus=2) for way in (True, False))
    assert in_the_books(some) == in_the_books(every)
    assert some.work.exchanged_bytes_of_update == every.work.exchanged_bytes_of_update > 0
    assert some.work.exchanged_bytes_of_passes == every.work.exchanged_bytes_of_passes


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {**LORA, **CHECKPOINTED, "quantization": "nf4", "gradient_accumulation_steps": 4}),
        ("qwen2", {**LORA, "quantization": "int8", "mlp_tiles": 2, "cheap_recompute": True}),
        ("mixtral", {**LORA, "gradient_checkpointing": True, "quantization": "nf4", "optimizer_in_backward": True}),
        ("llama", {"trainable": "lm_head", "quantization": "nf4", "dtype": "bf16", "embeddings_on_host": True}),
        ("llama", {**LORA, "stream_frozen": True, "gradient_checkpointing": True}),
        ("mixtral", {**LORA, "experts_on_host": True, "dtype": "bf16"}),
    ],
    ids=str,
)
def test_the_same_where_frozen_weights_are_gathered(make_checkpoint, architecture, settings):
    folder = make_checkpoint(architecture, tied=settings["trainable"] != "lm_head", **LAYERS)
    every, some = (rehearsal(folder, settings, run_all_layers=way, gpus=2) for way in (True, False))
    assert in_the_books(some) == in_the_books(every)
    assert some.work.exchanged_bytes_of_passes == every.work.exchanged_bytes_of_passes > 0


@pytest.mark.parametrize("share", [0.55, 0.8, 0.97])
def test_it_runs_out_at_the_same_request(make_checkpoint, share):
    folder = make_checkpoint("llama", tied=True, **LAYERS, **WIDE)
    settings = {"optimizer": "sgd", "dtype": "bf16", "optimizer_in_backward": True, **CHECKPOINTED}
    peak_bytes = rehearsal(folder, settings, run_all_layers=True).profile.peak_reserved_bytes
    found = [
        rehearsal(folder, settings, run_all_layers=way, capacity_bytes=int(peak_bytes * share)) for way in (True, False)
    ]
    assert found[0].out_of_memory == found[1].out_of_memory is not None
    assert in_the_books(found[0]) == in_the_books(found[1])


def test_blocks_alike_are_evaluated_once(make_checkpoint, monkeypatch):
    folder = make_checkpoint("llama", tied=True)
    calls, evaluate = [], TrainingStep._add_loss
    monkeypatch.setattr(TrainingStep, "_add_loss", lambda *given: (calls.append(1), evaluate(*given)))
    settings = {"dtype": "bf16", "eval_steps": 1, "save_steps": 1}
    some = rehearsal(folder, settings, run_all_layers=True)
    once = len(calls)
    monkeypatch.setattr(VirtualGPU, "repeating", lambda self, key, function: function())
    every = rehearsal(folder, settings, run_all_layers=True)
    assert in_the_books(some) == in_the_books(every)
    assert (once, len(calls) - once) == (1, 6)
