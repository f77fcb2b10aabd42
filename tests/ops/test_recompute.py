"""Offered tensors are made again in backward, once for all of their users."""

import torch
from torch import nn

from oomless.ops.recompute import offer, recomputing


class Doubled:
    """Offers 2 x and counts how often it was made again."""

    def __init__(self):
        self.count = 0

    def __call__(self, x):
        y = x * 2
        source = x.detach()

        def again():
            self.count += 1
            return source * 2

        offer(y, again)
        return y


def gradients(doubled, users, scope):
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    layers = [nn.Linear(4, 3) for _ in range(users)]
    with scope:
        y = doubled(x)
        total = sum(layer(y).square().sum() for layer in layers)
    del y
    total.backward()
    return [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]


def test_is_made_once_for_all_users():
    import contextlib

    counted, plain = Doubled(), Doubled()
    for ours, theirs in zip(
        gradients(counted, 3, recomputing()), gradients(plain, 3, contextlib.nullcontext()), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert counted.count == 1
    assert plain.count == 0


def test_views_are_found():
    doubled = Doubled()
    x = torch.randn(2, 3, 4, requires_grad=True)
    with recomputing():
        y = doubled(x)
        z = y.transpose(0, 1)[1] @ torch.ones(4, 2, requires_grad=True)
    z.sum().backward()
    assert doubled.count == 1


def test_a_retained_graph_makes_it_again():
    doubled = Doubled()
    x = torch.randn(5, 4, requires_grad=True)
    with recomputing():
        z = doubled(x).square().sum()
    z.backward(retain_graph=True)
    first = x.grad.clone()
    z.backward()
    assert torch.equal(x.grad, 2 * first)
    assert doubled.count == 2


def test_memory_that_died_is_not_mistaken():
    """A tensor saved in the place of an offered one that died is kept as it is."""
    with recomputing():
        doubled = Doubled()
        for _ in range(50):
            doubled(torch.ones(256, requires_grad=True))
            x = torch.full((256,), 3.0, requires_grad=True)
            x.square().sum().backward()
            assert torch.equal(x.grad, torch.full((256,), 6.0))
    assert doubled.count == 0
