"""What CUDA would refuse, or do wrong, and a simulation that lies in host memory would not notice."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

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


class Strict:
    """Is asked before each operator, and told of each copy that runs beside the computation.

    Args:
        on_device: whether a storage lies in device memory.
    """

    def __init__(self, on_device: Callable[[torch.UntypedStorage], bool]) -> None:
        self._on_device = on_device
        self._asleep = False
        self._copies = 0
        self._being_written: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._being_read: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._host_has_not_waited: WeakSet[torch.UntypedStorage] = WeakSet()

    @contextmanager
    def copying(self, source: Tensor, target: Tensor) -> Iterator[Callable[[], None]]:
        """Give what is to be called when the device has waited for the copy that begins inside."""
        self._copies = copy = self._copies + 1
        self._being_read[source.untyped_storage()] = self._being_written[target.untyped_storage()] = copy

        def waited() -> None:
            """Forget this copy and all before it, which are done."""
            for copies in (self._being_read, self._being_written):
                done = [storage for storage, number in copies.items() if number <= copy]
                for storage in done:
                    del copies[storage]
                    if copies is self._being_written and not self._on_device(storage):
                        self._host_has_not_waited.add(storage)

        self._asleep = True
        try:
            yield waited
        finally:
            self._asleep = False

    def host_waits(self) -> None:
        """What the device was given to do is done: the host waited, or read a number of it."""
        for copies in (self._being_read, self._being_written, self._host_has_not_waited):
            copies.clear()

    def check(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        """Raise where ``func`` must not work on these tensors now.

        Raises:
            DeviceMisuse: it mixes host and device memory, reads or writes what a copy is writing, writes what a copy is
                reading, or works on the host with what a copy brought there before the host waited.
        """
        if self._asleep:
            return
        given = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        storages = [tensor.untyped_storage() for tensor in given]
        places = {self._on_device(storage) for storage in storages}
        name, written, reads_nothing = _about(func)
        if name == _READS_A_NUMBER:
            self.host_waits()
        if len(places) == 2 and name not in _MAY_MIX:
            where = ", ".join(
                f"{'device' if self._on_device(storage) else 'host'} {tuple(tensor.shape)}"
                for tensor, storage in zip(given, storages, strict=True)
            )
            raise DeviceMisuse(f"{name} was given host and device memory at once, which CUDA refuses: {where}")
        if reads_nothing:
            return
        for storage in storages if self._being_written else ():
            if storage in self._being_written:
                raise DeviceMisuse(f"{name} works with memory that a copy is writing: wait for the copy first")
        if self._being_read:
            for tensor in _tensors(args[place] for place in written if place < len(args)):
                if tensor.untyped_storage() in self._being_read:
                    raise DeviceMisuse(f"{name} changes memory that a copy is reading: wait for the copy first")
        if self._host_has_not_waited and True not in places:
            for storage in storages:
                if storage in self._host_has_not_waited:
                    raise DeviceMisuse(
                        f"{name} reads on the host what a copy brings: the device waited, the host did not"
                    )


@functools.cache
def _about(func: Any) -> tuple[str, tuple[int, ...], bool]:
    """Return an operator's name without its overload, the places of the arguments that it writes, and whether it reads nothing."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func), (), False
    writes = (place for place, given in enumerate(schema.arguments) if given.alias_info and given.alias_info.is_write)
    views = schema.returns and all(given.alias_info and not given.alias_info.is_write for given in schema.returns)
    return schema.name, tuple(writes), bool(views) or _READS_NOTHING.match(schema.name) is not None


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among ``arguments`` that have a place: a tensor without dimensions may lie anywhere."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.dim() and not argument.is_meta and argument.layout is torch.strided:
                yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
