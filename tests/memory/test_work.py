"""What a step computes and moves, counted by its rehearsal, against counts by hand."""

import pytest

from oomless.config import TrainConfig
from oomless.models.spec import resolve
from oomless.planning.rehearse import rehearse, virtual_device

LENGTH, WIDTH, INNER, VOCABULARY, LAYERS, HEADS, KEY_HEADS, HEAD = 64, 64, 96, 512, 2, 4, 2, 16
ONE_LAYER = WIDTH * (HEADS + 2 * KEY_HEADS) * HEAD + HEADS * HEAD * WIDTH + 3 * WIDTH * INNER
"""Weights of a layer's matrices."""


def work_of(folder, **settings):
    common = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": LENGTH, "dtype": "bf16"}
    config = TrainConfig.from_mapping(common | {"packing": "concatenate"} | settings)
    found = rehearse(resolve(str(folder)), config, virtual_device(), kernel="efficient", steps=1, whole=False)
    assert found.out_of_memory is None
    return found.work


def attention_flops():
    """Scores and values forward: two products; backward: five."""
    product = 2 * HEADS * LENGTH * LENGTH * HEAD
    return LAYERS * product * (2 + 5)


def test_a_step_is_six_operations_for_each_weight_and_token(make_checkpoint):
    """Eight for the head's, whose logits in 16 bits are made twice: for the softmax's sums, then for the gradients."""
    work = work_of(make_checkpoint("llama", tied=True))
    products = 6 * LENGTH * LAYERS * ONE_LAYER + 8 * LENGTH * VOCABULARY * WIDTH
    assert work.flops() == {"bf16": products + attention_flops()}
    assert work.passes == 1
    assert not work.link_bytes_of_update


def test_checkpointing_computes_the_layers_once_more(make_checkpoint):
    """All but each layer's last product, whose result nothing needs again."""
    folder = make_checkpoint("llama", tied=True)
    once, twice = (work_of(folder, gradient_checkpointing=on).flops()["bf16"] for on in (False, True))
    again = 2 * LENGTH * LAYERS * (ONE_LAYER - WIDTH * INNER)
    assert twice - once == again + attention_flops() * 2 // 7


def test_frozen_parts_have_no_gradients(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    head = work_of(folder, trainable="lm_head", tied_weights="untied").flops()["bf16"]
    body = 2 * LENGTH * LAYERS * ONE_LAYER + attention_flops() * 2 // 7
    assert head == body + 6 * LENGTH * VOCABULARY * WIDTH


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_passes_are_rehearsed_twice_at_most(make_checkpoint, accumulation):
    work = work_of(make_checkpoint("llama", tied=True), gradient_accumulation_steps=accumulation)
    assert work.passes == min(2, accumulation)


def test_an_offloaded_optimizer_goes_out_and_back(make_checkpoint):
    """8 bytes of moments and 4 of master for each weight that is large enough, in both directions."""
    folder = make_checkpoint("llama", tied=True, hidden_size=256, intermediate_size=512, head_dim=64)
    work = work_of(folder, offload_optimizer=True)
    large = [(256, 256), (256, 256), (512, 256), (512, 256), (256, 512)] * 2 + [(512, 256)]
    weights = sum(rows * columns for rows, columns in large)
    key_and_value = 4 * 128 * 256  # two of 32,768 elements in each layer stay on the GPU
    assert weights > key_and_value
    assert work.link_bytes_of_update == 2 * 12 * weights
