"""An export holds a few tensors, whatever the size of the model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


@pytest.mark.full_length
@pytest.mark.timeout(1800)
def test_three_tensors_and_a_gigabyte(tmp_path):
    """On a model of several GB: the largest resident memory of the whole process, libraries and mapped files with it."""
    from export_memory import compare

    found = compare(tmp_path, 3 * 10**9, theirs=False)
    assert found["model_bytes"] > 2.5e9
    for verify in ("none", "sample"):
        assert found[f"ours, verify {verify}"]["peak_bytes"] < 10**9 + 3 * found["largest_tensor_bytes"]
