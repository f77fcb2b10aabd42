"""What Python code sees of a GPU that is not there: devices of tensors, moves, values, and the kernels that CUDA would take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.attention import kernel_for
from oomless.programs.autocast import Casting
from oomless.programs.stand_ins import META, StandIns

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def as_device(value: Any) -> torch.device | None:
    """Return the device that ``value`` names; ``None`` where it names none."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return torch.device("cuda", value)
    if isinstance(value, str):
        return torch.device(value)
    return None


class AsIfOnCuda(TorchFunctionMode):
    """Answers what torch's functions are asked about the rehearsed GPU."""

    def __init__(self, stand_ins: StandIns, gpu: VirtualGPU) -> None:
        super().__init__()
        self.stand_ins, self.gpu, self.casting = stand_ins, gpu, Casting()
        self.capability = gpu.compute_capability or (8, 0)
        self.in_backward = False
        self._answers: dict[Any, Callable[..., Any]] = {
            Tensor.to: self._to,
            Tensor.cuda: lambda tensor, device=None, **how: self._to(tensor, device or CUDA),
            Tensor.cpu: lambda tensor, **how: self._to(tensor, CPU),
            Tensor.pin_memory: lambda tensor, *args, **how: tensor,
            Tensor.is_pinned: lambda tensor, *args, **how: False,
            Tensor.get_device: lambda tensor: 0 if self._device(tensor).type == "cuda" else -1,
            Tensor.item: self._item,
            Tensor.__bool__: lambda tensor: bool(self._item(tensor)),
            Tensor.__int__: lambda tensor: int(self._item(tensor)),
            Tensor.__float__: lambda tensor: float(self._item(tensor)),
            Tensor.__index__: lambda tensor: int(self._item(tensor)),
            Tensor.backward: lambda tensor, gradient=None, *args, **how: self._backward(tensor, gradient, *args, **how),
            torch.autograd.backward: self._backward,
            Tensor.tolist: self._values(Tensor.tolist),
            Tensor.numpy: self._values(Tensor.numpy),
            Tensor.data.__set__: self._set_data,  # type: ignore[attr-defined]
            Tensor.__repr__: self._repr,
            Tensor.__format__: self._format,
            Tensor.data_ptr: self._data_ptr,
            Tensor.record_stream: lambda tensor, stream: None,
            torch.device: lambda *given, **how: (
                torch.device(*given, **how) if how or len(given) != 1 else as_device(given[0])
            ),
            torch.tensor: self._tensor,
            torch.as_tensor: self._tensor,
            Tensor.new_tensor: lambda like, data, **how: self._tensor(
                data, **{"device": self._device(like), "dtype": like.dtype, **how}
            ),
            torch.from_numpy: torch.from_numpy,
            torch.equal: self._equal,
            torch.allclose: self._equal,
            F.scaled_dot_product_attention: self._attention,
            F.rms_norm: self._rms_norm,
            torch.rms_norm: self._rms_norm,
            F.dropout: self._dropout,
            torch.dropout: self._dropout,
            **{
                function: self._half_to_float(function, kernel)
                for functions, kernel in (
                    ((F.softmax, torch.softmax, Tensor.softmax), torch.ops.aten._softmax.default),
                    ((F.log_softmax, torch.log_softmax, Tensor.log_softmax), torch.ops.aten._log_softmax.default),
                )
                for function in functions
            },
        }

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer ``func`` as on a machine with the GPU."""
        kwargs = kwargs or {}
        if self.casting.enabled:
            args, kwargs = self.casting.cast(func, args, kwargs, self._is_cuda)
        answer = self._answers.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        device = as_device(kwargs.get("device"))
        if device is None or func in _NOT_A_MAKER:
            return func(*args, **kwargs)
        if device.type == "cuda":
            return self._made_on_gpu(func, args, kwargs)
        if device.type == "meta":
            with self.stand_ins.making_nothing():
                return func(*args, **kwargs)
        if device.type == "cpu" and any(isinstance(a, Tensor) and self.stand_ins.is_stand_in(a) for a in args):
            with self.stand_ins.making(on_gpu=False):
                return func(*args, **{**kwargs, "device": META})
        return func(*args, **kwargs)

    def _made_on_gpu(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        kwargs.pop("generator", None)
        with self.stand_ins.making(on_gpu=True):
            made = func(*args, **{**kwargs, "device": META})
        self.stand_ins.remember_made(made, func, args, kwargs)
        return made.requires_grad_(requires_grad) if requires_grad else made

    def changes(self) -> list[tuple[Any, str, Any]]:
        """Return what is to be patched: where a tensor lies is also asked by hooks, which torch calls without modes."""
        return [
            (Tensor, "device", property(self._device)),
            (Tensor, "is_cuda", property(self._is_cuda)),
            (Tensor, "is_cpu", property(lambda tensor: self._device(tensor).type == "cpu")),
            (Tensor, "is_meta", property(lambda tensor: self._device(tensor).type == "meta")),
        ]

    # Where tensors lie

    def _device(self, tensor: Tensor) -> torch.device:
        if self.stand_ins.in_operator or not self.stand_ins.is_stand_in(tensor):
            with torch._C.DisableTorchFunction():
                return _DEVICE(tensor)
        return CUDA if self.stand_ins.is_on_gpu(tensor) else CPU

    def _data_ptr(self, tensor: Tensor) -> int:
        return self.stand_ins.address(tensor) if self.stand_ins.is_stand_in(tensor) else Tensor.data_ptr(tensor)

    def _set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Set ``tensor.data``; where one of both is real and the other a stand-in, torch knows them as of two kinds."""
        if self.stand_ins.is_stand_in(tensor) == self.stand_ins.is_stand_in(data):
            _SET_DATA(tensor, data)
        else:
            self.stand_ins.become(tensor, data)

    def _is_cuda(self, tensor: Tensor) -> bool:
        return self._device(tensor).type == "cuda"

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = as_device(kwargs.get("device")), kwargs.get("dtype")
        for value in (*args, kwargs.get("other")):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                device, dtype = self._device(value), value.dtype
            elif not isinstance(value, (bool, torch.memory_format)):
                device = as_device(value) or device
        here = self._device(tensor)
        device = here if device is None else device
        kept = dtype is None or dtype == tensor.dtype
        if device.type == here.type and device.type != "meta":
            if kept and not kwargs.get("copy"):
                return tensor
            with self.stand_ins.making(on_gpu=here.type == "cuda"):
                return _TO(tensor, dtype or tensor.dtype, copy=True)
        if device.type == "meta":
            with self.stand_ins.making_nothing():
                return _TO(tensor, META, dtype or tensor.dtype)
        return self.stand_ins.moved(tensor, to_gpu=device.type == "cuda", dtype=dtype)

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        """Run autograd with this mode on, which torch would leave off: what is checkpointed is computed again inside."""
        tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = (grad_tensors,) if isinstance(grad_tensors, Tensor) else tuple(grad_tensors or [None] * len(tensors))
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
        within, self.in_backward = self.in_backward, True
        with self, self.gpu.phase("backward"):
            torch.autograd.graph._engine_run_backward(
                tensors,
                torch.autograd._make_grads(tensors, given, is_grads_batched=False),
                create_graph if retain_graph is None else retain_graph,
                create_graph,
                inputs,
                allow_unreachable=True,
                accumulate_grad=True,
            )
        self.in_backward = within

    # Values

    def _item(self, tensor: Tensor) -> Any:
        return self.stand_ins.value(tensor) if self.stand_ins.is_stand_in(tensor) else _ITEM(tensor)

    def _values(self, function: Any) -> Callable[..., Any]:
        def values(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.stand_ins.is_stand_in(tensor):
                if function is Tensor.numpy and self._is_cuda(tensor):
                    raise TypeError(
                        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                        "memory first."
                    )
                tensor = self.stand_ins.values(tensor)
            return function(tensor, *args, **kwargs)

        return values

    def _repr(self, tensor: Tensor, **kwargs: Any) -> str:
        if not self.stand_ins.is_stand_in(tensor):
            return str(Tensor.__repr__(tensor, **kwargs))  # type: ignore[no-untyped-call]
        return f"tensor(..., device='{self._device(tensor)}', size={tuple(tensor.shape)}, dtype={tensor.dtype})"

    def _format(self, tensor: Tensor, spec: str) -> str:
        if tensor.ndim == 0 and self.stand_ins.is_stand_in(tensor):
            return format(self.stand_ins.value(tensor), spec)
        if self.stand_ins.is_stand_in(tensor):
            return self._repr(tensor)
        return str(Tensor.__format__(tensor, spec))  # type: ignore[no-untyped-call]

    def _equal(self, first: Tensor, second: Tensor, *args: Any, **kwargs: Any) -> bool:
        one, other = self.stand_ins.shadow(first), self.stand_ins.shadow(second)
        return torch.equal(one, other) if one is not None and other is not None else first.shape == second.shape

    def _tensor(self, data: Any, *args: Any, **kwargs: Any) -> Tensor:
        device = as_device(kwargs.pop("device", None))
        if isinstance(data, Tensor):
            return self._to(data, device or self._device(data), *filter(None, [kwargs.get("dtype")]))
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        made = torch.tensor(data, *args, **kwargs)
        if device is not None and device.type == "cuda":
            made = self.stand_ins.moved(made, to_gpu=True)
        return made.requires_grad_(requires_grad) if requires_grad else made

    # Kernels that CUDA has and the CPU has not

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not self._is_cuda(x):
            return torch.rms_norm(x, list(shape), weight, eps)
        return _RmsNorm.apply(x, weight, len(shape))  # type: ignore[no-any-return, no-untyped-call]

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not self._is_cuda(x) or not training or not 0 < p < 1 or inplace:
            return torch.dropout_(x, p, training) if inplace else torch.dropout(x, p, training)
        return torch.ops.aten.native_dropout(x, p, True)[0]  # type: ignore[no-any-return]

    def _half_to_float(self, function: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, a softmax, which CUDA computes of ``float16`` in ``float32`` without a copy of its input."""

        def answer(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            dim = kwargs.get("dim", args[0] if args else None)
            half_to_float = input.dtype is torch.float16 and torch.float32 in (*args, *kwargs.values())
            if half_to_float and dim is not None and self._is_cuda(input):
                return kernel(input, dim, True)
            return function(input, *args, **kwargs)

        return answer

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return what CUDA's choice among its kernels gives: flash, memory-efficient or plain products."""
        if not self._is_cuda(query):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        ops = torch.ops.aten
        grouped = enable_gqa and query.shape[-3] != key.shape[-3]
        kernel = kernel_for(self.capability, query.dtype, query.shape[-1])
        if query.ndim != 4 or (kernel == "flash" and attn_mask is not None):
            kernel = "efficient"
        if query.ndim != 4 or (kernel == "efficient" and grouped):
            return ops._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        if kernel == "flash":
            padded, width = self._padded(query, key, value, 8)
            scale = scale if scale is not None else 1 / math.sqrt(width)
            found = ops._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return found[..., :width]  # type: ignore[no-any-return]
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, query.new_tensor(-torch.inf))
        if attn_mask is not None and attn_mask.shape[-1] % 8:
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 8))[..., : attn_mask.shape[-1]]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return ops._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]

    @staticmethod
    def _padded(query: Tensor, key: Tensor, value: Tensor, multiple: int) -> tuple[tuple[Tensor, ...], int]:
        width = query.shape[-1]
        missing = -width % multiple
        states = (query, key, value)
        return (tuple(F.pad(t, (0, missing)) for t in states) if missing else states), width


class _RmsNorm(torch.autograd.Function):
    """What CUDA's one kernel asks for: the result and the reciprocal norms in fp32; backward the gradients alone.

    It reads contiguous tensors: what is not (the gradient of a sum is one number) is copied first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dimensions: int) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        held = x.contiguous()
        reciprocal = held.new_empty((*x.shape[:-dimensions], *([1] * dimensions)), dtype=exact)
        ctx.save_for_backward(x, weight, reciprocal)
        return torch.empty_like(held)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        gradient, x = gradient.contiguous(), x.contiguous()
        trained = weight is not None and ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if trained else None, None


_DEVICE = torch._C.TensorBase.device.__get__
_TO, _ITEM, _SET_DATA = Tensor.to, Tensor.item, Tensor.data.__set__  # type: ignore[attr-defined]
_NOT_A_MAKER = frozenset({torch.set_default_device, torch.nn.init.kaiming_uniform_})
