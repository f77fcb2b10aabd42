"""The parts that a training rests on: the allocator, kernels against their plain forms, and rates."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from oomless import optim
from oomless.memory.allocator import CachingAllocator
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.allocator_state import Block
from oomless.memory.device import Device
from oomless.ops.attention import packed_attention
from oomless.ops.documents import starts_of
from oomless.ops.gated_product import gated_product
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.ops.rms_norm import rms_norm
from oomless.training import kernels
from oomless.training.precision import DTYPES
from oomless.units import MiB, counted, format_bytes

REQUESTS = 2000
LARGEST_REQUEST, MOST_HELD = 48 * MiB, 512 * MiB
DOCUMENTS = (((96,),), ((40, 56),), ((1, 31, 64),))
UPDATES = ("adamw", "adamw_8bit", "sgd", "adafactor")
PRECISIONS = ("master", "correction", "stochastic")


def allocator(device: Device) -> str:
    """Ask ``device`` and the simulation for the same memory, in blocks of random sizes that come and go.

    Raises:
        RuntimeError: they differ.
    """
    simulated = CachingAllocator(1 << 50, AllocatorSettings.from_environment())
    rng = random.Random(0)
    held: list[tuple[Tensor, Block]] = []
    device.empty_cache()
    before = device.usage()
    for number in range(REQUESTS):
        if held and (simulated.statistics.allocated.current > MOST_HELD or rng.random() < 0.45):
            tensor, block = held.pop(rng.randrange(len(held)))
            simulated.free(block)
            del tensor
        else:
            size = int(2 ** rng.uniform(0, 25)) if rng.random() < 0.9 else rng.randint(1, LARGEST_REQUEST)
            tensor = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
            held.append((tensor, simulated.allocate(size)))
            del tensor
        now, books = device.usage(), simulated.statistics
        got = (now.allocated_bytes - before.allocated_bytes, now.reserved_bytes - before.reserved_bytes)
        expected = (books.allocated.current, books.reserved.current)
        if got != expected:
            said, should = (", ".join(map(format_bytes, pair)) for pair in (got, expected))
            raise RuntimeError(f"after request {number + 1} it holds {said} (allocated, reserved), simulated {should}")
    held.clear()
    device.empty_cache()
    return f"{counted(REQUESTS, 'request')}: allocated and reserved as simulated after each"


def attention(device: Device) -> str:
    """Compare attention and its gradients on ``device``, in each dtype, with plain products in fp64, document by document.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    worst = 0.0
    for dtype in _dtypes(device).values():
        for documents in DOCUMENTS:
            generator = torch.Generator().manual_seed(0)
            given = [torch.randn(1, heads, 96, 64, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
            lean = [device.put(tensor, dtype).requires_grad_() for tensor in given]
            exact = [tensor.detach().double().cpu().requires_grad_() for tensor in lean]
            for starts in (
                None,
                device.put(starts_of(documents[0])),
            ):  # one by one, and where the kernel can in one launch
                ours = packed_attention(
                    lean[0], lean[1], lean[2], document_lengths=documents, document_starts=starts, scale=0.125
                )
                plain = _plain_attention(exact[0], exact[1], exact[2], documents[0])
                worst = max(worst, _compare("attention", (ours, lean), (plain, exact), device))
    return f"as plain products in fp64, forward and gradients, {', '.join(_dtypes(device))}; worst {worst:.0%} of what rounding allows"


def operators(device: Device) -> str:
    """Compare the loss of a head and the parts of layers, with their gradients, with PyTorch's own in fp64.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    worst, fused = 0.0, kernels.none_here(device) is None
    silu = torch.nn.functional.silu
    for dtype in _dtypes(device).values():
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((64, 128), (500, 128)))
        targets = torch.randint(500, (64,), generator=generator)
        lean = [device.put(tensor * 0.3, dtype).requires_grad_() for tensor in (x, w)]
        exact = [tensor.detach().double().cpu().requires_grad_() for tensor in lean]
        ours = {
            "the loss": linear_cross_entropy(lean[0], lean[1], device.put(targets), scale=1 / 64, fused=fused),
            "RMS norm": rms_norm(lean[0], lean[1][0], eps=1e-6, fused=fused),
            "the gated product": gated_product(lean[0], lean[1][:64], silu, fused="silu" if fused else None),
        }
        plain = {
            "the loss": torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets),
            "RMS norm": torch.nn.functional.rms_norm(exact[0], (128,), exact[1][0], eps=1e-6),
            "the gated product": silu(exact[0]) * exact[1][:64],
        }
        for name in ours:
            worst = max(worst, _compare(name, (ours[name], lean), (plain[name], exact), device))
    names = ", ".join(_dtypes(device))
    return f"loss, RMS norm and gated product as PyTorch's in fp64, {names}; worst {worst:.0%} of what rounding allows"


def updates(device: Device) -> str:
    """Make every kind of fused update on ``device`` and compare it with its plain form.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    if (reason := kernels.none_here(device)) is not None:
        return f"plain ones: {reason}"
    tried = 0
    for name in UPDATES:
        for dtype in _dtypes(device).values():
            for precision in PRECISIONS if dtype != torch.float32 else (None,):
                weight = torch.zeros(256, 256, dtype=dtype, device=device.torch_device, requires_grad=True)
                optimizer = optim.build(name, [weight], lr=1e-3, weight_precision=precision)
                try:
                    optimizer.try_fused()
                except Exception as error:  # of a compiler, a driver, a package that is not there
                    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                    raise RuntimeError(f"{name} in {str(dtype).removeprefix('torch.')}: {first}") from error
                tried += 1
    return f"{counted(tried, 'kind')} of update as their plain forms"


def rates(device: Device, *, tiny: bool) -> dict[str, float]:
    """Return what products of matrices reach in operations a second, and memory and the host's link in bytes a second."""
    found = {}
    width, size = (128, MiB) if tiny else (4096, 256 * MiB)
    for name, dtype in _dtypes(device).items():
        a, b = (torch.full((width, width), 0.01, dtype=dtype, device=device.torch_device) for _ in range(2))
        found[f"{name} products"] = 2 * width**3 / _seconds(partial(torch.mm, a, b), device)
    there = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
    other = torch.empty_like(there)
    found["memory"] = 2 * size / _seconds(lambda: other.copy_(there), device)
    here = device.pinned_like(there)

    def to_host() -> None:
        device.start_copy(there, here)()
        device.wait()

    found["to the host"] = size / _seconds(to_host, device)
    return found


def _seconds(action: Callable[[], object], device: Device, times: int = 5) -> float:
    """Return the shortest time of ``action``, which tells most of what the device can."""
    best = float("inf")
    for _ in range(times + 1):
        device.wait()
        began = time.perf_counter()
        action()
        device.wait()
        best = min(best, time.perf_counter() - began)
    return best


def _dtypes(device: Device) -> dict[str, torch.dtype]:
    """Return fp32 and the 16-bit dtypes that ``device`` computes in itself, by name."""
    bf16 = (device.compute_capability or (8, 0)) >= (8, 0)
    return {name: dtype for name, dtype in DTYPES.items() if name != "bf16" or bf16}


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, documents: tuple[int, ...]) -> Tensor:
    """Return causal attention inside each of ``documents``: [1, T, H, D]."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    place = torch.arange(query.shape[2])
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    seen = (place[:, None] >= place) & (number[:, None] == number)
    scores = (query @ key.transpose(-1, -2) * 0.125).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _compare(what: str, ours: tuple[Tensor, list[Tensor]], plain: tuple[Tensor, list[Tensor]], device: Device) -> float:
    """Return how far a result, and the gradients of its inputs, are from the plain ones, as a share of what rounding may make of it.

    Raises:
        RuntimeError: it is more than that.
    """
    worst, dtype = 0.0, ours[1][0].dtype
    both = ((result, *torch.autograd.grad(result.sum(), given)) for result, given in (ours, plain))
    for got, right in zip(*both, strict=True):
        allowed = 16 * torch.finfo(dtype).eps * max(1.0, float(right.detach().abs().max()))
        share = float((device.fetch(got).double() - right.detach()).abs().max()) / allowed
        if not share <= 1:  # NaN too
            name = str(dtype).removeprefix("torch.")
            raise RuntimeError(f"{what} in {name} is {share:.3g} times as far off as rounding allows")
        worst = max(worst, share)
    return worst
