"""Updates inside the backward pass give what an ordinary step gives, or are refused."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from oomless.optim import NAMES, FusedBackward, build, global_gradient_norm

SETTINGS = {"muon": {"orthogonalise": True}}


def model():
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 16)
    head = nn.Linear(16, 20, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Linear(16, 16), nn.Tanh(), head)


def loss_of(network, number):
    tokens = torch.randint(0, 20, (64,), generator=torch.Generator().manual_seed(number))
    return nn.functional.cross_entropy(network(tokens), tokens.roll(1))


def optimizer_of(name, network):
    return build(name, network.parameters(), lr=0.01, seed=5, **SETTINGS.get(name, {}))


def assert_same_weights(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def fused_step(fused, network, number, scale=None):
    with fused.updating(scale):
        loss_of(network, number).backward()
    return fused.finish()


@pytest.mark.parametrize("name", NAMES)
def test_equals_an_ordinary_step_with_tied_weights(name):
    fused_model, plain_model = model(), model()
    fused, plain = FusedBackward(optimizer_of(name, fused_model)), optimizer_of(name, plain_model)
    for number in range(5):
        norm, found_inf = fused_step(fused, fused_model, number, torch.tensor(0.5))
        assert all(parameter.grad is None for parameter in fused_model.parameters())
        loss_of(plain_model, number).backward()
        torch.testing.assert_close(norm, global_gradient_norm(plain_model.parameters()))
        assert found_inf == 0.0
        plain.step(gradient_scale=torch.tensor(0.5))
        plain.zero_grad()
    assert_same_weights(fused_model, plain_model)


def test_accumulates_over_micro_batches():
    fused_model, plain_model = model(), model()
    fused, plain = FusedBackward(optimizer_of("adamw", fused_model)), optimizer_of("adamw", plain_model)
    before = [parameter.detach().clone() for parameter in fused_model.parameters()]
    for number in range(3):
        loss_of(plain_model, number).backward()
    plain.step()
    for number in range(2):
        loss_of(fused_model, number).backward()
    assert all(map(torch.equal, before, fused_model.parameters()))
    fused_step(fused, fused_model, 2)
    assert_same_weights(fused_model, plain_model)


def test_a_second_gradient_without_finish_is_refused():
    network = model()
    fused = FusedBackward(optimizer_of("sgd", network))
    with fused.updating():
        loss_of(network, 0).backward()
        with pytest.raises(RuntimeError, match=r"second gradient since the last FusedBackward.finish\(\)"):
            loss_of(network, 1).backward()
    fused.finish()
    with pytest.raises(RuntimeError, match="no parameter was updated"):
        fused.finish()


def test_reentrant_checkpointing_of_a_shared_weight_is_refused():
    shared = nn.Linear(8, 8)
    fused = FusedBackward(optimizer_of("sgd", shared))
    hidden = torch.ones(2, 8, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(shared, hidden, use_reentrant=True)
    with fused.updating(), pytest.raises(RuntimeError, match="non-reentrant checkpointing"):
        hidden.sum().backward()


def test_overflow_is_judged_for_each_parameter():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fused = FusedBackward(optimizer_of("adamw", network))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    network[0].weight.register_hook(lambda gradient: gradient / 0)
    with fused.updating():
        network(torch.ones(2, 4)).sum().backward()
    assert torch.equal(network[0].weight, before[0])
    assert not torch.equal(network[1].weight, before[1])
    norm, found_inf = fused.finish()
    assert not norm.isfinite()
    assert found_inf == 1.0


def test_learning_rate_schedulers_see_a_step():
    network = model()
    optimizer = optimizer_of("sgd", network)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    fused_step(FusedBackward(optimizer), network, 0)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_detaches_cleanly():
    network = model()
    fused = FusedBackward(optimizer_of("adamw", network))
    fused.detach()
    fused.detach()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    loss_of(network, 0).backward()
    assert all(map(torch.equal, before, network.parameters()))
    assert all(parameter.grad is not None for parameter in network.parameters())
