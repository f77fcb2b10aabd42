"""Sixteen-bit updates in three ways: fp32 weights, weights rounded to nearest after every step, and ours.

All see the same sixteen-bit gradients. What is compared is how far the weights went from where they began.
"""

import pytest
import torch
from torch import nn

from oomless.optim import NAMES, build

SHAPES = [(66, 97), (33, 16), (7,)]
SETTINGS = {
    "apollo": {"rank": 8, "refresh_steps": 3},
    "apollo_mini": {"refresh_steps": 3},
    "galore": {"rank": 8, "refresh_steps": 3},
    "muon": {"orthogonalise": True},
}
RATES = {"sgd": 1e-4, "muon": 2e-3}
STEPS = 16
NAIVE = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def starts(dtype):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in SHAPES]


def ways(optimizer, parameters, dtype):
    """Return how far the parameters went in some steps, as fp32."""
    generator = torch.Generator().manual_seed(1)
    drift = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for _ in range(STEPS):
        for parameter, steady in zip(parameters, drift, strict=True):
            gradient = (steady + torch.randn(parameter.shape, generator=generator)).to(dtype)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [p.detach().float() - start.float() for p, start in zip(parameters, starts(dtype), strict=True)]


def ours(name, dtype, way):
    parameters = [nn.Parameter(start if way else start.float()) for start in starts(dtype)]
    settings = SETTINGS.get(name, {})
    optimizer = build(name, parameters, lr=RATES.get(name, 1e-4), weight_precision=way, slice_bytes=1 << 16, **settings)
    return ways(optimizer, parameters, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_further_from_the_truth_than_rounding_to_nearest(name, dtype):
    truth, naive = ours(name, dtype, None), ours(name, dtype, "plain")
    for way in ("master", "correction", "stochastic"):
        for true, rough, own in zip(truth, naive, ours(name, dtype, way), strict=True):
            error, lost = (own - true).norm(), (rough - true).norm()
            # Where it lands, each weight is rounded to its sixteen bits once.
            final = torch.finfo(dtype).eps * 0.1 * true.numel() ** 0.5
            if way == "stochastic":  # right on average: what is lost is noise, and the mean of the way is kept
                assert error <= 2 * lost + final
                along = (own * true).sum() / true.square().sum()
                assert abs(along - 1) <= abs((rough * true).sum() / true.square().sum() - 1) + 0.05
            else:
                assert error <= lost + final
                assert error <= 0.5 * lost or lost <= 2 * final


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_torch_in_bf16_loses_more(name):
    """The plain lines of a user: torch's own optimizer on bf16 weights, its state in bf16 as well."""
    parameters = [nn.Parameter(start) for start in starts(torch.bfloat16)]
    settings = {"momentum": 0.9} if name == "sgd" else {"weight_decay": 0.0}
    theirs = ways(NAIVE[name](parameters, lr=RATES.get(name, 1e-4), **settings), parameters, torch.bfloat16)
    truth, own = ours(name, torch.bfloat16, None), ours(name, torch.bfloat16, "correction")
    for true, rough, exact in zip(truth, theirs, own, strict=True):
        assert (exact - true).norm() < (rough - true).norm() / 2
