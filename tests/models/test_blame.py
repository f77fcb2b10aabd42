"""What is said of an error that came out of a module of a model."""

import pytest
import torch
from tests.settings.commands import oomless
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from oomless.errors import UnplannableError
from oomless.models.blame import blamed


class Inner(nn.Module):
    def forward(self, numbers):
        if numbers.sum() > 0:
            return numbers @ torch.ones(3, 2)
        return numbers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Sequential(Inner())])

    def forward(self, numbers):
        for layer in self.layers:
            numbers = layer(numbers)
        return numbers


def test_the_innermost_module_is_named_in_one_line():
    with pytest.raises(RuntimeError) as caught:
        Model()(torch.ones(2, 2))
    said = str(blamed(caught.value))
    assert said.startswith("Model fails in layers.1.0 (Inner): RuntimeError: mat1 and mat2")
    assert "\n" not in said


def test_what_depends_on_values_is_no_fault_of_the_model():
    with FakeTensorMode() as mode, pytest.raises(Exception) as caught:
        Model()(mode.from_tensor(torch.ones(2, 3)))
    told = blamed(caught.value)
    assert isinstance(told, UnplannableError)
    assert str(told).startswith("Model cannot be planned: what layers.1.0 (Inner) asks for depends on values")


def test_an_error_from_elsewhere_is_nobodys():
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert blamed(caught.value) is None


def test_a_model_that_asks_by_values_trains_without_a_plan(make_checkpoint, corpus, tmp_path):
    """JetMoE's router cuts its tokens by how many each expert got."""
    given = ("--model", make_checkpoint("jetmoe"), "--gpu", "virtual:64MiB", "--max-seq-length", 64)
    for more in ((), ("--as-given",)):
        said = oomless("plan", *given, *more)
        assert said.code == 2
        assert said.err.startswith("error: JetMoe")
        assert "train --as-given" in said.err
    given += ("--data", corpus, "--output-dir", tmp_path / "run", "--max-steps", 1, "--as-given")
    said = oomless("train", *given)
    assert said.code == 0, said.err
    assert "no plan: JetMoeForCausalLM cannot be planned" in " ".join(said.out.split())
