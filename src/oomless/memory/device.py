"""Where a model trains: the one place through which bytes move between host and device.

Training code never calls ``tensor.to(...)`` for this. It asks its ``Device``, so that the same step runs on
CUDA, on a plain CPU and on a virtual GPU (``virtual_gpu.py``), where host and device are both CPU memory and
only the books tell them apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Phase = Literal["load", "forward", "loss", "backward", "optimizer", "evaluation", "save", "other"]
Category = Literal[
    "weights",
    "gradients",
    "optimizer state",
    "saved activations",
    "logits and loss",
    "quantisation",
    "temporaries",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUsage:
    """What a device holds, in whole bytes; the peaks are those since ``Device.reset_peak``."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


class Device:
    """A place to train. This base is the plain CPU: host memory is device memory."""

    name: str = "cpu"
    torch_device: torch.device = torch.device("cpu")
    capacity_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None

    @property
    def fake(self) -> bool:
        """Whether tensors have no values, as in a rehearsal: what one wants to know there is whether it runs out of memory."""
        return False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Everything that builds, trains, evaluates or saves runs inside this context."""
        yield

    @contextmanager
    def host(self) -> Iterator[None]:
        """Tensors created inside lie in host memory, not on the device."""
        yield

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Say what the run is doing, for the record of memory."""
        yield

    def label(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Say what ``tensors`` are for, for the record of memory."""

    def watch(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Know the modules, gradients and optimizer state from now on, for the record of memory."""

    def count_work(self, passes: int) -> None:
        """Count afresh what a step of so many ``passes`` computes and moves, where that is counted: in a rehearsal; 0 ends it."""

    def counting_update(self) -> AbstractContextManager[None]:
        """Count what is done inside as the update's, where work is counted."""
        return nullcontext()

    def repeating(self, key: Any, function: Callable[[], None]) -> None:
        """Call ``function``; a rehearsal, in which nothing has a value, may repeat what an earlier call with ``key`` asked for."""
        function()

    def put(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``tensor``, which lies on the host, on the device and in ``dtype`` (default: its own)."""
        return tensor.to(self.torch_device, dtype or tensor.dtype)

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, which lies on the device, on the host."""
        return tensor.detach().cpu()

    def numbers(self, tensor: Tensor, rehearsed: list[Any]) -> list[Any]:
        """Return the numbers in ``tensor``, which lies on the device; in a rehearsal, where nothing has a value, ``rehearsed``."""
        numbers: list[Any] = tensor.tolist()
        return numbers

    def number(self, tensor: Tensor, rehearsed: float = 0.0) -> Any:
        """Return the number that ``tensor``, which is 0-dim, holds, as ``numbers`` does."""
        (number,) = self.numbers(tensor.reshape(1), [rehearsed])
        return number

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return new host memory of the shape and dtype of ``tensor`` that can be copied to and from beside computation."""
        with self.host():
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    def start_copy(self, source: Tensor, target: Tensor) -> Callable[[], None]:
        """Begin to copy ``source`` into ``target``, one of which comes from ``pinned_like``.

        Call what is returned before ``target`` is read, or ``source`` is freed or written: what computes from then on
        comes after the copy. Copies come after each other, and after what was computed before.
        """
        target.copy_(source)
        return _nothing_to_wait_for

    def after_copies(self) -> AbstractContextManager[None]:
        """Collectives begun inside come after the copies that were begun, and run beside the computation as they do."""
        return nullcontext()

    def wait(self) -> None:
        """Let the host wait until all is done that the device was given: before it reads what ``start_copy`` brought to it."""

    def usage(self) -> MemoryUsage:
        """Return what the device holds now and held at most: on a CPU, the process's resident memory."""
        status = Path("/proc/self/status").read_text()
        resident, peak = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) << 10 for key in ("VmRSS", "VmHWM"))  # type: ignore[index]
        return MemoryUsage(
            allocated_bytes=resident,
            reserved_bytes=resident,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=peak,
        )

    def reset_peak(self) -> None:
        """Forget the peaks seen so far."""
        if os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def most_beyond(self, action: Callable[[], object]) -> int:
        """Return how much more than before is held at most while ``action`` runs; the peaks of ``usage`` stay those of all."""
        earlier = self.usage()
        self.reset_peak()
        action()
        most = self.usage().peak_allocated_bytes - earlier.allocated_bytes
        self._remember_peaks(earlier)
        return most

    def _remember_peaks(self, earlier: MemoryUsage) -> None:
        """Have ``usage`` know the peaks of ``earlier`` too, until ``reset_peak``."""

    def empty_cache(self) -> None:
        """Give memory that is cached but unused back to the device."""


def nowhere() -> Device:
    """Return a device on which tensors have shapes alone."""
    device = Device()
    device.torch_device = torch.device("meta")
    return device


def _nothing_to_wait_for() -> None:
    """Stand for a copy that is complete when it has begun."""


class CudaDevice(Device):
    """One CUDA GPU.

    Raises:
        RuntimeError: no such GPU is visible.
    """

    def __init__(self, index: int = 0) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.torch_device = torch.device("cuda", index)
        self.capacity_bytes = properties.total_memory
        self.compute_capability = (properties.major, properties.minor)
        self._earlier_peaks = (0, 0)
        self._copies: torch.cuda.Stream | None = None

    @contextmanager
    def active(self) -> Iterator[None]:  # noqa: D102
        with torch.cuda.device(self.torch_device):
            yield

    def pinned_like(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def start_copy(self, source: Tensor, target: Tensor) -> Callable[[], None]:  # noqa: D102
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            done = self._copies.record_event()
        return lambda: torch.cuda.current_stream(self.torch_device).wait_event(done)

    def after_copies(self) -> AbstractContextManager[None]:  # noqa: D102
        return torch.cuda.stream(self._copies)

    def wait(self) -> None:  # noqa: D102
        torch.cuda.synchronize(self.torch_device)

    def usage(self) -> MemoryUsage:  # noqa: D102
        return MemoryUsage(
            allocated_bytes=torch.cuda.memory_allocated(self.torch_device),
            reserved_bytes=torch.cuda.memory_reserved(self.torch_device),
            peak_allocated_bytes=max(self._earlier_peaks[0], torch.cuda.max_memory_allocated(self.torch_device)),
            peak_reserved_bytes=max(self._earlier_peaks[1], torch.cuda.max_memory_reserved(self.torch_device)),
        )

    def reset_peak(self) -> None:  # noqa: D102
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._earlier_peaks = (0, 0)

    def _remember_peaks(self, earlier: MemoryUsage) -> None:
        self._earlier_peaks = (earlier.peak_allocated_bytes, earlier.peak_reserved_bytes)

    def empty_cache(self) -> None:  # noqa: D102
        torch.cuda.empty_cache()


def random_state(device: Device) -> dict[str, Tensor]:
    """Return the state of the random generators, which lies on the host; a rehearsal draws no numbers."""
    if device.fake:
        return {}
    with device.host():
        states = {"random/cpu": torch.get_rng_state()}
        if device.torch_device.type == "cuda":
            states["random/cuda"] = torch.cuda.get_rng_state(device.torch_device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: Device) -> None:
    """Put the random generators where ``random_state`` found them."""
    if "random/cpu" in states:
        torch.set_rng_state(states["random/cpu"])
    if "random/cuda" in states and device.torch_device.type == "cuda":
        torch.cuda.set_rng_state(states["random/cuda"], device.torch_device)
