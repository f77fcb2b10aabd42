"""APOLLO, GaLore and Muon against plain forms of their formulas."""

import pytest
import torch
from torch import nn

from oomless.optim import NAMES, Apollo, ApolloMini, GaLore, Muon, build
from oomless.optim.muon import orthogonalised
from oomless.optim.noise import noise_constants, noise_key, random_signs

RANK = 4


def reference(kind, weight, gradients, lr, refresh_steps):
    """The whole matrix at once, in fp64, with channels as rows."""
    wide = weight.shape[1] > weight.shape[0]
    value = (weight.t() if wide else weight).detach().double()
    rank = 1 if kind is ApolloMini else RANK
    first, second = (torch.zeros(value.shape[0], rank, dtype=torch.float64) for _ in range(2))
    last_norm = None
    for number, gradient in enumerate(gradients, 1):
        channels = (gradient.t() if wide else gradient).double()
        key = noise_key(noise_constants(1, 0), torch.tensor(float((number - 1) // refresh_steps)))
        signs = random_signs(key, (channels.shape[1], rank)).double()
        projection = signs / (channels.shape[1] if kind is GaLore else rank) ** 0.5
        projected = channels @ projection
        first = 0.9 * first + 0.1 * projected
        second = 0.999 * second + 0.001 * projected**2
        adam = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        if kind is GaLore:
            update = adam @ projection.t()
        else:
            over = (1,) if kind is Apollo else (0, 1)
            factor = adam.norm(dim=over, keepdim=True) / projected.norm(dim=over, keepdim=True)
            update = factor * channels
            norm = update.norm()
            if last_norm is not None and norm > 1.01 * last_norm:
                update *= 1.01 * last_norm / norm
            last_norm = update.norm()
            update *= 128**0.5 if kind is ApolloMini else 1.0
        value = value * (1 - lr * 0.1) - lr * update
    return value.t() if wide else value


@pytest.mark.parametrize("kind", [Apollo, ApolloMini, GaLore])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_equals_the_formula(kind, shape):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
    gradients = [torch.randn(shape, generator=generator) * 1.3**number for number in range(7)]
    expected = reference(kind, weight, gradients, 1e-2, 3)
    settings = {} if kind is ApolloMini else {"rank": RANK}
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1, refresh_steps=3, slice_bytes=1 << 14, **settings)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_a_new_projection_comes_every_refresh_steps():
    weight = nn.Parameter(torch.zeros(32, 16))
    optimizer = GaLore([weight], lr=1.0, rank=2, refresh_steps=2, weight_decay=0.0, betas=(0.0, 0.0))
    updates = []
    for _ in range(4):
        before = weight.detach().clone()
        weight.grad = torch.ones(32, 16) + torch.eye(32, 16)
        optimizer.step()
        updates.append(weight.detach() - before)
    assert torch.allclose(updates[0], updates[1], atol=1e-5)
    assert not torch.allclose(updates[1], updates[2], atol=1e-2)
    assert torch.linalg.matrix_rank(updates[0]) <= 2


@pytest.mark.parametrize(
    ("name", "settings", "shape", "expected"),
    [
        ("apollo", {"rank": 64}, (1024, 512), 8 * 1024 * 64 + 4 + 4),
        ("apollo_mini", {}, (1024, 512), 8 * 1024 + 4 + 4),
        ("galore", {"rank": 64}, (512, 1024), 8 * 1024 * 64 + 4),
        ("muon", {"orthogonalise": True}, (1024, 512), 4 * 1024 * 512 + 4),
        ("muon", {"orthogonalise": False}, (1024, 512), 8 * 1024 * 512 + 4),
    ],
)
def test_bytes_of_state(name, settings, shape, expected):
    optimizer = build(name, [nn.Parameter(torch.zeros(4, 4))], lr=1e-3, **settings)
    assert optimizer.state_bytes(shape, torch.float32) == expected
    assert optimizer.state_bytes((100,), torch.float32) == 804


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_muon_follows_that_of_torch(shape):
    """torch iterates in bf16, we in the weight's precision: directions agree, digits do not."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator) * 0.02
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=1e-2, weight_decay=0.1, orthogonalise=True)
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_orthogonalised_has_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(48, 96)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_wants_to_be_told_which_matrices():
    matrix, embedding = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(100, 8))
    with pytest.raises(ValueError, match="every group to set orthogonalise"):
        build("muon", [matrix], lr=1e-3)
    groups = [
        {"params": [matrix], "orthogonalise": True},
        {"params": [embedding], "orthogonalise": False},
    ]
    optimizer = build("muon", groups, lr=1e-3)
    assert set(optimizer.state_tensors(matrix)) == {"step", "momentum"}
    assert set(optimizer.state_tensors(embedding)) == {"step", "first_moment", "second_moment"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "way"), [(torch.float32, None), (torch.bfloat16, "stochastic")], ids=str)
def test_no_second_tensor_of_the_size_of_an_embedding(name, dtype, way, peak_temporaries):
    """Not even what makes other matrices orthogonal or projects them: a slice, and with APOLLO some numbers for each row."""
    embedding = nn.Parameter(torch.ones(1024, 128, dtype=dtype))
    settings = {"muon": {"orthogonalise": False}, "apollo": {"rank": 4}, "galore": {"rank": 4}}.get(name, {})
    optimizer = build(name, [embedding], lr=1e-3, weight_precision=way, slice_bytes=1 << 15, **settings)
    embedding.grad = torch.ones_like(embedding)
    with peak_temporaries:
        optimizer.step(gradient_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert peak_temporaries.peak_bytes <= (1 << 15) + (16 * 1024 if "apollo" in name else 0) + (1 << 13)
    assert peak_temporaries.peak_bytes < embedding.nbytes / 4
