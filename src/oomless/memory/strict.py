"""What CUDA would refuse, or do wrong, and a simulation that lies in host memory would not notice."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from oomless.errors import OomlessError

_MAY_MIX = frozenset(
    {"aten::copy_", "aten::_to_copy", "aten::set_", "aten::index", "aten::index_put", "aten::index_put_"}
    | {"aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"}
)
"""Copies, and what takes its indices from either memory."""

_READS_NOTHING = re.compile(r"prim::|aten::(sym_|new_|\w+_like$|is_|record_stream)")
"""Operators that ask a tensor for its form alone."""

_READS_A_NUMBER = "aten::_local_scalar_dense"


class DeviceMisuse(OomlessError, RuntimeError):
    """An operator that would fail on CUDA, or read or spoil memory that a copy still uses."""


class _Regions:
    """Parts of storages, each with the number of the copy that uses it."""

    def __init__(self) -> None:
        self._held: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[int, int], int]] = WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._held)

    def add(self, storage: torch.UntypedStorage, region: tuple[int, int], copy: int) -> None:
        self._held.setdefault(storage, {})[region] = copy

    def touches(self, tensor: Tensor) -> bool:
        held = self._held.get(tensor.untyped_storage())
        if not held:
            return False
        start, end = _region(tensor)
        return any(first < end and start < last for first, last in held)

    def take_until(self, copy: int) -> list[tuple[torch.UntypedStorage, tuple[int, int]]]:
        """Remove and return those of ``copy`` and the copies before it."""
        done = [
            (storage, region)
            for storage, held in self._held.items()
            for region, number in held.items()
            if number <= copy
        ]
        for storage, region in done:
            del self._held[storage][region]
            if not self._held[storage]:
                del self._held[storage]
        return done

    def clear(self) -> None:
        self._held.clear()


class Strict:
    """Is asked before each operator, and told of each copy that runs beside the computation.

    Args:
        on_device: whether a storage lies in device memory.
    """

    def __init__(self, on_device: Callable[[torch.UntypedStorage], bool]) -> None:
        self._on_device = on_device
        self._asleep = False
        self._copies = 0
        self._being_written, self._being_read, self._host_has_not_waited = _Regions(), _Regions(), _Regions()

    @contextmanager
    def copying(self, source: Tensor, target: Tensor) -> Iterator[Callable[[], None]]:
        """Give what is to be called when the device has waited for the copy that begins inside."""
        self._copies = copy = self._copies + 1
        self._being_read.add(source.untyped_storage(), _region(source), copy)
        self._being_written.add(target.untyped_storage(), _region(target), copy)

        def waited() -> None:
            """Forget this copy and all before it, which are done."""
            self._being_read.take_until(copy)
            for storage, region in self._being_written.take_until(copy):
                if not self._on_device(storage):
                    self._host_has_not_waited.add(storage, region, copy)

        with self.asleep():
            yield waited

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Ask nothing of what is begun inside, which comes after the copies as CUDA orders it."""
        self._asleep = True
        try:
            yield
        finally:
            self._asleep = False

    def host_waits(self) -> None:
        """What the device was given to do is done: the host waited, or read a number of it."""
        for regions in (self._being_read, self._being_written, self._host_has_not_waited):
            regions.clear()

    def check(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        """Raise where ``func`` must not work on these tensors now.

        Raises:
            DeviceMisuse: it mixes host and device memory, reads or writes what a copy is writing, writes what a copy is
                reading, or works on the host with what a copy brought there before the host waited.
        """
        if self._asleep:
            return
        given = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        places = [self._on_device(tensor.untyped_storage()) for tensor in given]
        name, written, reads_nothing = _about(func)
        if name == _READS_A_NUMBER:
            self.host_waits()
        if True in places and False in places and name not in _MAY_MIX:
            where = ", ".join(
                f"{'device' if on_device else 'host'} {tuple(tensor.shape)}"
                for tensor, on_device in zip(given, places, strict=True)
            )
            raise DeviceMisuse(f"{name} was given host and device memory at once, which CUDA refuses: {where}")
        if reads_nothing:
            return
        if self._being_written and any(map(self._being_written.touches, given)):
            raise DeviceMisuse(f"{name} works with memory that a copy is writing: wait for the copy first")
        if self._being_read:
            changed = _tensors(args[place] for place in written if place < len(args))
            if any(map(self._being_read.touches, changed)):
                raise DeviceMisuse(f"{name} changes memory that a copy is reading: wait for the copy first")
        if self._host_has_not_waited and True not in places and any(map(self._host_has_not_waited.touches, given)):
            raise DeviceMisuse(f"{name} reads on the host what a copy brings: the device waited, the host did not")


def _region(tensor: Tensor) -> tuple[int, int]:
    """Return from which byte of its storage to which ``tensor`` lies."""
    start = int(tensor.storage_offset())
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + int(steps) + 1 if tensor.numel() else start
    return start * tensor.itemsize, end * tensor.itemsize


@functools.cache
def _about(func: Any) -> tuple[str, tuple[int, ...], bool]:
    """Return an operator's name without its overload, the places of the arguments that it writes, and whether it reads nothing."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func), (), False
    writes = (place for place, given in enumerate(schema.arguments) if given.alias_info and given.alias_info.is_write)
    views = schema.returns and all(given.alias_info and not given.alias_info.is_write for given in schema.returns)
    return schema.name, tuple(writes), bool(views) or _READS_NOTHING.match(schema.name) is not None


def is_meta(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has no place; a fake one is not asked, which would be an operator of its own."""
    return tensor.fake_device.type == "meta" if type(tensor) is FakeTensor else tensor.is_meta


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among ``arguments`` that have a place: a tensor without dimensions may lie anywhere."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.dim() and not is_meta(argument) and argument.layout is torch.strided:
                yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
