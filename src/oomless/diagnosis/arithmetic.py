"""What follows from numbers alone: weights, gradients and optimizer state of one GPU, before anything is rehearsed.

Per parameter: what the weights are stored in; a gradient of the same; AdamW's two moments of the same. Automatic casting keeps all
four in fp32. DeepSpeed keeps 16-bit weights and gradients and, in fp32, a copy of the weights and both moments. ZeRO-1 shares out
what is fp32 there, ZeRO-2 the gradients too, ZeRO-3 and FSDP everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from oomless.diagnosis.situation import Situation

_MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.0, "adafactor": 0.0, "sgd": 0.0, "muon": 1.0}
_IN_BYTES = {"adamw_8bit": 2.0}
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """What one GPU holds whatever the batch, in bytes."""

    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    at_least: bool
    """Whether the dtype is not known, so that this is the least that it can be."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.gradients_bytes + self.state_bytes


def fixed(situation: Situation) -> Fixed | None:
    """Return what one GPU holds; ``None`` where the model, in how many bits it is packed, or what is shared out is not known."""
    parameters, several = situation.parameters, situation.several
    packed = situation.others.get("packed_weights") or situation.others.get("quantization_config")
    if parameters is None or (packed and "quantization" not in situation.values):
        return None
    parts = 1
    if several.shares:
        if several.gpus is None or several.at_least:
            return None
        parts = several.parts or several.gpus
    zero = several.sharing in ("zero1", "zero2", "zero3")
    quantized = situation.values.get("quantization")
    mixed = situation.mixed_precision is not None and situation.values.get("dtype") in (None, "fp32") and not zero
    item = 4.0 if mixed else float(ITEM.get(situation.values.get("dtype", ""), 2))
    item = 2.0 if zero and not quantized else item
    weights = parameters * item
    if quantized:
        packed = 1.0 if quantized == "int8" else 0.53
        whole = _vocabulary_matrices(situation)
        weights = (parameters - whole) * packed + whole * 2
    if not situation.trains_all:
        weights /= parts if several.sharing in ("zero3", "fsdp", "layers", "tensor") else 1
        return Fixed(
            weights_bytes=int(weights), gradients_bytes=0, state_bytes=0, at_least=not situation.values.get("dtype")
        )
    optimizer = situation.values.get("optimizer", "adamw")
    gradients = parameters * item
    state = parameters * (_MOMENTS.get(optimizer, 0.0) * item + _IN_BYTES.get(optimizer, 0.0))
    if zero:
        state = parameters * 12.0
    if situation.others.get("optimizer_in_backward"):
        gradients = 0.0
    if several.shares:
        state /= parts
        gradients /= parts if several.sharing != "zero1" else 1
        weights /= parts if several.sharing not in ("zero1", "zero2") else 1
    if situation.others.get("offload_optimizer"):
        state = 0.0
    if situation.others.get("offload_param"):
        weights = 0.0
    return Fixed(
        weights_bytes=int(weights),
        gradients_bytes=int(gradients),
        state_bytes=int(state),
        at_least="dtype" not in situation.values and not mixed and not zero,
    )


def _vocabulary_matrices(situation: Situation) -> int:
    d = situation.dimensions
    return 0 if d is None else d.vocabulary * d.hidden * (1 if d.tied else 2)
