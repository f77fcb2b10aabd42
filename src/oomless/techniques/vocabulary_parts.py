"""Frozen ``embed_tokens`` and ``lm_head`` of which each GPU keeps some rows, beside packed weights that are cut (``peers.py``).

Saves: with n GPUs all but 1/n of both, and neither is ever whole. Costs: the tokens of all GPUs go to each: it looks up those in its
rows, and goes through their logits of its rows; what is exchanged are hidden states and sums, less than the matrix by far.

Each GPU does its share of the same work. Micro-batches must have the same shape in all processes. What trains, in the whole or in rows, is whole on every GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from oomless.memory.device import Device
from oomless.techniques.one_gradient_buffer import only_looks_up
from oomless.techniques.peers import all_gather
from oomless.techniques.sharding import first_element, local

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""The second is its name before torch 2.13."""


def apply(model: Any, mesh: DeviceMesh, trained: list[nn.Module], device: Device) -> None:
    """Have each process of ``mesh`` keep some rows of the ends of ``model`` that do not train; allocated, not filled.

    Args:
        model: on the meta device.
        mesh: the processes.
        trained: the modules that train, each with everything inside it.
        device: where the model will be.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    training = {child for module in trained for child in module.modules()}
    can = {
        embedding: only_looks_up(embedding) and embedding not in training,
        head: type(head) is nn.Linear and head not in training,
    }
    if head.weight is embedding.weight and not all(can.values()):
        return
    made: dict[int, nn.Parameter] = {}
    for end, forward in ((embedding, _Lookup), (head, _Head)):
        if can[end]:
            whole = end.weight
            if id(whole) not in made:
                made[id(whole)] = _some_rows(whole, mesh, device)
            end.weight = made[id(whole)]
            end.forward = forward(end, Parts(end.weight))


def _some_rows(whole: nn.Parameter, mesh: DeviceMesh, device: Device) -> nn.Parameter:
    each = -(-whole.shape[0] // mesh.size())
    rows = max(0, min(each, whole.shape[0] - mesh.get_local_rank() * each))
    own = torch.empty(rows, whole.shape[1], dtype=whole.dtype, device=device.torch_device)
    with device.host():  # the first time, DTensor works out shapes on tensors of its own
        cut = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        return nn.Parameter(cut, requires_grad=False)


def of(end: nn.Module) -> Parts | None:
    """Return how the embedding or head ``end`` is shared; ``None`` where it is whole."""
    return end.forward.parts if isinstance(end.forward, _Lookup | _Head) else None


class Parts:
    """How ``weight``, of which each process keeps some rows, is shared."""

    def __init__(self, weight: Any) -> None:
        self._mesh: DeviceMesh = weight.device_mesh
        self._processes, self._rank = self._mesh.size(), self._mesh.get_local_rank()
        self.weight = local(weight)
        self.count: int = weight.shape[0]
        width = weight.shape[1]
        self.first = first_element(weight) // width

    def tokens_at_once(self, chunk_bytes: int) -> int:
        """Return how many tokens of each process may be gone through together for temporaries of ``chunk_bytes``."""
        most: int = chunk_bytes // (self._processes * self.weight.shape[1] * 4)
        return max(1, most)

    def rows_of_each(self) -> list[slice]:
        """Return which rows each process keeps."""
        each = -(-self.count // self._processes)
        return [slice(min(n * each, self.count), min((n + 1) * each, self.count)) for n in range(self._processes)]

    @torch.no_grad()
    def from_process(self, rank: int, rows: int) -> Tensor:
        """Return the ``rows`` rows of the process ``rank``."""
        found = self.weight if rank == self._rank else self.weight.new_empty(rows, self.weight.shape[1])
        dist.broadcast(found, group=self._mesh.get_group(), group_src=rank)
        return found

    @torch.no_grad()
    def of_all(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` [N, ...] of every process, one after the other."""
        found = tensor.new_empty(self._processes * tensor.shape[0], *tensor.shape[1:])
        all_gather(found, tensor.detach().contiguous(), group=self._mesh.get_group())
        return found

    def own(self, tensor: Tensor) -> Tensor:
        """Return this process's part of what ``of_all`` returned, as a view."""
        own: Tensor = tensor.view(self._processes, -1)[self._rank]
        return own

    @torch.no_grad()
    def largest(self, tensor: Tensor) -> Tensor:
        """Turn each number into the largest that any process has in its place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._mesh.get_group())
        return tensor

    @torch.no_grad()
    def sum(self, tensor: Tensor) -> Tensor:
        """Turn each number into the sum of those that all processes have in its place."""
        dist.all_reduce(tensor, group=self._mesh.get_group())
        return tensor

    @torch.no_grad()
    def own_sum(self, tensor: Tensor) -> Tensor:
        """Return ``own`` of the sum over all processes of ``tensor``."""
        found = tensor.new_empty(tensor.shape[0] // self._processes, *tensor.shape[1:])
        _reduce_scatter(found, tensor, group=self._mesh.get_group())
        return found


class _Lookup:
    """The forward of an embedding of which some rows are here."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.parts = parts

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        parts = self.parts
        places = parts.of_all(input_ids.flatten()).sub_(parts.first)
        held = parts.weight.shape[0]
        found = parts.weight.new_zeros(places.shape[0], parts.weight.shape[1])
        if held:
            elsewhere = (places < 0) | (places >= held)
            found = functional.embedding(places.clamp_(0, held - 1), parts.weight)
            found.masked_fill_(elsewhere[:, None], 0)
        rows = parts.own_sum(found).view(*input_ids.shape, -1)
        scale = getattr(self.module, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)


class _Head:
    """The forward of a head of which some rows are here; the loss does without (``ops.linear_cross_entropy``)."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.module = weakref.proxy(module)
        self.parts = parts

    def __call__(self, hidden: Tensor) -> Tensor:
        bias = self.module.bias
        logits = hidden.new_empty(*hidden.shape[:-1], self.parts.count)
        for rank, rows in enumerate(self.parts.rows_of_each()):
            weight = self.parts.from_process(rank, rows.stop - rows.start)
            logits[..., rows] = functional.linear(hidden, weight, None if bias is None else bias[rows])
        return logits
