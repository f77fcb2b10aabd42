"""The fewest checkpointed layers that fit: one fewer would not."""

from dataclasses import replace

import pytest

from oomless.config import DataSource, TrainConfig
from oomless.models.spec import resolve
from oomless.planning.layers import fewest_checkpointed_layers
from oomless.planning.plan import plan, target_for


@pytest.fixture
def case(make_checkpoint):
    folder = make_checkpoint("llama", tied=True, num_hidden_layers=6)
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=512,
        dtype="bf16",
        per_device_train_batch_size=32,
        packing="concatenate",
    )
    return resolve(str(folder)), config


def needed(spec, config, **changes):
    return plan(spec, replace(config, **changes), target_for("virtual:16GiB")).needed_bytes


def sized(capacity_bytes):
    return target_for(f"virtual:{capacity_bytes}B")


def test_the_fewest(case):
    spec, config = case
    target = sized((needed(spec, config, gradient_checkpointing=True) + needed(spec, config)) // 2)
    found = fewest_checkpointed_layers(spec, config, target)
    count = found.checkpointed_layers
    assert 1 < count < 6
    assert plan(spec, found, target).fits
    assert not plan(spec, replace(found, checkpointed_layers=count - 1), target).fits


def test_none_all_and_too_many(case):
    spec, config = case
    everywhere = replace(config, gradient_checkpointing=True)
    assert fewest_checkpointed_layers(spec, everywhere, sized(needed(spec, config))) == config
    everything = needed(spec, everywhere)
    assert fewest_checkpointed_layers(spec, config, sized(everything)) == everywhere
    assert fewest_checkpointed_layers(spec, config, sized(everything // 2)) is None


def test_where_no_layer_can_be_checkpointed(case):
    spec, config = case
    head = replace(config, trainable="lm_head", tied_weights="untied")
    assert fewest_checkpointed_layers(spec, head, sized(1 << 34)) == head
    assert fewest_checkpointed_layers(spec, head, sized(1 << 20)) is None


def test_offloading_stays_where_it_has_an_effect(case):
    spec, config = case
    offloaded = replace(config, gradient_checkpointing=True, offload_activations=True)
    target = sized(needed(spec, offloaded))
    assert fewest_checkpointed_layers(spec, offloaded, target) == offloaded
    assert fewest_checkpointed_layers(spec, config, target) is None
