"""Parts of layers by one operator each: which are known, that they are tried, what they move and what they need."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.models.spec import resolve_for_plan
from oomless.ops import gated_product, rms_norm
from oomless.ops import rotary as rotation
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.techniques import layer_parts, rotary

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def model_of(model_type, **settings):
    given = SIZES | dict(model_type=model_type, num_key_value_heads=2) | settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [("llama", 5), ("mistral", 5), ("qwen2", 5), ("qwen3", 9), ("gemma", 5), ("gemma2", 9), ("gemma3_text", 13)],
)
def test_all_parts_of_known_models_are_replaced(model_type, norms):
    model = model_of(model_type)
    assert layer_parts.replace(model, plain=False) == norms + 2
    assert rotary.replace(model) == 2
    for part in model.modules():
        known = type(part).__name__.endswith(("RMSNorm", "MLP", "Attention"))
        assert ("forward" in vars(part)) == known, type(part)


def test_what_takes_more_than_one_input_keeps_its_forward():
    """A norm that may be given a gate."""

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x, gate=None):
            wide = x.float()
            normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * normal.to(x.dtype) if gate is None else gate

    assert layer_parts.norm_form(Gated()) is None


def test_what_drops_out_by_itself_keeps_its_forward():
    """Also while it is evaluated, when nothing is dropped."""
    model = model_of("seed_oss", head_dim=8)
    before = torch.random.get_rng_state()
    assert layer_parts.replace(model.eval(), plain=False) == 5  # norms
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_activation_that_learns_is_left_alone():
    """In a plan its numbers are not there."""
    with FakeTensorMode():
        model = model_of("apertus", hidden_act="xielu")
        assert layer_parts.replace(model, plain=False) == 9  # norms


def test_attention_that_rotates_otherwise_keeps_its_forward():
    """By pairs of neighbours."""
    model = model_of("cohere2", pad_token_id=0, eos_token_id=1, bos_token_id=2)
    assert rotary.replace(model) == 0
    assert rotary.trials(model, torch.device("cpu")) == {}


def test_kernels_are_tried_against_their_plain_form(monkeypatch):
    model = model_of("gemma").to(torch.bfloat16)
    assert layer_parts.trials(model, torch.device("cpu")) == {}
    layer_parts.replace(model, norm_dtype=torch.bfloat16)
    rotary.replace(model)
    tries = layer_parts.trials(model, torch.device("cpu")) | rotary.trials(model, torch.device("cpu"))
    assert tries.keys() == {layer_parts.NORMS, layer_parts.PRODUCTS, rotary.ROTARY}
    for make in tries.values():
        make()
    for module, name, part in (
        (rms_norm, "_FORWARD", layer_parts.NORMS),
        (rms_norm, "_BACKWARD", layer_parts.NORMS),
        (gated_product, "_FORWARD", layer_parts.PRODUCTS),
        (gated_product, "_BACKWARD", layer_parts.PRODUCTS),
        (rotation, "_OPERATOR", rotary.ROTARY),
    ):
        right = getattr(module, name)

        def a_tenth_more(*given, right=right, **results):
            right(*given, **results)
            next(iter(results.values())).mul_(1.1)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, a_tenth_more)
            with pytest.raises(RuntimeError, match=f"fused {part} of torch.* differ"):
                tries[part]()


def rehearsal(layers, *, model="meta-llama/Llama-3.2-1B", **settings):
    spec = copy.deepcopy(resolve_for_plan(model))
    spec.config.num_hidden_layers = layers
    given = {"max_seq_length": 2048, "optimizer": "sgd", "dtype": "fp16", "weight_precision": "plain"} | settings
    run = TrainConfig(model=model, data=(DataSource(path="none"),), output_dir="none", **given)
    return rehearse(spec, run, virtual_device(1 << 40), steps=1, whole=False)


def test_what_a_layer_of_llama_moves():
    """Of 2,048 tokens, by what is no product of matrices and no attention: less than a third of 95 operators and 2.08 GB, as it was."""
    found = []
    for layers in (2, 3):
        work = rehearsal(layers).work
        costs = [(count, size * count) for (_, flops, size), count in work.of_passes if not flops]
        found.append([sum(column) / work.passes for column in zip(*costs, strict=True)])
    operators, moved_bytes = (more - less for less, more in zip(*found, strict=True))
    assert operators <= 21
    assert moved_bytes <= 0.58e9


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fp32_residual": True, "cheap_recompute": True},
        {"trainable": "lora", "weight_precision": None, "gradient_checkpointing": True, "mlp_tiles": 4},
    ],
    ids=str,
)
def test_fused_parts_need_no_more_memory(settings):
    fused, plain = (rehearsal(2, kernels=way, **settings).profile for way in ("auto", "plain"))
    assert fused.peak_allocated_bytes <= plain.peak_allocated_bytes
    assert fused.peak_reserved_bytes <= plain.peak_reserved_bytes
