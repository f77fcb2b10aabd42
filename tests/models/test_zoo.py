"""The zoo's script on a few architectures."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import zoo  # noqa: E402

SAMPLE = ("gpt2", "mixtral", "falcon_h1")


@pytest.mark.slow
def test_layers_within_layers_are_rehearsed(tmp_path):
    """Zamba's hybrid layers hold layers of Mamba, which its config does not count."""
    assert zoo.row("zamba", tmp_path, ("plan",)) == {"plan": "yes"}


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
