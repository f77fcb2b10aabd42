"""Make norms and gated products again in backward, keep everything else.

Saves: of a layer without gradient checkpointing about half of what it keeps, namely the fp32 copies and outputs of its norms
and the activation and product inside its MLP; what backward holds at once of a layer with it. Costs: three elementwise
passes over a layer, next to no time beside its matrix products; gradient checkpointing makes those again as well.

A norm or MLP is replaced where its own ``forward``, tried on a few real numbers, gives what ``ops.rms_norm`` or
``ops.gated_product`` give. Modules that do something else keep their own.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from oomless.errors import ConfigError
from oomless.ops.gated_product import Activation, gated_product
from oomless.ops.recompute import recomputing
from oomless.ops.rms_norm import rms_norm
from oomless.techniques.checkpointing import layers_of_backward
from oomless.techniques.kinds import body_of

_EPSILONS = ("variance_epsilon", "eps")
_ACTIVATIONS = ("act_fn", "activation_fn")


def applies(model: Any) -> bool:
    """Return whether ``apply`` finds anything in ``model``."""
    parts = body_of(model).modules()
    return bool(layers_of_backward(model)) and any(norm_form(part) or gated_mlp(part) for part in parts)


def apply(model: Any, *, norm_dtype: torch.dtype | None = None) -> None:
    """Replace the norms and gated MLPs of the body of ``model``; call after its layers were chosen for checkpointing.

    ``norm_dtype`` is what norms give, where that is not what their own forward does (``fp32_residual``).

    Raises:
        ConfigError: backward runs through no layer, or no norm and no MLP was recognised.
    """
    layers = layers_of_backward(model)
    found = 0
    for module in body_of(model).modules():
        form = norm_form(module)
        mlp = gated_mlp(module)
        if form is not None:
            module.forward = _Norm(module, form, norm_dtype)
        elif mlp is not None:
            module.forward = _GatedMLP(module, mlp)
        found += form is not None or mlp is not None
    if not (layers and found):
        reason = "no norm or MLP of this model is one that it knows" if layers else "backward runs through no layer"
        raise ConfigError(f"cheap_recompute has no effect: {reason}; remove it")
    for layer in layers:
        if not layer.gradient_checkpointing:
            layer.forward = _Layer(layer)


@dataclass(frozen=True, slots=True)
class NormForm:
    """Which of the forms of ``ops.rms_norm`` a module has."""

    eps: float
    round_first: bool
    unit_offset: bool


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """The names of an MLP's parts; ``gate`` is ``None`` where one matrix gives gate and up, in this order."""

    gate: str | None
    up: str
    activation: str

    def hidden(self, module: Any, x: Tensor) -> Tensor:
        """Return what goes into ``down_proj``."""
        activation: Activation = getattr(module, self.activation)
        if self.gate is None:
            gate, up = getattr(module, self.up)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(module, self.gate)(x), getattr(module, self.up)(x)
        return gated_product(gate, up, activation)


def norm_form(module: nn.Module) -> NormForm | None:
    """Return the form of ``module`` if it is an RMSNorm, else ``None``."""
    weight = module._parameters.get("weight")
    eps = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if weight is None or weight.ndim != 1 or len(module._parameters) > 1 or eps is None or not _is_untouched(module):
        return None
    with _disable_current_modes(), torch.no_grad():
        x = _numbers(3, weight.shape[0]).to(torch.bfloat16)
        twin = copy.copy(module)
        twin._parameters = {"weight": nn.Parameter(_numbers(weight.shape[0]).to(torch.bfloat16))}
        wanted = _attempt(twin, x)
        if wanted is None:
            return None
        for form in (NormForm(eps, True, False), NormForm(eps, False, True), NormForm(eps, False, False)):
            made = rms_norm(x, twin._parameters["weight"], eps=eps, **_keywords(form))  # type: ignore[arg-type]
            if torch.equal(wanted, made):
                return form
    return None


def gated_mlp(module: nn.Module) -> GatedMLP | None:
    """Return the parts of ``module`` if it is an MLP whose forward is ``down(activation(gate(x)) * up(x))``, else ``None``."""
    known = getattr(vars(module).get("forward"), "parts", None)
    if isinstance(known, GatedMLP):
        return known
    names = set(module._modules)
    activation = next((name for name in _ACTIVATIONS if name in names), None)
    if activation is None or module._parameters or not _is_untouched(module):
        return None
    projections = names - {activation}
    if projections == {"gate_proj", "up_proj", "down_proj"}:
        parts = GatedMLP("gate_proj", "up_proj", activation)
    elif projections == {"gate_up_proj", "down_proj"}:
        parts = GatedMLP(None, "gate_up_proj", activation)
    else:
        return None
    with _disable_current_modes(), torch.no_grad():
        twin = copy.copy(module)
        matrices = {
            "gate_proj": _numbers(6, 4),
            "up_proj": _numbers(6, 4) + 1,
            "gate_up_proj": _numbers(12, 4),
            "down_proj": _numbers(4, 6),
        }
        twin._modules = {name: _linear(matrices[name]) for name in projections}
        twin._modules[activation] = module._modules[activation]
        x = _numbers(1, 3, 4)
        wanted, made = _attempt(twin, x), twin._modules["down_proj"](parts.hidden(twin, x))  # type: ignore[misc]
        return parts if wanted is not None and torch.equal(wanted, made) else None


def _is_untouched(module: nn.Module) -> bool:
    """Whether the class's own forward is what runs."""
    return "forward" not in vars(module)


def _attempt(twin: nn.Module, x: Tensor) -> Tensor | None:
    try:
        result = type(twin).forward(twin, x)
    except Exception:  # whatever a forward that takes other inputs raises
        return None
    return result if isinstance(result, Tensor) else None


@cache
def _numbers(*shape: int) -> Tensor:
    """Return numbers without a pattern, the same every time, that disturb no random state; nobody writes to them."""
    return torch.sin(torch.arange(1.0, 1.0 + torch.Size(shape).numel()) ** 2).view(shape)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _keywords(form: NormForm) -> dict[str, bool]:
    return {"round_first": form.round_first, "unit_offset": form.unit_offset}


class _Norm:
    """The forward of one norm."""

    def __init__(self, module: nn.Module, form: NormForm, dtype: torch.dtype | None) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.form, self.dtype = form, dtype

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.module.weight, eps=self.form.eps, dtype=self.dtype, **_keywords(self.form))


class _GatedMLP:
    """The forward of one MLP."""

    def __init__(self, module: nn.Module, parts: GatedMLP) -> None:
        self.module = weakref.proxy(module)
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.module.down_proj(self.parts.hidden(self.module, x))
        return result


class _Layer:
    """The forward of one layer that is not checkpointed, or not always: recovery may do so (``training.ladder``)."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = weakref.ref(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer()
        with nullcontext() if layer.gradient_checkpointing else recomputing():
            return type(layer).forward(layer, *args, **kwargs)
