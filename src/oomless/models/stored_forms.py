"""Weights that are stored in fewer bits, read as what they stand for: each form by its own definition.

A form names the tensors of a file that together stand for one plain tensor, and says what that is, in fp32. Whoever reads a
checkpoint through ``plain`` sees plain names alone; the one rounding is that to the dtype in which the model is held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oomless.errors import ModelError

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How one plain tensor is stored. Endings follow what the names of its tensors have in common."""

    plain: str
    """The ending of the plain tensor."""

    needed: tuple[str, ...]
    """The endings of the tensors that stand for it."""

    optional: tuple[str, ...] = ()
    """Those of tensors that may be there too."""

    decode: Callable[[Parts, Settings], Tensor]
    """Makes the plain tensor, in fp32, of its parts by their endings and the model's ``quantization_config``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One plain tensor as it lies in the files."""

    parts: Mapping[str, str]
    """The names of its tensors by their endings."""

    form: Form


def _scaled(weight: Tensor, scale: Tensor, block: Collection[int] | None) -> Tensor:
    """Return ``weight`` times ``scale``: one number, one for each row, or one for each block of ``block`` rows and columns."""
    scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()  # a byte is an exponent of 2
    if scale.ndim == 2 and block is not None:
        for axis, size in enumerate(block):
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    elif scale.ndim == 1 and scale.numel() > 1:
        scale = scale[:, None]
    return weight.float() * scale


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return [..., n * 32 / bits] small numbers from [..., n] of int32, the lowest bits of each first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers: Tensor = packed[..., None] >> shifts & 2**bits - 1
    return numbers.flatten(-2)


def _bits(settings: Settings, known: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits not in known:
        raise ModelError(
            f"weights of {settings.get('quant_method', 'this form')} in {bits} bits are not read: {known} are"
        )
    return int(bits)


def _decode_fp8(parts: Parts, settings: Settings) -> Tensor:
    scale = parts.get(".weight_scale_inv", parts.get(".weight_scale"))
    assert scale is not None
    return _scaled(parts[".weight"], scale, settings.get("weight_block_size"))


def _decode_gptq(parts: Parts, settings: Settings) -> Tensor:
    """``weight[out, in] = (q[in, out] - zero[group of in, out]) * scale[group of in, out]``, zeros stored less one."""
    bits = _bits(settings, (2, 4, 8))
    values = _unpack(parts[".qweight"].T.contiguous(), bits)  # [out, in]
    zeros = _unpack(parts[".qzeros"], bits)  # [groups, out]
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1 & 2**bits - 1
    groups = parts.get(".g_idx")
    if groups is None:
        groups = torch.arange(values.shape[1]) * zeros.shape[0] // values.shape[1]
    scales = parts[".scales"].float()
    weight: Tensor = (values - zeros.T[:, groups]) * scales.T[:, groups]
    return weight


_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in its eight numbers of one int32 each column lies."""


def _decode_awq(parts: Parts, settings: Settings) -> Tensor:
    """``weight[out, in] = (q[in, out] - zero[group of in, out]) * scale[group of in, out]``, columns interleaved in eights."""
    bits = _bits(settings, (4,))
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise ModelError(f"AWQ weights are read in the layout gemm; these are in {settings['version']!r}")
    values, zeros = (
        _unpack(parts[name], bits).view(parts[name].shape[0], -1, 8)[..., _AWQ_ORDER].flatten(-2)
        for name in (".qweight", ".qzeros")
    )
    groups = torch.arange(values.shape[0]) * zeros.shape[0] // values.shape[0]
    weight: Tensor = (values - zeros[groups]) * parts[".scales"].float()[groups]
    return weight.T


def _decode_bitsandbytes_4bit(parts: Parts, settings: Settings) -> Tensor:
    state = parts.get(".weight.quant_state.bitsandbytes__nf4", parts.get(".weight.quant_state.bitsandbytes__fp4"))
    assert state is not None
    told = json.loads(bytes(state.tolist()))
    scales = parts[".weight.absmax"]
    if ".weight.nested_absmax" in parts:
        coarse = parts[".weight.nested_absmax"].repeat_interleave(told["nested_blocksize"])[: scales.numel()]
        scales = parts[".weight.nested_quant_map"][scales.long()] * coarse + told["nested_offset"]
    packed = parts[".weight"].flatten()
    values = parts[".weight.quant_map"].float()[torch.stack([packed >> 4, packed & 15], -1).flatten().long()]
    count = torch.Size(told["shape"]).numel()
    scales = scales.float().repeat_interleave(told["blocksize"])[:count]
    return (values[:count] * scales).view(told["shape"])


def _decode_bitsandbytes_8bit(parts: Parts, settings: Settings) -> Tensor:
    layout = parts.get(".weight_format")
    if layout is not None and int(layout) != 0:
        raise ModelError(
            "bitsandbytes' 8-bit weights are read in the layout row; these are in one of a GPU: save them again"
        )
    return parts[".weight"].float() * (parts[".SCB"].float() / 127)[:, None]


_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _decode_mxfp4(parts: Parts, settings: Settings) -> Tensor:
    """[experts, in, out] from [experts, out, groups, 16] bytes of two numbers and an exponent for each group."""
    blocks, scales = parts["_blocks"], parts["_scales"]
    values = _FP4[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).transpose(1, 2)


def _decode_mlx(parts: Parts, settings: Settings) -> Tensor:
    """``weight[out, in] = q[out, in] * scale[out, group of in] + bias[out, group of in]``."""
    values = _unpack(parts[".weight"].view(torch.int32), _bits(settings, (2, 4, 8)))
    size = int(settings["group_size"])
    scales, biases = (parts[name].float().repeat_interleave(size, 1) for name in (".scales", ".biases"))
    return values * scales + biases


def _decode_compressed(parts: Parts, settings: Settings) -> Tensor:
    """Whole numbers or fp8 times a scale of the tensor, the row, the block or the group."""
    scale = parts[".weight_scale"].float()
    if ".weight_packed" not in parts:
        weight = parts[".weight"].float()
        if ".weight_zero_point" in parts:
            weight = weight - parts[".weight_zero_point"].float().reshape(-1, *[1] * (scale.ndim > 0))
        block = None
        if scale.ndim == 2 and scale.shape[1] > 1:
            block = tuple(-(-side // count) for side, count in zip(weight.shape, scale.shape, strict=True))
        return _scaled(weight, scale, block)
    rows, columns = parts[".weight_shape"].tolist()
    packed = parts[".weight_packed"]
    bits = 32 * packed.shape[1] // columns
    if bits not in (4, 8) or ".weight_zero_point" in parts:
        raise ModelError(
            "packed weights of compressed-tensors are read in 4 or 8 bits without zero points; these have others"
        )
    values = _unpack(packed, bits)[:rows, :columns] - 2 ** (bits - 1)
    groups = parts.get(".weight_g_idx")
    if groups is None:
        groups = torch.arange(columns) * scale.shape[1] // columns
    plain: Tensor = values * scale[:, groups]
    return plain


_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point", ".output_scale")
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")

_FP8 = tuple(
    Form(plain=".weight", needed=(".weight", scale), optional=_ACTIVATIONS, decode=_decode_fp8)
    for scale in (".weight_scale_inv", ".weight_scale")
)

FORMS: Mapping[str, tuple[Form, ...]] = {
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "mxfp8": _FP8,
    "gptq": (
        Form(plain=".weight", needed=(".qweight", ".qzeros", ".scales"), optional=(".g_idx",), decode=_decode_gptq),
    ),
    "awq": (Form(plain=".weight", needed=(".qweight", ".qzeros", ".scales"), decode=_decode_awq),),
    "bitsandbytes 4-bit": tuple(
        Form(
            plain=".weight",
            needed=(".weight", ".weight.absmax", ".weight.quant_map", f".weight.quant_state.bitsandbytes__{kind}"),
            optional=_NESTED,
            decode=_decode_bitsandbytes_4bit,
        )
        for kind in ("nf4", "fp4")
    ),
    "bitsandbytes 8-bit": (
        Form(
            plain=".weight", needed=(".weight", ".SCB"), optional=(".weight_format",), decode=_decode_bitsandbytes_8bit
        ),
    ),
    "mxfp4": (Form(plain="", needed=("_blocks", "_scales"), decode=_decode_mxfp4),),
    "mlx": (Form(plain=".weight", needed=(".weight", ".scales", ".biases"), decode=_decode_mlx),),
    "compressed-tensors": (
        Form(
            plain=".weight",
            needed=(".weight_packed", ".weight_scale", ".weight_shape"),
            optional=(".weight_zero_point", ".weight_g_idx", *_ACTIVATIONS),
            decode=_decode_compressed,
        ),
        Form(
            plain=".weight",
            needed=(".weight", ".weight_scale"),
            optional=(".weight_zero_point", *_ACTIVATIONS),
            decode=_decode_compressed,
        ),
    ),
}
"""The forms that are read, by the kind that ``starting_point.quantization_kind`` tells."""


def plain(names: Collection[str], kind: str | None) -> dict[str, Stored | None]:
    """Return the plain tensors for which the tensors ``names`` stand; ``None`` for one that is plain in the file."""
    found: dict[str, Stored | None] = dict.fromkeys(names)
    for form in FORMS[kind] if kind is not None else ():
        first = form.needed[0]
        for name in [name for name in found if name.endswith(first)]:
            stem = name[: len(name) - len(first)]
            if all(found.get(stem + ending, form) is None for ending in form.needed):
                parts = {e: stem + e for e in (*form.needed, *form.optional) if found.get(stem + e, form) is None}
                for part in parts.values():
                    del found[part]
                found[stem + form.plain] = Stored(parts=parts, form=form)
    return found
