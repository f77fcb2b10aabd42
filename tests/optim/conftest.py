"""A counter of the temporaries that are alive at the same time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTemporaries(TorchDispatchMode):
    """Counts the bytes of the storages that are born inside and alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
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


@pytest.fixture
def peak_temporaries():
    return PeakTemporaries()
