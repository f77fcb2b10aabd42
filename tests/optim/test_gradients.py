"""The norm of all gradients, and clipping."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from oomless.optim import clip_coefficient, global_gradient_norm


def with_gradients(dtype, scale=1.0):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((300, 70), (41,), (2, 3))]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters[:2]:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slice_bytes", [1 << 14, 1 << 26])
def test_norm_equals_that_of_torch_in_fp64(dtype, slice_bytes):
    parameters = with_gradients(dtype, 300.0)
    flat = torch.cat([parameter.grad.double().flatten() for parameter in parameters[:2]])
    norm = global_gradient_norm(parameters, slice_bytes=slice_bytes)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), flat.norm(), rtol=1e-5, atol=0)


def test_norm_copies_no_gradient(peak_temporaries):
    parameters = with_gradients(torch.bfloat16)
    with peak_temporaries:
        global_gradient_norm(parameters, slice_bytes=1 << 14)
    assert peak_temporaries.peak_bytes < 1024


def test_clipping_as_torch_does_it():
    ours, theirs = with_gradients(torch.float32), with_gradients(torch.float32)
    coefficient = clip_coefficient(global_gradient_norm(ours), 0.25)
    torch.nn.utils.clip_grad_norm_(theirs, 0.25)
    torch.testing.assert_close(ours[0].grad * coefficient, theirs[0].grad)
    assert clip_coefficient(torch.tensor(0.1), 0.25) == 1.0
    assert clip_coefficient(torch.tensor(0.0), 0.25) == 1.0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_element_shows_in_the_norm(bad):
    parameters = with_gradients(torch.float16)
    assert global_gradient_norm(parameters, slice_bytes=1 << 14).isfinite()
    parameters[0].grad[299, 69] = bad
    assert not global_gradient_norm(parameters, slice_bytes=1 << 14).isfinite()


def test_no_gradient_is_an_error():
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        global_gradient_norm([nn.Parameter(torch.zeros(2))])


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        parameter = nn.Parameter(torch.zeros(8))
        parameter.grad = torch.zeros(8)
        assert clip_coefficient(global_gradient_norm([parameter]), 1.0).dim() == 0
