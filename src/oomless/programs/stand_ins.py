"""Tensors of a GPU that is not there: meta tensors whose bytes are booked, and small values kept beside them.

A tensor on the rehearsed GPU is a plain tensor on torch's ``meta`` device, so that every operator knows shapes and dtypes,
autograd works as always, and parameters stay parameters. That it lies on the GPU is in the books alone: its storage is
booked there. Host tensors are real, but for the weights that transformers loads, which are stand-ins too, booked on the host.

Values. Token ids, masks and counters decide what a program does next. A stand-in of at most ``SMALL_BYTES`` made from real
values keeps these as its *shadow*; an operator whose operands all have shadows is computed on them as well. What has no
shadow (anything that comes from a weight) has no value: a question for it gets a plausible answer, and is noted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from oomless.memory.tracker import Ledger, StorageTracker, _is_composite, _Rule
from oomless.memory.virtual_gpu import VirtualGPU

aten = torch.ops.aten
SMALL_BYTES = 1 << 20
META = torch.device("meta")
_is_meta = torch._C.TensorBase.is_meta.__get__  # type: ignore[attr-defined]  # the class' own is patched
_RANDOM = torch.Tag.nondeterministic_seeded


class StandIns(StorageTracker):
    """Books every tensor on the GPU or on the host, by where its operands lie, and keeps shadows."""

    def __init__(self, gpu: VirtualGPU, workspace_bytes: int = 0, asked: Callable[[], None] = lambda: None) -> None:
        super().__init__(gpu.host_ledger)
        self._asked = asked
        self._workspace_bytes, self._workspaces = workspace_bytes, set[bool]()
        gpu.track_with(self)
        self._on_gpu, self._on_host, self._nowhere = gpu.ledger, gpu.host_ledger, _Nowhere()
        self._place: Ledger | None = None
        self._books_new = False
        self.in_operator = False
        """Whether an operator of torch runs, to which a stand-in is the meta tensor that it is."""
        self._shadow_of: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.assumed: Counter[str] = Counter()

    # Where tensors lie

    def is_on_gpu(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` lies on the rehearsed GPU."""
        return any(booking.ledger is self._on_gpu for booking in self.find(tensor))

    def is_stand_in(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` has no real memory, on the GPU or on the host."""
        return bool(self.find(tensor))

    def address(self, tensor: Tensor) -> int:
        """Return where ``tensor`` begins: on the GPU its address in the simulated allocator."""
        (booking,) = self.find(tensor)
        block = getattr(booking.allocation, "block", None)
        start = block.address if block is not None else id(booking.allocation) << 20
        return int(start) + int(tensor.storage_offset()) * tensor.element_size()

    @contextmanager
    def making(self, *, on_gpu: bool) -> Iterator[None]:
        """Book what is made inside on the GPU, or on the host, whatever its operands."""
        before, self._place = self._place, self._on_gpu if on_gpu else self._on_host
        try:
            yield
        finally:
            self._place = before

    @contextmanager
    def making_nothing(self) -> Iterator[None]:
        """Book nothing of what is made inside: the program asked for torch's own meta device."""
        before, self._place = self._place, self._nowhere
        try:
            yield
        finally:
            self._place = before

    def moved(self, tensor: Tensor, *, to_gpu: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of ``tensor`` on the GPU or on the host; autograd sees a copy."""
        with self.making(on_gpu=to_gpu):
            shadow = self.shadow(tensor)
            if not to_gpu and shadow is not None:
                return shadow.to(dtype or shadow.dtype, copy=True)
            if self.is_stand_in(tensor):
                return tensor.to(dtype or tensor.dtype, copy=True)
            copy: Tensor = _Entering.apply(tensor, dtype or tensor.dtype)  # type: ignore[no-untyped-call]
        if shadow is not None:
            self._keep(copy, shadow.detach().to(copy.dtype, copy=True))
        return copy

    def become(self, tensor: Tensor, data: Tensor) -> None:
        """Let ``tensor`` be what ``data`` is, which is of the other kind: one of both is real, the other a stand-in."""
        shadow, view = self.shadow(data), data.detach().requires_grad_(tensor.requires_grad)
        self.forget(view)
        torch.utils.swap_tensors(tensor, view)  # type: ignore[no-untyped-call]
        if shadow is not None and self.is_stand_in(tensor):
            self._keep(tensor, shadow)

    # Values

    def shadow(self, tensor: Tensor) -> Tensor | None:
        """Return the values of ``tensor`` where they are known: its own, or those beside a stand-in."""
        if not self.is_stand_in(tensor):
            return tensor if tensor.nbytes <= SMALL_BYTES else None
        found = self._shadow_of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _keep(self, tensor: Tensor, shadow: Tensor) -> None:
        key = id(tensor)
        self._shadow_of[key] = (weakref.ref(tensor, lambda _: self._shadow_of.pop(key, None)), shadow)

    def forget(self, tensor: Tensor) -> None:
        """Know no values of ``tensor`` any more: what has written it is not known."""
        self._shadow_of.pop(id(tensor), None)

    def value(self, tensor: Tensor) -> Any:
        """Return the one value of ``tensor``, or a plausible one."""
        shadow = self.shadow(tensor)
        if shadow is not None:
            return shadow.item()
        if tensor.dtype is torch.bool:
            answer: Any = False
        else:
            answer = 1.0 if tensor.is_floating_point() else 1
        self.assumed[f"{answer} for a value of {tensor.dtype} that follows from weights"] += 1
        return answer

    def values(self, tensor: Tensor) -> Tensor:
        """Return real values for ``tensor``: its own, or plausible ones."""
        shadow = self.shadow(tensor)
        if shadow is not None:
            return shadow.detach().clone()
        self.assumed[f"zeros for values of {tensor.dtype} that follow from weights"] += 1
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def remember_made(self, made: Any, func: Any, args: Any, kwargs: Any) -> None:
        """Keep the values of what was just made on the GPU from no tensor, where it is small."""
        if isinstance(made, Tensor) and made.nbytes <= SMALL_BYTES and getattr(func, "__name__", "") in _KNOWN_MAKERS:
            values = func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            self._keep(made, values.zero_() if func.__name__ == "empty" else values)

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on stand-ins where one is among its operands, book the result, and follow its values."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # A wrapper (DTensor) runs first; the operators on its parts come here.
        with torch._C.DisableTorchFunction():
            if torch.is_inference_mode_enabled() and _is_composite(func):
                return self._apart(func, args, kwargs or {})
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        stand_ins = [leaf for leaf in leaves if self.is_stand_in(leaf)]
        if func is aten._local_scalar_dense.default and stand_ins:
            return self.value(stand_ins[0])
        place = self._place
        device = kwargs.get("device")
        if device is not None and (device.type == "cuda" or (device == META and place is None and not stand_ins)):
            # What operators make for themselves beside a stand-in is asked for on its device.
            kwargs = {**kwargs, "device": META}
            place = place if place is self._nowhere else self._on_gpu
        if place is None:
            place = self._on_gpu if any(self.is_on_gpu(leaf) for leaf in stand_ins) else self._on_host
        before, self.ledger = self.ledger, place
        books_before = self._books_new
        self._books_new = bool(stand_ins) or self._place is not None or place is self._on_gpu
        within, self.in_operator = self.in_operator, True
        try:
            if self._place is None and place is self._on_gpu and func not in _TAKES_BOTH:
                self._require_one_place(func, leaves)
            if not stand_ins:
                return super().__torch_dispatch__(func, (), args, kwargs)
            if func in _SIZED_BY_VALUES:
                return self._sized_by_values(func, args, kwargs)
            if func in _PRODUCTS and place is self._on_gpu:
                self._book_workspace()
            if func in _INDEXED:
                args = (args[0], [part for index in args[1] for part in self._without_mask(index)], *args[2:])
                leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            shadows = self._on_shadows(func, leaves, args, kwargs)
            args, kwargs = pytree.tree_map_only(Tensor, self._as_meta, (args, kwargs))
            result = super().__torch_dispatch__(func, (), args, kwargs)
            self._follow(result, shadows, leaves, func)
            return result
        finally:
            self.ledger, self.in_operator, self._books_new = before, within, books_before

    def _require_one_place(self, func: Any, leaves: Sequence[Tensor]) -> None:
        """Refuse what CUDA refuses: an operator on tensors of host and GPU, but for single values."""
        for leaf in leaves:
            if leaf.ndim and not self.is_on_gpu(leaf):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"(a tensor of size {tuple(leaf.shape)} in {func})"
                )

    def _book_workspace(self) -> None:
        """Book what cuBLAS takes at the first product of a thread: the main one's, and autograd's."""
        thread = torch._C._current_graph_task_id() != -1
        if thread not in self._workspaces and self._workspace_bytes:
            self._workspaces.add(thread)
            self._on_gpu.allocate(self._workspace_bytes, "cuBLAS workspace")

    def _as_meta(self, tensor: Tensor) -> Tensor:
        return (
            tensor
            if _is_meta(tensor)
            else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        )

    def _on_shadows(self, func: Any, leaves: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        """Return what ``func`` gives on the values of its operands; ``None`` where one has none."""
        if _RANDOM in func.tags or any(self.shadow(leaf) is None for leaf in leaves):
            return None
        args, kwargs = pytree.tree_map_only(Tensor, self.shadow, (args, kwargs))
        kwargs = {key: torch.device("cpu") if value == META else value for key, value in kwargs.items()}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return None

    def _follow(self, result: Any, shadows: Any, leaves: Sequence[Tensor], func: Any) -> None:
        results, values = pytree.tree_leaves(result), pytree.tree_leaves(shadows)
        for place, tensor in enumerate(results):
            if not isinstance(tensor, Tensor) or not _is_meta(tensor):
                continue
            value = values[place] if shadows is not None and place < len(values) else None
            if isinstance(value, Tensor) and value.shape == tensor.shape and value.nbytes <= SMALL_BYTES:
                self._keep(tensor, value)
            elif any(tensor is leaf for leaf in leaves) and func not in _KEEPS_ITS_VALUES:
                self.forget(tensor)

    def _sized_by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result's size follows from values: as they are, or as if all were not zero."""
        shadow = self.shadow(args[0])
        if shadow is None:
            self.assumed[f"every element of a mask is set, for {func}"] += 1
            shadow = torch.ones(args[0].shape, dtype=torch.bool)
        found = func(shadow, *args[1:], **kwargs)
        with self:  # so that what it makes is booked
            return self.moved(found, to_gpu=self.ledger is self._on_gpu)

    def _without_mask(self, index: Any) -> Sequence[Any]:
        """Return ``index`` as CUDA takes it: of a mask, the places that are set, for each dimension."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return (index,)
        return self._sized_by_values(aten.nonzero.default, (index,), {}).unbind(1)  # type: ignore[no-any-return]

    def _book_tensor(self, tensor: Tensor, operation: object, rule: _Rule) -> None:
        if not _is_meta(tensor):
            return  # real memory is the host's own business
        storage = tensor.untyped_storage()
        booking = self._bookings.get(id(storage))
        if booking is not None:
            if rule is _Rule.MAY_RESIZE and storage.nbytes() != booking.size_bytes:
                self._rebook(booking, storage.nbytes(), operation)
        elif rule is _Rule.NEW_STORAGES and self._books_new and self.ledger is not self._nowhere:
            size_bytes = storage.nbytes()
            allocation = self._allocate(self.ledger, size_bytes, operation)
            self._enter(storage, self.ledger, size_bytes, allocation)
            if self.ledger is self._on_gpu:
                self._asked()


class _Nowhere:
    """The ledger of torch's own meta device."""

    def allocate(self, size_bytes: int, operation: object) -> None:
        return None

    def free(self, allocation: Any) -> None: ...


class _Entering(torch.autograd.Function):
    """A real host tensor goes to the GPU; its gradient comes back as zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype, device=META)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros(gradient.shape, dtype=gradient.dtype), None


_TAKES_BOTH = frozenset(
    {
        *(
            aten.copy_.default,
            aten._to_copy.default,
            aten.index.Tensor,
            aten.index_put.default,
            aten.index_put_.default,
        ),
        *(aten._index_put_impl_.default, aten._unsafe_index.Tensor, aten.set_.source_Tensor),
    }
)
"""What moves tensors, or takes indices from the host too."""

_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default})
_INDEXED = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default})
_SIZED_BY_VALUES = frozenset({aten.nonzero.default, aten._unique2.default, aten.unique_dim.default})
_KNOWN_MAKERS = frozenset({"zeros", "ones", "full", "arange", "empty", "eye", "linspace", "scalar_tensor"})
_KEEPS_ITS_VALUES = frozenset(
    {aten._amp_foreach_non_finite_check_and_unscale_.default, aten._amp_update_scale_.default}
)
