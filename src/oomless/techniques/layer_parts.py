"""Norms and gated MLPs, known by what they compute, and the operators of ``ops`` in their place.

A norm or MLP is replaced where its own ``forward``, tried on a few real numbers, gives what ``ops.rms_norm`` or
``ops.gated_product`` give. Modules that do something else keep their own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from oomless.ops.gated_product import FUSED, gated_product
from oomless.ops.rms_norm import rms_norm
from oomless.techniques.kinds import body_of

NORMS, PRODUCTS = "norms", "gated products"
_EPSILONS = ("variance_epsilon", "eps")
_ACTIVATIONS = ("act_fn", "activation_fn")
_TRIED_TOKENS, _TRIED_WIDTH = 40, 1040


@dataclass(frozen=True, slots=True)
class NormForm:
    """Which of the forms of ``ops.rms_norm`` a module has."""

    eps: float
    round_first: bool
    unit_offset: bool

    def norm(self, x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None, fused: bool = False) -> Tensor:
        """Return what the module gives, in ``dtype`` if that is given."""
        form = {"round_first": self.round_first, "unit_offset": self.unit_offset}
        return rms_norm(x, weight, eps=self.eps, dtype=dtype, fused=fused, **form)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """The names of an MLP's parts."""

    gate: str | None
    """``None`` where one matrix gives gate and up, in this order."""

    up: str
    activation: str
    kernel: str | None
    """The name of the activation in ``ops.gated_product.FUSED``."""

    def hidden(self, module: Any, x: Tensor, *, fused: bool = False) -> Tensor:
        """Return what goes into ``down_proj``."""
        if self.gate is None:
            gate, up = getattr(module, self.up)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(module, self.gate)(x), getattr(module, self.up)(x)
        return gated_product(gate, up, getattr(module, self.activation), fused=self.kernel if fused else None)


def is_known(module: nn.Module) -> bool:
    """Return whether ``replace`` can replace ``module``."""
    return norm_form(module) is not None or gated_mlp(module) is not None


def replace(model: Any, *, norm_dtype: torch.dtype | None = None, plain: bool = True) -> int:
    """Replace the norms and gated MLPs of the body of ``model``; return how many.

    Args:
        model: changed.
        norm_dtype: what norms give, where that is not what their own forward does (``fp32_residual``).
        plain: also where there is no kernel.
    """
    fused = fused_parts(model)
    found = 0
    known: dict[Any, tuple[NormForm | None, GatedMLP | None]] = {}
    for module in body_of(model).modules():
        kind = _kind(module)
        if kind is None:
            continue
        form, mlp = known.get(kind) or known.setdefault(kind, (norm_form(module), gated_mlp(module)))
        if form is not None:
            module.forward = _Norm(module, form, norm_dtype, fused)
            found += 1
        elif mlp is not None and (plain or mlp.kernel is not None):
            module.forward = _GatedMLP(module, mlp, fused)
            found += 1
    return found


def fused_parts(model: Any) -> set[str]:
    """Return the parts of ``model`` that are computed by one operator each, of those that were replaced; for ``assemble`` to fill."""
    if not hasattr(model, "fused_layer_parts"):
        model.fused_layer_parts = set()
    parts: set[str] = model.fused_layer_parts
    return parts


def trials(model: Any, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return, for each part that ``replace`` replaced and of which there are kernels, what computes small tensors in both ways.

    Each raises ``RuntimeError`` where the results are not the same to rounding; what a compiler raises goes through.
    """
    kinds: dict[str, dict[Any, Callable[[], None]]] = {}
    kind: Any
    for module in body_of(model).modules():
        norm = vars(module).get("forward")
        mlp = None if norm is None else gated_mlp(module)
        if isinstance(norm, _Norm):
            width, dtype = module.weight.shape[0], module.weight.dtype
            stream = dtype if norm.dtype is None else torch.float32
            shapes: Any = ((_TRIED_TOKENS, width), stream), ((width,), dtype)
            function: Callable[..., Tensor] = partial(norm.form.norm, dtype=norm.dtype)
            part, kind = NORMS, (norm.form, shapes)
        elif mlp is not None and mlp.kernel is not None:
            shapes = (((_TRIED_TOKENS, _TRIED_WIDTH), model.dtype),) * 2
            part, kind, function = PRODUCTS, mlp.kernel, partial(_product, mlp.kernel)
        else:
            continue
        kinds.setdefault(part, {})[kind] = partial(_try, part, function, shapes, device)
    return {part: partial(_all, tuple(tries.values())) for part, tries in kinds.items()}


def _all(tries: Iterable[Callable[[], None]]) -> None:
    for one in tries:
        one()


def _try(part: str, function: Callable[..., Tensor], shapes: Any, device: torch.device) -> None:
    compare(part, *(_results(partial(function, fused=fused), shapes, device) for fused in (True, False)))


def compare(part: str, fused: list[Tensor], plain: list[Tensor]) -> None:
    """Check that what ``part`` gives is the same both ways.

    Raises:
        RuntimeError: it differs by more than rounding.
    """
    for ours, theirs in zip(fused, plain, strict=True):
        allowed = (2 * torch.finfo(ours.dtype).eps + 2e-6) * (theirs.abs() + theirs.abs().mean())
        if not bool(((ours - theirs).abs() <= allowed).all()):
            raise RuntimeError(f"fused {part} of {ours.dtype} differ from their plain form")


def _product(kernel: str, gate: Tensor, up: Tensor, *, fused: bool) -> Tensor:
    return gated_product(gate, up, FUSED[kernel][0], fused=kernel if fused else None)


def _results(function: Callable[..., Tensor], shapes: Any, device: torch.device) -> list[Tensor]:
    """Return what ``function`` makes of tensors of these shapes and types, and their gradients."""
    waves = [
        (numbers(*shape).to(device, dtype) + place).requires_grad_() for place, (shape, dtype) in enumerate(shapes)
    ]
    with torch.enable_grad():
        result = function(*waves)
        torch.autograd.backward(result, result.detach().cos())
    return [result.detach(), *(wave.grad for wave in waves if wave.grad is not None)]


def norm_form(module: nn.Module) -> NormForm | None:
    """Return the form of ``module`` if it is an RMSNorm, else ``None``."""
    known = getattr(vars(module).get("forward"), "form", None)
    if isinstance(known, NormForm):
        return known
    weight = module._parameters.get("weight")
    eps = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if weight is None or weight.ndim != 1 or len(module._parameters) > 1 or eps is None or not _is_untouched(module):
        return None
    with _disable_current_modes(), torch.no_grad():
        x = numbers(3, weight.shape[0]).to(torch.bfloat16)
        twin = copy.copy(module)
        twin._parameters = {"weight": nn.Parameter(numbers(weight.shape[0]).to(torch.bfloat16))}
        wanted = _attempt(twin, x)
        if wanted is None:
            return None
        for form in (NormForm(eps, True, False), NormForm(eps, False, True), NormForm(eps, False, False)):
            if torch.equal(wanted, form.norm(x, twin._parameters["weight"])):  # type: ignore[arg-type]
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
    if module.get_submodule(activation).state_dict():  # an activation that learns (xIELU) is no known one
        return None
    projections = names - {activation}
    kernel = _kernel(module._modules[activation])
    if projections == {"gate_proj", "up_proj", "down_proj"}:
        parts = GatedMLP("gate_proj", "up_proj", activation, kernel)
    elif projections == {"gate_up_proj", "down_proj"}:
        parts = GatedMLP(None, "gate_up_proj", activation, kernel)
    else:
        return None
    with _disable_current_modes(), torch.no_grad():
        twin = copy.copy(module)
        matrices = {
            "gate_proj": numbers(6, 4),
            "up_proj": numbers(6, 4) + 1,
            "gate_up_proj": numbers(12, 4),
            "down_proj": numbers(4, 6),
        }
        twin._modules = {name: _linear(matrices[name]) for name in projections}
        twin._modules[activation] = module._modules[activation]
        x = numbers(1, 3, 4)
        wanted, made = _attempt(twin, x), twin._modules["down_proj"](parts.hidden(twin, x))  # type: ignore[misc]
        return parts if wanted is not None and torch.equal(wanted, made) else None


def _kind(module: nn.Module) -> Any:
    """Return what modules of one model have in common that compute the same; ``None`` for what is no norm and no MLP."""
    weight = module._parameters.get("weight")
    activations = [module._modules[name] for name in _ACTIVATIONS if name in module._modules]
    if not activations and (weight is None or weight.ndim != 1):
        return None
    facts = [
        (name, value if isinstance(value, (bool, int, float, str)) else id(value))
        for part in (module, *activations)
        for name, value in vars(part).items()
        if not name.startswith("_")
    ]
    children = [(name, type(child)) for name, child in module._modules.items()]
    return type(module), None if weight is None else weight.shape, *facts, *children


def _is_untouched(module: nn.Module) -> bool:
    """Whether the class's own forward is what runs, and takes one input."""
    return "forward" not in vars(module) and len(signature(type(module).forward).parameters) == 2


def _kernel(activation: Any) -> str | None:
    """Return the name of ``activation`` in ``FUSED``."""
    with _disable_current_modes(), torch.no_grad():
        x = numbers(64).double() * 4
        given = activation(x)
        for name, (function, _) in FUSED.items():
            if torch.allclose(given, function(x), rtol=1e-9, atol=1e-12):
                return name
    return None


def _attempt(twin: nn.Module, x: Tensor) -> Tensor | None:
    """Return what the own forward of ``twin`` makes of ``x`` while it trains, when a dropout of its own acts."""
    twin.training = True
    try:
        with torch.random.fork_rng(devices=[]):
            result = type(twin).forward(twin, x)
    except Exception:  # whatever a forward that takes other inputs raises
        return None
    return result if isinstance(result, Tensor) else None


@cache
def numbers(*shape: int) -> Tensor:
    """Return numbers without a pattern, the same every time, that disturb no random state; nobody writes to them."""
    return torch.sin(torch.arange(1.0, 1.0 + torch.Size(shape).numel()) ** 2).view(shape)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


class _Norm:
    """The forward of one norm."""

    def __init__(self, module: nn.Module, form: NormForm, dtype: torch.dtype | None, fused: set[str]) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.form, self.dtype, self.fused = form, dtype, fused

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.form.norm(hidden_states, self.module.weight, dtype=self.dtype, fused=NORMS in self.fused)


class _GatedMLP:
    """The forward of one MLP."""

    def __init__(self, module: nn.Module, parts: GatedMLP, fused: set[str]) -> None:
        self.module = weakref.proxy(module)
        self.parts, self.fused = parts, fused

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.parts.hidden(self.module, x, fused=PRODUCTS in self.fused)
        result: Tensor = self.module.down_proj(hidden)
        return result
