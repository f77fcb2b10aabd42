"""What torch.distributed is asked in a rehearsal: this process is the first of several, as torchrun starts them, and the others are not there.

Collectives are torch's own fake ones: they return at once and move nothing. DDP, FSDP and what is built on them run as they
are, so that buckets of gradients, parts of weights and what is gathered are booked where they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oomless.programs.cuda import patched
from oomless.programs.stand_ins import StandIns


class Processes:
    """The first of ``count`` processes, and what it does of the others.

    Args:
        count: how many there are; 1 changes nothing.
        label: is given the buckets of gradients that DDP sums.
        stand_ins: tensors of the GPU.
        machines: on how many machines they are, as many on each.
    """

    def __init__(self, count: int, label: Callable[[Tensor], None], stand_ins: StandIns, machines: int = 1) -> None:
        self.count, self._label, self._stand_ins = count, label, stand_ins
        self.of_machine = count // machines
        """How many are on one machine."""
        self.joined = count == 1
        """Whether the program has asked for the others."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the others be there, as far as a program can see."""
        if self.count == 1:
            yield
            return
        before = dict(os.environ)
        os.environ.update(_environment(self.count, self.of_machine))
        try:
            with patched(self._changes()):
                yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            if dist.is_initialized():
                dist.destroy_process_group()

    def _changes(self) -> list[tuple[Any, str, Any]]:
        import torch.distributed._tools.fake_collectives
        from torch.distributed import distributed_c10d as c10d
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.tensor._sharding_prop import ShardingPropagator
        from torch.nn.parallel import distributed as ddp
        from torch.testing._internal.distributed.fake_pg import FakeStore

        join, group, wrap = dist.init_process_group, dist.new_group, ddp.DistributedDataParallel.__init__
        register = ddp.DistributedDataParallel.register_comm_hook
        ask_for_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def init_process_group(*args: Any, **kwargs: Any) -> None:
            self.joined = True
            if not dist.is_initialized():
                join("fake", store=FakeStore(), rank=0, world_size=self.count)

        def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
            return group(ranks, timeout, None, *args, **kwargs)

        def nothing(*args: Any, **kwargs: Any) -> None: ...

        def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
            objects[:] = [own] * len(objects)

        def gather_object(own: Any, objects: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
            if objects is not None:
                objects[:] = [own] * len(objects)

        def scatter_object_list(out: list[Any], objects: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
            out[0] = (objects or [None])[0]

        def reduced(bucket: Any) -> Any:
            self._label(bucket.buffer())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        def wrapped(module: Any, *args: Any, **kwargs: Any) -> None:
            wrap(module, *args, **kwargs)
            # DDP reads annotations of a hook, and wants none that are text.
            register(module, None, lambda state, bucket: reduced(bucket))

        def hook_of_the_program(module: Any, state: Any, hook: Any) -> None:
            self._stand_ins.assumed[f"DDP's communication hook {getattr(hook, '__name__', hook)} is not run"] += 1

        def shapes(*args: Any) -> Any:
            with self._stand_ins.making_nothing():
                return ask_for_shapes(*args)

        modules = (dist, c10d)
        return [
            # Who is there: without these a script waits for the others, or on their objects.
            *((module, "init_process_group", init_process_group) for module in modules),
            *((module, "new_group", new_group) for module in modules),
            *((module, "all_gather_object", all_gather_object) for module in modules),
            *((module, "gather_object", gather_object) for module in modules),
            *((module, "broadcast_object_list", nothing) for module in modules),
            *((module, "scatter_object_list", scatter_object_list) for module in modules),
            # DDP: the others' shapes cannot be compared with, and torch's fake group has no sum for the reducer to wait for.
            (ddp, "_verify_param_shape_across_processes", nothing),
            (ddp.DistributedDataParallel, "__init__", wrapped),
            (ddp.DistributedDataParallel, "register_comm_hook", hook_of_the_program),
            # FSDP: its mesh is the accelerator's, and stand-ins are of the meta device.
            (torch._C, "_get_accelerator", lambda *args: torch.device("cuda")),
            (FSDPParamGroup, "_validate_no_meta_params", nothing),
            # DTensor: it asks operators for shapes, on tensors that have no memory.
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", shapes),
        ]


def _environment(count: int, of_machine: int) -> dict[str, str]:
    """Return what torchrun tells the first of ``count`` processes, so many of them on each machine."""
    zeros = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"), "0")
    counts = dict.fromkeys(("WORLD_SIZE", "ROLE_WORLD_SIZE"), str(count))
    machines = {"LOCAL_WORLD_SIZE": str(of_machine), "GROUP_WORLD_SIZE": str(count // of_machine)}
    return {**zeros, **counts, **machines, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
