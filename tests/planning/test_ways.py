"""What is known of a way before it is tried, beside trials of it."""

import pytest

from oomless.models.spec import resolve
from oomless.planning.plan import Target
from oomless.planning.strategies import Quality, micro_batches, rungs
from oomless.planning.trial import Laboratory, Setting
from oomless.planning.ways import Ways

MiB = 1 << 20


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw", "master"), ("adamw_8bit", "correction"), ("apollo", "stochastic"), ("adafactor", "master")],
)
def test_what_goes_over_the_link_at_least_is_no_more_than_what_does(make_checkpoint, trainable, optimizer, precision):
    folder = make_checkpoint("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=1024)
    target = Target(
        name="64 MiB",
        capacity_bytes=64 * MiB,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(8, 0),
        kernel="auto",
    )
    base = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": 128, "tokens_per_step": 256}
    setting = Setting(spec=resolve(str(folder)), target=target, base={**base, "packing": "concatenate"})
    laboratory = Laboratory(setting, 1, None)
    quality = Quality(
        trainable=trainable,
        tied_weights=None,
        quantization=None,
        optimizer=optimizer,
        weight_precision=precision,
        clips=True,
    )
    passes = micro_batches(setting.base)
    built = laboratory.parts(quality.settings())
    ways = list(Ways(setting, laboratory, passes).of(quality, built))
    ladder = rungs({}, built.layers, cheap_recompute=True, mlp_tiles=True)
    assert any(sum(way.link_bytes) for way in ways)
    for way in ways:
        for rung in (ladder[0], ladder[-2]):
            (trial,) = laboratory.trials([way.settings | passes[0] | rung], limited=False)
            assert trial.refused is None
            of_pass, of_update = way.link_bytes
            assert of_pass * trial.work["passes"] <= trial.work["link_bytes_of_passes"]
            assert of_update <= trial.work["link_bytes_of_update"]
