"""Rotary embeddings of attention by one operator for queries and one for keys (``ops.rotary``).

transformers' attention classes call a function of their module, ``apply_rotary_pos_emb``. Nothing of the library is changed: an
attention whose function, tried on a few real numbers, gives what ``ops.rotary`` gives gets a forward of the same code that finds
another function under this name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from oomless.ops.rotary import rotary
from oomless.techniques import layer_parts
from oomless.techniques.kinds import body_of

ROTARY = "rotary embeddings"
_NAME = "apply_rotary_pos_emb"
_TRIED = (2, 3, 5, 16)
"""Blocks, heads, tokens, width of a head."""

Rotation = Callable[..., tuple[Tensor, Tensor]]


def replace(model: Any) -> int:
    """Let attention in the body of ``model`` rotate by ``ops.rotary`` where that is fused; return how many do."""
    forwards: dict[type[nn.Module], FunctionType | None] = {}
    fused = layer_parts.fused_parts(model)
    found = 0
    for module in body_of(model).modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _forward_of(kind, fused)
        function = forwards[kind]
        if function is not None and "forward" not in vars(module):
            module.forward = _Attention(module, function)
            found += 1
    return found


def trials(model: Any, device: torch.device) -> dict[str, Callable[[], None]]:
    """As ``layer_parts.trials``."""
    kinds = {type(part) for part in body_of(model).modules() if isinstance(vars(part).get("forward"), _Attention)}
    owns = {kind.forward.__globals__[_NAME] for kind in kinds}
    return {ROTARY: partial(_try, owns, model.dtype, device)} if owns else {}


class _Attention:
    """The forward of one attention."""

    def __init__(self, module: nn.Module, function: FunctionType) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def _forward_of(kind: type[nn.Module], fused: set[str]) -> FunctionType | None:
    """Return the forward of ``kind`` with another rotation; ``None`` where it is not the known one."""
    function = kind.forward
    if not isinstance(function, FunctionType) or _NAME not in function.__code__.co_names:
        return None
    own = function.__globals__.get(_NAME)
    if own is None or not _is_known(own):
        return None
    other = FunctionType(
        function.__code__,
        function.__globals__ | {_NAME: _rotation(own, fused)},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def _rotation(own: Rotation, fused: set[str]) -> Rotation:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        usual = (
            not args
            and not kwargs
            and cos.ndim == 3
            and all(x.ndim == 4 and x.stride(-1) == 1 and x.dtype == cos.dtype == sin.dtype for x in (q, k))
        )
        if ROTARY not in fused or not usual:
            return own(q, k, cos, sin, *args, **kwargs)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return rotate


def _ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _is_known(own: Callable[..., Any]) -> bool:
    """Whether ``own`` does what ``rotary`` does."""
    with _disable_current_modes(), torch.no_grad():
        for width in (_TRIED[-1], _TRIED[-1] // 2):
            given = _numbers(width, torch.bfloat16, torch.device("cpu"))
            try:
                wanted = own(*given)
            except Exception:  # whatever a function that takes other inputs raises; most take the whole width alone
                if width == _TRIED[-1]:
                    return False
                continue
            if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(map(torch.equal, wanted, _ours(*given)))):
                return False
    return True


def _try(owns: set[Rotation], dtype: torch.dtype, device: torch.device) -> None:
    for own in owns:
        layer_parts.compare(ROTARY, *(_results(rotation, dtype, device) for rotation in (_ours, own)))


def _results(rotation: Rotation, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return queries and keys rotated, and their gradients."""
    q, k, cos, sin = _numbers(_TRIED[-1], dtype, device)
    leaves = q.requires_grad_(), k.requires_grad_()
    with torch.enable_grad():
        made = rotation(*leaves, cos, sin)
        gradients = torch.autograd.grad(made, leaves, [x.detach().cos() for x in made])
    return [*(x.detach() for x in made), *gradients]


def _numbers(width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return queries, keys, and cosines and sines of ``width`` for them."""
    blocks, _, tokens, _ = _TRIED
    shapes = _TRIED, _TRIED, (blocks, tokens, width), (blocks, tokens, width)
    return [layer_parts.numbers(*shape).to(device, dtype) + place for place, shape in enumerate(shapes)]
