"""The selective scan by transformers' loop over tokens and by ours, in one run on a CPU: seconds, bytes kept for backward, bytes at the peak.

    python bench/selective_scan.py [--rounds 3] [--write bench/results/selective_scan.md]

One sequence, 256 channels, states of 16 numbers; forward and backward. Seconds are of the processor, the least of the rounds,
in which the two take turns. Bytes are those that a virtual GPU books beyond the inputs; the peak has their gradients in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.selective_scan import selective_scan
from oomless.units import format_bytes
from provenance import provenance

CHANNELS, STATES = 256, 16
HEADER = (
    "| tokens | dtype | CPU seconds, loop | ours | kept, loop | ours | peak, loop | ours |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)

Scan = Callable[..., Tensor]


def loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """Return what Mamba's mixer makes of the function of transformers."""
    return mamba_selective_scan(x, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True).to(x.dtype)


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Return x, delta, A, B, C, D, z and the bias of delta, as a mixer gives them."""
    torch.manual_seed(0)
    wide, narrow = (1, CHANNELS, tokens), (1, STATES, tokens)
    x, delta, B, C, z = (torch.randn(shape).to(dtype) for shape in (wide, wide, narrow, narrow, wide))
    A, D, bias = -torch.randn(CHANNELS, STATES).exp(), torch.randn(CHANNELS), torch.randn(CHANNELS) - 1
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C, D, z, bias)]


def seconds(scan: Scan, tokens: int, dtype: torch.dtype) -> float:
    """Return the processor's seconds of forward and backward."""
    given = inputs(tokens, dtype)
    begin = time.process_time()
    y = scan(*given)
    y.backward(torch.ones_like(y))
    return time.process_time() - begin


def booked(scan: Scan, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that are kept for backward, the output among them, and those at the peak."""
    gpu = VirtualGPU(1 << 40)
    with gpu.active():
        given = [tensor.detach().clone().requires_grad_() for tensor in inputs(tokens, dtype)]
        before = gpu.usage().allocated_bytes
        gpu.reset_peak()
        y = scan(*given)
        kept = gpu.usage().allocated_bytes - before
        y.backward(torch.ones_like(y))
        return kept, gpu.usage().peak_allocated_bytes - before


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = []
    for tokens in (256, 512, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            rounds = [[seconds(scan, tokens, dtype) for scan in (loop, selective_scan)] for _ in range(options.rounds)]
            kept, peaks = zip(*(booked(scan, tokens, dtype) for scan in (loop, selective_scan)), strict=True)
            cells = [f"{min(times):.2f}" for times in zip(*rounds, strict=True)] + list(map(format_bytes, kept + peaks))
            rows.append(f"| {tokens:,} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    made = provenance()
    text = "\n".join([HEADER, *rows]) + (
        f"\n\nMeasured with torch {made['versions']['torch']}, transformers {made['versions']['transformers']} on {made['device']}.\n"
    )
    if options.write is not None:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
