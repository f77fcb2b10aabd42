"""Time and temporaries of one optimizer step, ours against torch's, on 33.2 M parameters.

    python bench/optimizers.py [--rounds 15] [--slice-mib 64 4] [--write bench/results/optimizers.md]

Each optimizer takes turns with ``torch.optim.AdamW(fused=True)``, so that the machine's moods meet both
alike; ``time`` is the median over the rounds of the ratio to it. ``temporaries`` are the bytes of the tensors
born in a step and alive at once, as the dispatcher sees them. ``state`` is counted from the state itself.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oomless.optim import build
from oomless.units import MiB, format_bytes

SHAPES = [(16_000, 1024), *[(2048, 1024)] * 4, *[(1024, 2048)] * 4, *[(1024,)] * 16]
COUNT = sum(torch.Size(shape).numel() for shape in SHAPES)
OURS: list[tuple[str, torch.dtype, str | None]] = [
    ("adamw", torch.float32, None),
    ("adamw", torch.bfloat16, "master"),
    ("adamw", torch.bfloat16, "correction"),
    ("adamw", torch.bfloat16, "stochastic"),
    ("adamw_8bit", torch.float32, None),
    ("adamw_8bit", torch.bfloat16, "correction"),
    ("adafactor", torch.float32, None),
    ("adafactor", torch.bfloat16, "stochastic"),
    ("sgd", torch.float32, None),
    ("apollo", torch.float32, None),
    ("apollo_mini", torch.float32, None),
    ("galore", torch.float32, None),
    ("muon", torch.float32, None),
]
THEIRS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "torch AdamW fused": lambda weights: torch.optim.AdamW(weights, fused=True),
    "torch AdamW foreach": lambda weights: torch.optim.AdamW(weights, foreach=True),
    "torch AdamW for-loop": lambda weights: torch.optim.AdamW(weights, foreach=False),
    "torch Adafactor": lambda weights: torch.optim.Adafactor(weights, foreach=False),
}


class Temporaries(TorchDispatchMode):
    """Counts the bytes of storages that are born inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self.forget, storage._cdata)
        return result

    def forget(self, identifier: int) -> None:
        """Take a storage that has died off the books."""
        self.live_bytes -= self.alive.pop(identifier)


def weights(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters: list[Tensor] = []
    for shape in SHAPES:
        parameter = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        parameter.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device, dtype)
        parameters.append(parameter)
    return parameters


def candidates(device: str, slice_bytes: int) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Return how to make each optimizer, so that only two exist at a time."""
    found = {name: partial(_theirs, make, device) for name, make in THEIRS.items()}
    for name, dtype, way in OURS:
        label = f"{name}, {str(dtype).removeprefix('torch.')}{f' + {way}' if way else ''}"
        found[label] = partial(_ours, name, dtype, way, device, slice_bytes)
    return found


def _theirs(make: Callable[[list[Tensor]], torch.optim.Optimizer], device: str) -> torch.optim.Optimizer:
    return make(weights(torch.float32, device))


def _ours(name: str, dtype: torch.dtype, way: str | None, device: str, slice_bytes: int) -> torch.optim.Optimizer:
    parameters = weights(dtype, device)
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    if name == "muon":
        groups[0]["orthogonalise"], groups[1]["orthogonalise"] = False, True
    return build(name, groups, lr=1e-3, weight_precision=way, slice_bytes=slice_bytes)


def step_s(optimizer: torch.optim.Optimizer, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(device: str, rounds: int, slice_bytes: int) -> str:
    reference = candidates(device, slice_bytes)["torch AdamW fused"]()
    step_s(reference, device)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = [
        f"{COUNT:,} parameters, {machine} ({platform.machine()}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, slice_bytes {format_bytes(slice_bytes)}, {rounds} rounds",
        "",
        "| optimizer | step, ms | time, ratio | temporaries | state, bytes a parameter |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, make in candidates(device, slice_bytes).items():
        optimizer = make()
        step_s(optimizer, device)
        with Temporaries() as counter:
            optimizer.step()
        pairs = [(step_s(optimizer, device), step_s(reference, device)) for _ in range(rounds)]
        state_bytes = sum(
            tensor.nbytes
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor)
        )
        milliseconds = 1e3 * statistics.median(own for own, _ in pairs)
        ratio = statistics.median(own / other for own, other in pairs)
        rows.append(
            f"| {label} | {milliseconds:.1f} | {ratio:.2f} | {format_bytes(counter.peak_bytes)} "
            f"| {state_bytes / COUNT:.3f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--slice-mib", type=int, nargs="+", default=[64])
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    text = "\n".join(table(arguments.device, arguments.rounds, size * MiB) for size in arguments.slice_mib)
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
