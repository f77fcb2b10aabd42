"""``FakeTensorMode`` with a short cut for what a training step does over and over.

torch's own mode remembers what operators return, but makes the keys and the answers in Python at about 0.2 ms each,
which would be most of a rehearsal. This mode remembers the plain cases itself, by the operator and its arguments'
shapes, strides and types: what torch's mode returned the first time is returned again. Views, whose storage is an
argument's, are asked of the meta kernel every time. Everything unusual (devices other than the CPU and ``meta``, tensors that
are not fake or have a known value, complex numbers, results that alias undeclared) goes torch's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from oomless.memory.work import WorkCounter

aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
_CPU, _META = torch.device("cpu"), torch.device("meta")
_KNOWN: dict[Any, Any] = {}
"""What operators return, for all modes of this process: it follows from sizes and types alone."""

_NOTHING = object()

_VIEWS = frozenset(
    {
        aten.view.default,
        aten.view.dtype,
        aten._unsafe_view.default,
        aten.slice.Tensor,
        aten.detach.default,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.select.int,
        aten.expand.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
    }
)


class QuickFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors of any size, quicker, on the CPU alone."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.work = WorkCounter()
        self._attributes = {
            device: vars(FakeTensor(self, torch.empty(0, device="meta"), device)) for device in (_CPU, _META)
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # The guard that this asks for costs more per operator than the short cut.

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return fake results of ``func``."""
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        key: list[Any] = [func, torch.get_default_dtype()]
        if not self._describe(args, key) or (kwargs and not self._describe((*kwargs, *kwargs.values()), key)):
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        if func in _VIEWS:
            with in_kernel_invocation_manager(self):
                result = func(*args, **kwargs) if kwargs else func(*args)
            device = args[0].fake_device
            return self._fake(result, device) if type(result) is Tensor else [self._fake(p, device) for p in result]
        described = tuple(key)
        known = _KNOWN.get(described)
        if known is not None:
            result = self._again(known, args, kwargs)
        else:
            with self.work.paused():  # torch's mode may take an operator apart, the first time
                result = super().__torch_dispatch__(func, types, args, kwargs or {})
            self._learn(described, result, args, kwargs)
        if self.work.on:
            self.work.operator(described, func, args, kwargs, result)
        return result

    def _describe(self, arguments: Iterable[Any], key: list[Any]) -> bool:
        """Add to ``key`` all that decides a result; return False where an argument is unusual."""
        for argument in arguments:
            kind = type(argument)
            if kind is FakeTensor:
                device = argument.fake_device
                if argument.constant is not None or device not in self._attributes or argument.fake_mode is not self:
                    return False
                key += (argument.shape, argument.stride(), argument.dtype, device.type)
            elif kind is list or kind is tuple:
                key.append(len(argument))
                if not self._describe(argument, key):
                    return False
            elif isinstance(argument, Tensor) or (kind is torch.device and argument not in self._attributes):
                return False
            else:
                key += (kind, None if kind is float else argument)
        return True

    def _learn(self, key: Any, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        """Remember ``result`` where it is nothing, one argument again, or dense tensors in storages of their own."""
        if result is None:
            _KNOWN[key] = _NOTHING
            return
        given = [*args, *(kwargs or {}).values()]
        for place, argument in enumerate(given):
            if result is argument and type(result) is FakeTensor:
                _KNOWN[key] = place
                return
        results = result if type(result) is tuple else (result,)
        storages = {part.untyped_storage()._cdata for part in _tensors(given)}
        for part in results:
            if type(part) is not FakeTensor or part.fake_device not in self._attributes or part.constant is not None:
                return
            plain = part.layout is torch.strided and not part.is_complex() and not part.requires_grad
            if not plain or part.storage_offset() or part.untyped_storage()._cdata in storages:
                return
        shapes = tuple((part.shape, part.stride(), part.dtype) for part in results)
        _KNOWN[key] = (type(result) is tuple, shapes, results[0].fake_device)

    def _again(self, known: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
        if type(known) is int:
            return args[known] if known < len(args) else list((kwargs or {}).values())[known - len(args)]
        if known is _NOTHING:
            return None
        several, shapes, device = known
        with in_kernel_invocation_manager(self):
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in shapes]
        return tuple(self._fake(part, device) for part in made) if several else self._fake(made[0], device)

    def _fake(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """Return what ``FakeTensor(self, meta, device)`` does, without its checks."""
        fake: Any = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self._attributes[device])
        return fake  # type: ignore[no-any-return]


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
