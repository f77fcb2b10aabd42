"""The short cut returns what torch's own fake mode returns, the first time and every other."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from oomless.memory.fake_mode import QuickFakeMode


def weights():
    return torch.empty(6, 4, dtype=torch.bfloat16)


CASES = {
    "promotion": lambda: weights() * torch.empty(4),
    "scalar promotion": lambda: torch.empty(3, dtype=torch.int64) * 0.5,
    "zero-dimensional": lambda: weights() * torch.empty((), dtype=torch.float64),
    "transposed": lambda: torch.exp(weights().t()),
    "expanded": lambda: weights().expand(3, 6, 4) + 1,
    "comparison": lambda: weights() > 1.0,
    "reduction": lambda: weights().sum(dim=1, keepdim=True, dtype=torch.float32),
    "product": lambda: weights() @ weights().t(),
    "in place": lambda: weights().mul_(2),
    "out": lambda: torch.mm(weights(), weights().t(), out=torch.empty(6, 6, dtype=torch.bfloat16)),
    "list": lambda: torch.cat([weights(), weights()[:2]]),
    "several": lambda: torch.empty(5, 3).max(dim=1),
    "view": lambda: weights()[1:3].unsqueeze(0),
    "views": lambda: weights().split(4),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*(torch.empty(1, 2, 8, 16),) * 3),
    "factory": lambda: torch.zeros(3, device="cpu"),
    "complex": lambda: torch.empty(3, dtype=torch.complex64) * 2,
    "known value": lambda: torch.tensor(3.0) * torch.empty(2),
}


def seen(result):
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    assert all(type(part) is FakeTensor and part.device.type == "cpu" for part in parts)
    return [
        (
            part.shape,
            part.stride(),
            part.storage_offset(),
            part.dtype,
            part.requires_grad,
            part.untyped_storage().nbytes(),
        )
        for part in parts
    ]


@pytest.mark.parametrize("name", CASES)
def test_same_as_torch_s(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = seen(CASES[name]())
    with QuickFakeMode():
        assert [seen(CASES[name]()) for _ in range(3)] == [expected] * 3


def test_storages_are_shared_where_torch_shares_them():
    with QuickFakeMode():
        for _ in range(2):
            base = weights()
            for same in (base[2:], base.view(-1), base.t(), base.detach(), base.mul_(2), base.split(3)[1]):
                assert same.untyped_storage()._cdata == base.untyped_storage()._cdata
            assert (base * 2).untyped_storage()._cdata != base.untyped_storage()._cdata


def test_in_place_returns_the_tensor_itself():
    with QuickFakeMode():
        for _ in range(3):
            base, out = weights(), torch.empty(6, 4, dtype=torch.bfloat16)
            assert base.add_(1) is base
            assert torch.add(base, base, out=out) is out


def test_gradients_flow():
    with QuickFakeMode():
        for _ in range(2):
            leaf = torch.empty(4, 4, requires_grad=True)
            (leaf.view(16) * 2).sum().backward()
            assert leaf.grad.shape == (4, 4)


def test_what_cannot_be_computed_is_an_error_every_time():
    with QuickFakeMode():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="must match|incompatible|broadcast"):
                weights() * torch.empty(5)
