"""The selective scan of models: which mixers take it, and that they train as by transformers' loop."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from oomless.ops.selective_scan import CHUNK
from oomless.techniques import selective_scan

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, pad_token_id=0)
HYBRID = dict(mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1)
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
MODELS = {
    "mamba": dict(state_size=8, time_step_rank=4),
    "falcon_mamba": dict(state_size=8, time_step_rank=4),
    "jamba": dict(num_experts=2, num_experts_per_tok=1) | HYBRID | HEADS,
    "zamba": HYBRID
    | HEADS
    | dict(n_mamba_heads=2, attention_head_dim=16, layers_block_type=["hybrid", "linear_attention", "hybrid"]),
}


def model_of(model_type, **settings):
    torch.manual_seed(0)
    given = SIZES | MODELS.get(model_type, {}) | settings | {"model_type": model_type}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).train()


def logits_and_gradients(model, tokens):
    torch.manual_seed(1)
    ids = torch.randint(1, 64, (2, tokens))
    logits = model(ids, use_cache=False).logits
    (logits.float() * logits.detach().float().cos()).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("tokens", [7, CHUNK + 5])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_trains_as_by_transformers_loop(model_type, tokens):
    model = model_of(model_type)
    plain = logits_and_gradients(model, tokens)
    model.zero_grad()
    mixers = sum(type(part).__name__.endswith("MambaMixer") for part in model.modules())
    assert selective_scan.replace(model) == mixers > 0
    for theirs, own in zip(plain, logits_and_gradients(model, tokens), strict=True):
        assert (own - theirs).norm() <= 1e-5 * theirs.norm()


def test_what_is_written_from_a_state_is_transformers_own():
    model = model_of("jamba").eval()
    ids = torch.arange(1, 9)[None]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert selective_scan.replace(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_installed_kernels_are_not_called(monkeypatch):
    """A rehearsal could not run them."""
    model = model_of("mamba")
    plain = logits_and_gradients(model, 9)
    model.zero_grad()
    functions = vars(sys.modules[type(model).__module__])
    for name in ("mamba_selective_scan", "mamba_inner_fn", "causal_conv1d_fn"):

        def kernel(*_, **__):
            raise AssertionError("a kernel")

        kernel.__wrapped__ = functions[name].__wrapped__
        monkeypatch.setitem(functions, name, kernel)
    assert selective_scan.replace(model)
    for theirs, own in zip(plain, logits_and_gradients(model, 9), strict=True):
        assert (own - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_scan_that_does_something_else_is_left_alone(monkeypatch):
    model = model_of("mamba")
    functions = vars(sys.modules[type(model).__module__])
    own = functions["mamba_selective_scan"].__wrapped__
    monkeypatch.setitem(functions, "mamba_selective_scan", lambda *given, **more: 1.01 * own(*given, **more))
    assert selective_scan.replace(model) == 0


def test_models_without_such_mixers_keep_theirs():
    llama = model_of("llama", num_attention_heads=4)
    assert selective_scan.replace(llama) == 0
    assert selective_scan.replace(model_of("mamba2", num_heads=4, head_dim=16, n_groups=1, state_size=8)) == 0


def test_it_is_known_while_nothing_has_values():
    with FakeTensorMode():
        assert selective_scan.replace(model_of("jamba")) == 2
