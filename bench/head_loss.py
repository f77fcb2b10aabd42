"""The head's loss three ways in one run: plain lines, torch's chunked ``linear_cross_entropy`` (from 2.13), and ours.

    python bench/head_loss.py [--rounds 3]

time     of forward and backward in fp32, the ways taken in turn; the median of the ratios to ours in the same round.
bytes    the most that is alive at once beyond the inputs, gradients included, as PyTorch's own CPU allocator counts
         while the profiler listens; and what a rehearsal books, which only sees what is not inside an opaque operator.
error    of the gradients against fp64, relative, in each precision; with the loss scale of a run (65,536 over the tokens),
         which ours takes into the forward and the others get as the gradient of their loss.

Writes ``bench/results/head_loss.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.units import format_bytes
from provenance import write

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
SHAPES = [(512, 256, 16384), (512, 512, 8192)]
NEEDS = {"all": (True, True), "head only": (False, True), "body only": (True, False)}
NUMERICS = (2048, 64, 8192)
LOSS_SCALE = 65536.0
CHUNK_BYTES = 64 << 20


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    return scale * F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, rows: int | None = None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return scale * F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def torchs_in_our_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    return torchs(hidden, weight, targets, scale, CHUNK_BYTES // (4 * len(weight)))


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, scale=scale, chunk_bytes=chunk_bytes)


def ours_in_torchs_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    (tokens, width), vocabulary = hidden.shape, len(weight)
    rows = torch.nn.LinearCrossEntropyOptions()._adjust(tokens, width, vocabulary, hidden.dtype).batch_chunk_size
    return ours(hidden, weight, targets, scale, rows * 4 * vocabulary)


WAYS: dict[str, Loss] = {
    "ours": ours,
    "ours, torch's chunks": ours_in_torchs_chunks,
    "torch": torchs,
    "torch, our chunks": torchs_in_our_chunks,
    "plain": plain,
}


def inputs(shape: tuple[int, int, int], needs: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and targets of logits that are about as peaked as a language model's."""
    tokens, width, vocabulary = shape
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) * (3 / width**0.5)
    return (
        hidden.requires_grad_(needs[0]),
        weight.requires_grad_(needs[1]),
        torch.randint(vocabulary, (tokens,)),
    )


def step(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> list[Tensor]:
    """Return the gradients that are wanted."""
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return list(torch.autograd.grad(loss(hidden, weight, targets, scale), leaves))


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes alive at once while ``work`` runs, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    alive = peak = 0
    for event in sorted(_memory_events(seen), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _memory_events(seen: profile) -> list[Any]:
    results: Any = seen.profiler
    return [event for event in results.kineto_results.events() if event.name() == "[memory]"]


def booked_bytes(loss: Loss, shape: tuple[int, int, int], needs: tuple[bool, bool]) -> int:
    """Return the same as a rehearsal counts it."""
    device = VirtualGPU(1 << 40, fake=True)
    with device.active():
        hidden, weight, targets = inputs(shape, needs)
        before = device.usage().allocated_bytes
        device.reset_peak()
        gradients = step(loss, hidden, weight, targets, 1.0)
        peak = device.usage().peak_allocated_bytes - before
        del gradients
    return peak


def compare(shape: tuple[int, int, int], needs: tuple[bool, bool], rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each way its time beside ours, and its bytes."""
    given = inputs(shape, needs)
    scale = 1 / shape[0]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, loss in WAYS.items():
            began = time.perf_counter()
            step(loss, *given, scale)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "time_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)),
            "seconds": statistics.median(seconds[name]),
            "peak_bytes": peak_bytes(lambda loss=loss: step(loss, *given, scale)),
            "booked_bytes": booked_bytes(loss, shape, needs),
        }
        for name, loss in WAYS.items()
    }


def errors(dtype: torch.dtype) -> dict[str, list[float]]:
    """Return for each way the relative errors of the gradients of hidden states and head."""
    hidden, weight, targets = inputs(NUMERICS, (True, True))
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    scale = LOSS_SCALE / NUMERICS[0]
    truth = step(ours, *exact, targets, scale)
    return {
        name: [
            float((made.double() - true).norm() / true.norm())
            for made, true in zip(step(loss, *low, targets, scale), truth, strict=True)
        ]
        for name, loss in WAYS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    result: dict[str, Any] = {"cases": [], "errors": {}}
    for shape in SHAPES:
        for what, needs in NEEDS.items():
            found = compare(shape, needs, rounds)
            result["cases"].append(
                dict(zip(("tokens", "width", "vocabulary"), shape, strict=True)) | {"trains": what, "ways": found}
            )
            for name, way in found.items():
                print(
                    f"{shape} {what:9} {name:20} {way['time_ratio']:.2f} x  {way['seconds']:.2f} s  "
                    f"{format_bytes(way['peak_bytes']):>11}, booked {format_bytes(way['booked_bytes'])}",
                    flush=True,
                )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = errors(dtype)
        result["errors"][str(dtype).removeprefix("torch.")] = found
        for name, (of_hidden, of_weight) in found.items():
            print(f"{dtype} {name:20} hidden {of_hidden:.2e} head {of_weight:.2e}", flush=True)
    print(f"written to {write('head_loss', result)}")


if __name__ == "__main__":
    main()
