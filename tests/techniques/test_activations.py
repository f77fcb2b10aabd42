"""The ways to keep less for backward: the plain path's loss and gradients, exact bytes, refusals."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import MicroBatch
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.techniques import cheap_recompute, layer_parts, mlp_tiles
from oomless.training.assemble import assemble
from oomless.training.loss import hidden_states

CHECKPOINTED = {"gradient_checkpointing": True}
WAYS = {
    "checkpointing": CHECKPOINTED,
    "fused": {},
    "offload": CHECKPOINTED | {"offload_activations": True},
    "cheap": {"cheap_recompute": True},
    "tiles": {"mlp_tiles": 3},
    "cheap, tiles": {"cheap_recompute": True, "mlp_tiles": 5},
    "all": CHECKPOINTED
    | {"checkpointed_layers": 3, "offload_activations": True, "cheap_recompute": True, "mlp_tiles": 2},
}
PLAIN = {"kernels": "plain"}
LENGTHS = ((20, 1, 43), (64,))
TOKENS = 64


def configure(folder, **settings):
    return TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=TOKENS,
        **{"dtype": "fp32", "optimizer": "sgd", "learning_rate": 0.1, **settings},
    )


def micro_batches(count=2):
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 512, (len(LENGTHS), TOKENS), generator=generator)
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
        batches.append(
            MicroBatch(
                input_ids=ids,
                labels=ids.roll(-1, 1),
                position_ids=positions,
                document_lengths=LENGTHS,
                target_count=ids.numel(),
            )
        )
    return batches


def assembled(folder, device, **settings):
    torch.manual_seed(0)
    return assemble(resolve(str(folder)), configure(folder, **settings), device, fill=True)


def loss_and_gradients(folder, **settings):
    """Of two micro-batches; LoRA's second matrices are given values, so that its first ones have gradients."""
    device = VirtualGPU(1 << 40)
    with device.active():
        parts = assembled(folder, device, **settings)
        with torch.no_grad():
            for name, parameter in parts.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) / 10)
        torch.manual_seed(9)
        loss = parts.step.accumulate(micro_batches(), 2 * 2 * TOKENS)
    found = {name: p.grad.clone() for name, p in parts.model.named_parameters() if p.grad is not None}
    return loss.clone(), found


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=5e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "qwen2", "qwen3"])
def test_loss_and_gradients_are_the_plain_ones(make_checkpoint, architecture, way):
    folder = make_checkpoint(architecture, tied=True, num_hidden_layers=4)
    assert_same(loss_and_gradients(folder, **WAYS[way]), loss_and_gradients(folder, **PLAIN))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "parts",
    [
        {"trainable": "lora+lm_head", "tied_weights": "shared", "lora_r": 4},
        {"trainable": "lora", "lora_r": 4},
        {"trainable": "model.layers.0.self_attn*+model.layers.1.*"},
        {"trainable": "embed_tokens", "tied_weights": "untied"},
        {"trainable": "lora", "lora_r": 4, "quantization": "nf4"},
    ],
    ids=lambda parts: "-".join(map(str, parts.values())),
)
def test_with_frozen_parts(make_checkpoint, parts, way):
    folder = make_checkpoint("llama", tied=True, num_hidden_layers=4)
    assert_same(loss_and_gradients(folder, **parts, **WAYS[way]), loss_and_gradients(folder, **parts, **PLAIN))


@pytest.mark.parametrize("way", ["fused", "offload", "cheap", "all"])
@pytest.mark.parametrize("architecture", ["gemma", "llama"])
def test_with_sums_in_fp32(make_checkpoint, architecture, way):
    """fp16 around them: the loss is the same to the bit, gradients as near as fp16 allows."""
    folder = make_checkpoint(architecture, tied=True, num_hidden_layers=4)
    common = {"dtype": "fp16", "fp32_residual": True}
    ours, plain = (loss_and_gradients(folder, **common, **settings) for settings in (WAYS[way], PLAIN))
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=0)
    for name, gradient in plain[1].items():
        assert (ours[1][name].float() - gradient.float()).norm() <= 5e-3 * gradient.float().norm() + 1e-4, name


@pytest.mark.parametrize("tiles", [None, 3])
@pytest.mark.parametrize("way", ["checkpointing", "offload", "cheap", "all"])
def test_dropout_is_the_same_in_recomputation(make_checkpoint, way, tiles):
    """Each tile draws for itself, so the plain path is the one with as many tiles."""
    folder = make_checkpoint("llama", num_hidden_layers=4, attention_dropout=0.1)
    common = {"trainable": "lora", "lora_r": 4, "lora_dropout": 0.3} | ({"mlp_tiles": tiles} if tiles else {})
    settings = {name: value for name, value in WAYS[way].items() if name != "mlp_tiles"}
    plain = loss_and_gradients(folder, **common)
    assert_same(loss_and_gradients(folder, **common, **settings), plain)
    calm = loss_and_gradients(folder, **(common | {"lora_dropout": 0.0}))
    assert not torch.allclose(calm[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize("parts", [{"trainable": "full"}, {"trainable": "lora+lm_head", "tied_weights": "shared"}])
@pytest.mark.parametrize("way", WAYS)
def test_with_updates_in_backward(make_checkpoint, way, parts):
    folder = make_checkpoint("qwen3", tied=True, num_hidden_layers=4)
    weights = []
    for settings in ({"max_grad_norm": 0.0} | PLAIN, WAYS[way] | {"optimizer_in_backward": True}):
        device = VirtualGPU(1 << 40)
        with device.active():
            run = assembled(folder, device, gradient_accumulation_steps=2, **parts, **settings)
            for _ in range(2):
                run.step.run(micro_batches())
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-4, atol=1e-6)


def kept_bytes(folder, layers, device=None, **settings):
    """What lies on the device between the body's forward and backward, beyond the model."""
    spec = resolve(str(folder))
    spec.config.num_hidden_layers = layers
    spec.config.layer_types = None
    device = device or VirtualGPU(1 << 40)
    with device.active():
        run = assemble(spec, configure(folder, dtype="bf16", **settings), device, fill=False)
        run.model.train()
        ids = device.put(torch.zeros(2, TOKENS, dtype=torch.int64))
        before = device.usage().allocated_bytes
        hidden = hidden_states(run.model, ids, None, None)
        return device.usage().allocated_bytes - before - hidden.nbytes


def test_what_a_layer_keeps(make_checkpoint):
    """N tokens, width D, width I inside the MLP; all in bf16."""
    folder = make_checkpoint("llama", tied=True)
    n, d, i = 2 * TOKENS, 64, 96

    def layer(**settings):
        return kept_bytes(folder, 4, **settings) - kept_bytes(folder, 3, **settings)

    plain = layer(**PLAIN)
    assert layer(**CHECKPOINTED) == 2 * n * d
    assert kept_bytes(folder, 4, **CHECKPOINTED, **PLAIN, checkpointed_layers=3) == (
        kept_bytes(folder, 4, **CHECKPOINTED, **PLAIN) - 2 * n * d + plain
    )
    # Of each of two norms: the fp32 copy and the rounded one; instead the input. Of the MLP: the activation.
    assert plain - layer() == 2 * (4 + 2 - 2) * n * d + 2 * n * i
    # Of each of two norms: the fp32 copy, the rounded one and the output; instead the input. Of the MLP: two of four.
    assert plain - layer(cheap_recompute=True) == 2 * (4 + 2 + 2 - 2) * n * d + 2 * (2 * n * i)
    # With sums in fp32 their copy is the input itself, what each norm makes is in fp32, and the output is rounded.
    wide = {"fp32_residual": True}
    assert layer(**wide, **PLAIN) - layer(**wide, cheap_recompute=True) == 2 * (4 + 4 + 2 - 4) * n * d + 2 * (2 * n * i)
    assert layer(**wide, **PLAIN) - layer(**wide) == 2 * (4 + 4 - 4) * n * d + 2 * n * i
    # All four, while the MLP's input is what the plain path keeps as well.
    assert plain - layer(mlp_tiles=2, **PLAIN) == 4 * (2 * n * i)
    # The MLP's input is a norm's output, which is computed again.
    assert plain - layer(mlp_tiles=2, cheap_recompute=True) == 2 * (4 + 2 + 2 - 2) * n * d + 4 * (2 * n * i)


def test_offloaded_inputs_lie_on_the_host(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    one = 2 * 2 * TOKENS * 64
    here = kept_bytes(folder, 6, **CHECKPOINTED)
    device = VirtualGPU(1 << 40)
    # The last layer's stays; the device holds no other when forward is over.
    assert kept_bytes(folder, 6, device, **CHECKPOINTED, offload_activations=True) == here - 5 * one
    assert device.host_peak_allocated_bytes == 5 * one


@pytest.mark.parametrize("layers", [6, 9])
def test_two_inputs_are_on_the_device_at_most(make_checkpoint, layers):
    """The peak of a step grows with the layers' weights and gradients alone."""
    folder = make_checkpoint("llama", tied=True)
    peaks = []
    for count in (layers, layers + 1):
        spec = resolve(str(folder))
        spec.config.num_hidden_layers = count
        spec.config.layer_types = None
        device = VirtualGPU(1 << 40)
        with device.active():
            config = configure(folder, trainable="lm_head", tied_weights="shared", **WAYS["offload"])
            run = assemble(spec, config, device, fill=False)
            held = device.usage().allocated_bytes
            device.reset_peak()
            run.step.run(micro_batches(1))
            peaks.append(device.usage().peak_allocated_bytes - held)
    assert peaks[0] == peaks[1]


def refused(folder, device, match, **settings):
    with device.active(), pytest.raises(ConfigError, match=match):
        assembled(folder, device, **settings)


def test_what_has_no_effect_is_refused(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    head = {"trainable": "lm_head", "tied_weights": "untied"}
    gpu = VirtualGPU(1 << 40)
    refused(folder, gpu, "gradient_checkpointing has no effect", **head, **CHECKPOINTED)
    refused(folder, gpu, "cheap_recompute has no effect: backward runs", **head, cheap_recompute=True)
    refused(folder, gpu, "at most 2, .* got 3", **CHECKPOINTED, checkpointed_layers=3)
    upper = {"trainable": "model.layers.1.*"} | CHECKPOINTED
    refused(folder, gpu, "at most 1, .* got 2", **upper, checkpointed_layers=2)
    refused(folder, gpu, "single checkpointed layer", **upper, offload_activations=True)
    refused(folder, Device(), "no effect on a CPU", **WAYS["offload"])


def model_of(**settings):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **settings}))


def test_unknown_mlps_are_refused():
    experts = model_of(
        model_type="mixtral", intermediate_size=48, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ConfigError, match="MixtralDecoderLayer has none"):
        mlp_tiles.apply(experts, 2)
    two_matrices = model_of(model_type="gpt_neox", intermediate_size=48)
    with pytest.raises(ConfigError, match="no norm or MLP of this model is one that it knows"):
        cheap_recompute.apply(two_matrices)


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        ("llama", (True, False)),
        ("mistral", (True, False)),
        ("qwen3", (True, False)),
        ("phi3", (True, False)),
        ("gemma", (False, True)),
        ("gemma3_text", (False, True)),
        ("olmo2", (False, False)),
        ("qwen2", (True, False)),
        ("gemma2", (False, True)),
    ],
)
def test_modules_are_recognised_by_what_they_compute(model_type, form):
    extra = {"pad_token_id": None} if model_type == "phi3" else {}
    model = model_of(model_type=model_type, intermediate_size=48, num_key_value_heads=2, **extra)
    norm = layer_parts.norm_form(model.base_model.norm)
    assert norm is not None
    assert (norm.round_first, norm.unit_offset) == form
    mlp = layer_parts.gated_mlp(model.base_model.layers[0].mlp)
    assert mlp is not None
    assert mlp.kernel == ("gelu_tanh" if model_type.startswith("gemma") else "silu")


def test_look_alikes_are_not_recognised():
    """The parts of a gated MLP, put together otherwise, and a norm that subtracts the mean."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            self.down_proj, self.act_fn = nn.Linear(6, 4, bias=False), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    assert layer_parts.gated_mlp(Other()) is None
    assert layer_parts.norm_form(Centred()) is None
    assert layer_parts.norm_form(nn.LayerNorm(4)) is None


def test_the_model_can_die(make_checkpoint):
    """No cycle: the memory of a layer goes when its last name goes, not at the next garbage collection."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
    gc.collect()
    gc.disable()
    try:
        cheap_recompute.apply(model)
        mlp_tiles.apply(model, 2)
        layer = weakref.ref(model.model.layers[0])
        model.model.layers[0] = nn.Identity()
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["checkpointed_layers", "offload_activations"])
def test_belongs_to_checkpointing(name):
    with pytest.raises(ConfigError, match=f"{name} has no effect without gradient_checkpointing"):
        configure("m", **{name: 1 if name.endswith("layers") else True})
    config = configure("m", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="mlp_tiles must be at least 2; got 1"):
        replace(config, mlp_tiles=1)
    with pytest.raises(ConfigError, match="checkpointed_layers must be at least 1; got 0"):
        replace(config, checkpointed_layers=0)
