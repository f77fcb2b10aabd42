"""What is said of an error that came out of a module of a model."""

import pytest
import torch
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
