"""The zoo's script on a few architectures."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import zoo  # noqa: E402
from oomless.config import DataSource, TrainConfig  # noqa: E402

SAMPLE = ("gpt2", "mixtral", "falcon_h1")


def test_layers_within_layers_are_rehearsed(make_checkpoint, corpus):
    """Zamba's hybrid layers hold layers of Mamba, which its config does not count."""
    own = dict(mamba_dt_rank=4, mamba_d_state=8, attn_layer_period=3, attn_layer_offset=1, num_key_value_heads=4)
    folder = make_checkpoint("mamba", model_type="zamba", num_hidden_layers=9, **own)
    given = {"gpu": "virtual:1GiB", "packing": "concatenate", "max_seq_length": 8, "trainable": "full"}
    assert zoo.planned(TrainConfig(model=str(folder), data=(DataSource(path=str(corpus)),), output_dir="none", **given))


def test_layers_that_return_more_than_a_hidden_state_are_rehearsed(tmp_path):
    assert zoo.row("hy_v4", tmp_path, ("plan",)) == {"plan": "yes"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_row_of_the_zoo_has_no_fault(tmp_path, model_type):
    row = zoo.row(model_type, tmp_path)
    assert not [value for value in row.values() if not value.startswith(("yes", "refused"))], row


@pytest.mark.full_length
@pytest.mark.parametrize("model_type", sorted(set(zoo.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(SAMPLE)))
def test_every_row_of_the_zoo_has_no_fault(tmp_path, model_type):
    row = zoo.row(model_type, tmp_path)
    assert not [value for value in row.values() if not value.startswith(("yes", "refused", "not made"))], row
