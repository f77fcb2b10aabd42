"""What the optimizer tests share: small models, a counter of live temporaries."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTemporaries(TorchDispatchMode):
    """Counts the bytes of storages that are born inside and alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._count(storage)
        return result

    def _count(self, storage):
        identifier, size = storage._cdata, storage.nbytes()
        self._alive[identifier] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, identifier)

    def _forget(self, identifier):
        self.live_bytes -= self._alive.pop(identifier)


def parameters_of(shapes, dtype, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for shape in shapes
    ]


def give_gradients(parameters, seed, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def everything(optimizer):
    """Copies of all weights and all state, for bit-wise comparison."""
    result = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            result.append(parameter.detach().clone())
            result += [tensor.clone() for tensor in optimizer.state_tensors(parameter).values()]
    return result


def equal_bits(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )
