"""The selective scan of Mamba's mixers by ``ops.selective_scan``, in place of transformers' loop over tokens.

Saves: of the states of every token and channel, which that loop keeps in fp32 several times, all but one in 128. Costs the scan once
more in backward. A rehearsal of the loop runs tens of thousands of operators a layer; one of this, some dozens.

The mixers of Mamba, FalconMamba, Jamba and Zamba call a function of their module, ``mamba_selective_scan``. Nothing of the library is
changed: a mixer whose function, tried on a few real numbers, gives what ``ops.selective_scan`` gives gets a forward of the same code
that finds another function under this name. transformers itself takes compiled kernels in place of such functions where the packages
mamba-ssm and causal-conv1d are installed. No rehearsal can run those, so that a plan would not be that of the run: mixers run
transformers' own PyTorch code around this scan, whatever is installed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from oomless.ops.selective_scan import selective_scan
from oomless.techniques.kinds import body_of
from oomless.techniques.layer_parts import numbers

_SCAN, _WHOLE, _CONVOLUTION = "mamba_selective_scan", "mamba_inner_fn", "causal_conv1d_fn"
_TRIED = (2, 6, 19, 4)
"""Sequences, channels, tokens, numbers of a state."""


def replace(model: Any) -> int:
    """Let the mixers in the body of ``model`` scan by ``ops.selective_scan``; return how many do."""
    found = 0
    for module in body_of(model).modules():
        function = _forward_of(type(module))
        if function is not None and "forward" not in vars(module):
            module.forward = _Mixer(module, function)
            found += 1
    return found


class _Mixer:
    """The forward of one mixer."""

    def __init__(self, module: nn.Module, function: FunctionType) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def _forward_of(kind: type[nn.Module]) -> FunctionType | None:
    """Return the forward of ``kind`` with another scan; ``None`` where it is not the known one."""
    function = inspect.unwrap(kind.forward)
    if not isinstance(function, FunctionType) or _SCAN not in function.__code__.co_names:
        return None
    own = function.__globals__.get(_SCAN)
    if own is None or not _is_known(inspect.unwrap(own)):
        return None
    others: dict[str, Any] = {_SCAN: _scan(inspect.unwrap(own)), _WHOLE: _no_kernel}
    if _CONVOLUTION in function.__globals__:
        others[_CONVOLUTION] = inspect.unwrap(function.__globals__[_CONVOLUTION])
    names = function.__globals__ | others
    other = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def _no_kernel(*_: Any, **__: Any) -> None:
    """What transformers gives in place of a whole mixer's kernel where there is none."""


def _scan(plain: Callable[..., Any]) -> Callable[..., Any]:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if D is None or z is None or delta_bias is None or not delta_softplus or return_last_state:
            rest = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            return plain(hidden_states, dt, A, B, C, **rest, return_last_state=return_last_state, **kwargs)
        return selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias)

    return scan


@cache
def _is_known(own: Callable[..., Any]) -> bool:
    """Whether ``own`` does what ``selective_scan`` does."""
    sequences, channels, tokens, states = _TRIED
    wide, narrow = (sequences, channels, tokens), (sequences, states, tokens)
    shapes = (wide, wide, (channels, states), narrow, narrow, (channels,), wide, (channels,))
    with _disable_current_modes(), torch.no_grad():
        x, delta, A, B, C, D, z, bias = (numbers(*shape) + 0.1 * place for place, shape in enumerate(shapes))
        A = -A.exp()
        try:
            wanted = own(x, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
        except Exception:  # whatever a function that takes other inputs raises
            return False
        made = selective_scan(x, delta, A, B, C, D, z, bias)
        return isinstance(wanted, Tensor) and wanted.shape == made.shape and torch.allclose(wanted, made, 1e-5, 1e-5)
