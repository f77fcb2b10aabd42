"""Which module of a model an error came out of, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from oomless.errors import UnplannableError

_UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def blamed(error: BaseException) -> UnplannableError | None:
    """Return what to tell of ``error`` if it was raised inside a module of a model, else ``None``."""
    modules = list(_modules(error.__traceback__))
    if not modules:
        return None
    root, inner = modules[0], modules[-1]
    name = next((name for name, module in root.named_modules() if module is inner and name), "the model itself")
    where = f"{name} ({type(inner).__name__})"
    if isinstance(error, _UNKNOWN_VALUES):
        return UnplannableError(
            f"{type(root).__name__} cannot be planned: what {where} asks for depends on values ({error}), which a plan does not have. "
            "It can be trained without a plan: train --as-given"
        )
    said = " ".join(str(error).split())[:300]
    return UnplannableError(
        f"{type(root).__name__} fails in {where}: {type(error).__name__}: {said}. Update transformers, or train this model with other "
        "settings; --debug shows the whole traceback"
    )


def _modules(traceback: TracebackType | None) -> Iterator[nn.Module]:
    """Yield the modules whose methods ``traceback`` goes through, the outermost first."""
    while traceback is not None:
        owner: Any = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner
        traceback = traceback.tb_next
