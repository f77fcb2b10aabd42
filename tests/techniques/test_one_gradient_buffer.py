"""The replaced embedding is the architecture's own, with fewer buffers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from oomless.techniques import one_gradient_buffer

IDS = torch.arange(40).view(2, 20) * 17 % 512


def run(model):
    model.train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return model.get_input_embeddings()(IDS), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "qwen2", "qwen3"])
def test_rows_and_gradients_are_those_of_the_architecture(make_checkpoint, architecture, tied):
    folder = make_checkpoint(architecture, tied=tied)
    plain, lean = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    one_gradient_buffer.apply(lean)
    assert one_gradient_buffer.head_destination(lean) == ("in_place" if tied else "final")
    (rows, gradients), (lean_rows, lean_gradients) = run(plain), run(lean)
    assert torch.equal(rows, lean_rows)
    assert gradients.keys() == lean_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("change", ["frozen", "max_norm", "other class"])
def test_other_embeddings_are_left_alone(make_checkpoint, change):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", tied=True))
    module = model.get_input_embeddings()
    if change == "frozen":
        module.weight.requires_grad_(False)
    elif change == "max_norm":
        module.max_norm = 1.0
    else:
        module.__class__ = type("Scaled", (torch.nn.Embedding,), {})
    one_gradient_buffer.apply(model)
    assert "forward" not in vars(module)
    assert one_gradient_buffer.head_destination(model) == "new"


def test_the_model_can_die(make_checkpoint):
    """No cycle: the memory of a model goes when its last name goes, not at the next garbage collection."""
    import gc
    import weakref

    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", tied=True))
    gc.collect()
    gc.disable()
    try:
        one_gradient_buffer.apply(model)
        embedding = weakref.ref(model.model.embed_tokens)
        model.model.embed_tokens = torch.nn.Identity()
        assert embedding() is None
    finally:
        gc.enable()
