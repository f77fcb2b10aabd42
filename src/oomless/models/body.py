"""What goes into a model's head, and what the model does to what comes out of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from oomless.techniques.kinds import body_of

WHOLE = "_oomless_whole_forward"
FIRST = "_oomless_first_position"
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)


def run(model: Any, **inputs: Any) -> Tensor:
    """Return what the body of ``model`` hands to its head, [B, T, D]; ``inputs`` are those of its forward.

    Where there is something between the body and the head (a dense layer, a factor), or the body has no output of its own,
    the model's whole forward runs as far as its head (``models.form`` says for which).
    """
    if (first := getattr(model, FIRST, 0)) and inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + first
    if not getattr(model, WHOLE, False):
        hidden: Tensor = body_of(model)(use_cache=False, **inputs).last_hidden_state
        return hidden.to(model.get_output_embeddings().weight.dtype)  # some bodies (Mamba) sum and end in fp32
    handle = model.get_output_embeddings().register_forward_pre_hook(_stop)
    try:
        model(use_cache=False, **inputs)
    except _ReachedHead as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise TypeError(f"{type(model).__name__} does not call its head")


def first_position(config: Any) -> int:
    """Return where positions begin in a model of ``config`` that keeps one for padding; 0 where its config names no padding."""
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    return 0 if padding is None or padding < 0 else int(padding) + 1


class _ReachedHead(BaseException):
    """Ends a forward where the head would be called; not an ``Exception``, which models may catch."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _ReachedHead(inputs[0])


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Return the soft cap (or ``None``) and the factor that the architecture applies to its logits."""
    text = config.get_text_config()
    scale = 1.0
    for name in _FACTORS:
        scale *= float(getattr(text, name, None) or 1.0)
    for name in _DIVISORS:
        scale /= float(getattr(text, name, None) or 1.0)
    return next((float(cap) for name in _SOFT_CAPS if (cap := getattr(text, name, None))), None), scale
