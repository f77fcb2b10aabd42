"""Triton kernels are compiled to machine code for GPUs that are not here: by this file as a program, without Triton's interpreter."""

import os
import subprocess
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from oomless.ops import layer_kernels, loss_kernels
from oomless.optim import kernels, projection_kernels
from oomless.optim.kernel_parts import forms as weight_forms


def compiled(capability, kernel, forms, kinds, other, warps=4):
    """Check that ``kernel`` becomes machine code; arguments are constants (``forms``), of the ``kinds``, or like ``other``."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in forms else kinds.get(name, other) for name in names}
    constants = {(names.index(name),): value for name, value in forms.items() if name in names}
    made = compile(
        ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    assert len(made.asm["cubin"]) > 1000


def update(capability, dtype, way):
    weight = torch.empty(8, dtype=dtype)
    forms = weight_forms(weight, None, way) | dict(
        rounded=None, GRADIENT_BF16=dtype == torch.bfloat16, ROWS=4, BLOCK=256
    )
    kinds = dict(first="*i8", second="*u8", first_scale="*fp32", second_scale="*fp32", step="*fp32", scale="*fp32")
    kinds |= dict(found_inf="*fp32", correction="*i8", count="i32", start="i32", noise_low="i32", noise_high="i32")
    kinds |= dict.fromkeys(("value", "gradient"), "*i16" if dtype == torch.bfloat16 else "*fp16")
    if way != "correction":
        forms["correction"] = None
    compiled(capability, kernels._adamw, forms, kinds, "fp32")


def projected(capability, dtype, way):
    forms = weight_forms(torch.empty(8, dtype=dtype), None, way) | dict(rounded=None, entry_stride=1)
    forms |= dict(GRADIENT_BF16=dtype == torch.bfloat16, PRECISION="tf32x3" if dtype == torch.float32 else "tf32")
    forms |= dict(
        CHANNELS=projection_kernels.CHANNELS, ENTRIES=projection_kernels.ENTRIES, WIDTH=projection_kernels.WIDTH
    )
    if way != "correction":
        forms["correction"] = None
    kinds = dict(
        correction="*i8", **dict.fromkeys(("first", "second", "squares", "step", "scale", "found_inf"), "*fp32")
    )
    kinds |= dict.fromkeys(("channels", "length", "rank", "channel_stride", "refresh_steps", "start"), "i32")
    kinds |= dict.fromkeys(("channel_stride_beside", "entry_stride_beside", "noise_low", "noise_high"), "i32")
    kinds |= dict.fromkeys(("projection_low", "projection_high"), "i32")
    pointer = {torch.bfloat16: "*i16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    kinds |= dict.fromkeys(("value", "gradient"), pointer)
    compiled(capability, projection_kernels._project, forms | dict(RANKS=256), kinds, "fp32", warps=8)
    compiled(capability, projection_kernels._subtract_projected, forms | dict(RANKS=32), kinds, "fp32")


def layers(capability, bf16):
    forms = dict(
        ROUND_FIRST=True, UNIT_OFFSET=False, ROWS=1, WIDTH=2048, SIZE=1024, BACK=True, HEADS=32, HALF=32, REST=0
    )
    forms["ACTIVATION"] = "gelu_tanh"
    for name in ("_norm_backward", "_rotary") if bf16 else ("_norm", "_gated_product_backward"):
        kernel = getattr(layer_kernels, name)
        kinds = dict(scale="*fp32", weight_parts="*fp32", eps="fp32")
        for argument in kernel.arg_names:
            if argument.endswith("BF16"):
                forms[argument] = bf16
            whole = argument in ("rows", "width", "tiles", "heads", "tokens", "half", "rest")
            if whole or argument.endswith(("stride", "_block", "_head", "_token")):
                kinds[argument] = "i32"
        compiled(capability, kernel, forms, kinds, "*i16" if bf16 else "*fp16")


def loss(capability, bf16):
    forms = dict(CAPPED=True, BF16=bf16, BLOCK=2048)
    kinds = dict(logits="*i16" if bf16 else "*fp16", columns="*i64", count="i32", parts="i32")
    kinds |= dict.fromkeys(("peak", "even", "cap", "logit_scale"), "fp32")
    for kernel in (loss_kernels._statistics, loss_kernels._gradient):
        compiled(capability, kernel, forms, kinds, "*fp32")


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, __file__], check=True, timeout=120, env=environment)


if __name__ == "__main__":
    for capability, dtype, way in ((75, torch.float16, "correction"), (90, torch.bfloat16, "stochastic")):
        update(capability, dtype, way)
        layers(capability, bf16=capability == 75)
        loss(capability, bf16=capability == 75)
        projected(capability, torch.float32 if capability == 75 else dtype, None if capability == 75 else way)
