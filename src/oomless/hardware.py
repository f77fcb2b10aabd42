"""The GPU asked for or found, and how much of it PyTorch can use.

What tensors can fill is the device's total (``Gpu.usable_bytes``) less what lies outside the allocator: the
CUDA context, and NCCL where there are several GPUs. Both come from the catalogue with an uncertainty, so the
capacity has one too. ``None`` in place of a ``Hardware`` means the plain CPU.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oomless.catalogue import Gpu, Overhead, apple_gpu, gpu, overhead, recognise
from oomless.errors import HardwareError
from oomless.units import format_bytes

_MEMINFO = Path("/proc/meminfo")
_COUNT_AND_NAME = re.compile(r"(\d+)\s*[x×*]\s*(\S.*)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of GPU, ``count`` times, on one machine or several."""

    gpu: Gpu
    count: int = 1
    """How many there are, those of all machines together."""

    machines: int = 1
    """On how many machines they are."""

    detected: bool = False
    """Whether the GPU is present, its memory read from the driver; else it was only named."""

    def __post_init__(self) -> None:
        if self.machines < 1:
            raise HardwareError(f"the number of machines must be at least 1; got {self.machines} with {self.gpu.name}")
        if self.count < 1:
            raise HardwareError(f"the number of GPUs must be at least 1; got {self.count} of {self.gpu.name}")
        if self.capacity_bytes <= 0:
            outside_bytes = self.gpu.usable_bytes - self.capacity_bytes
            raise HardwareError(
                f"a GPU must hold more than the {format_bytes(outside_bytes)} that lie outside PyTorch's "
                f"allocator; got {format_bytes(self.gpu.usable_bytes)}: name a larger size"
            )

    @property
    def outside_allocator(self) -> tuple[Overhead, ...]:
        """What each process takes of its GPU before the first tensor."""
        context = overhead("context", self.gpu)
        nccl = overhead("nccl", self.gpu) if self.count > 1 else None
        return tuple(item for item in (context, nccl) if item is not None)

    @property
    def capacity_bytes(self) -> int:
        """What PyTorch's allocator can take from one GPU, as expected."""
        return self.gpu.usable_bytes - sum(item.bytes_expected for item in self.outside_allocator)

    @property
    def capacity_low_bytes(self) -> int:
        """The capacity if everything outside the allocator is as large as has been seen."""
        return self.gpu.usable_bytes - sum(item.bytes_high for item in self.outside_allocator)

    @property
    def capacity_high_bytes(self) -> int:
        """The capacity if everything outside the allocator is as small as has been seen."""
        return self.gpu.usable_bytes - sum(item.bytes_low for item in self.outside_allocator)

    def __str__(self) -> str:
        """Return ``"T4"``, ``"2 x T4"`` or ``"2 machines of 8 T4"``."""
        if self.machines > 1:
            return f"{self.machines} machines of {self.count // self.machines} {self.gpu.name}"
        return self.gpu.name if self.count == 1 else f"{self.count} x {self.gpu.name}"


def detect() -> Hardware | None:
    """Return the GPUs that PyTorch sees, or ``None`` where it sees none.

    Memory and capability are the device's own; rates are the catalogue's, where it knows the name. GPUs that
    differ from the first one do not count.
    """
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        first = devices[0]
        return Hardware(
            gpu=recognise(
                first.name,
                first.total_memory,
                (first.major, first.minor),
                vendor="amd" if torch.version.hip else "nvidia",
            ),
            count=sum(device.name == first.name for device in devices),
            detected=True,
        )
    if torch.backends.mps.is_available():
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(gpu=apple_gpu(memory_bytes, torch.mps.recommended_max_memory()), detected=True)
    return None


def resolve(text: str) -> Hardware | None:
    """Return what ``--gpu`` means.

    ``"auto"`` is the GPU that is present, or ``None``; ``"cpu"`` is ``None``; anything else is what
    ``catalogue.gpu`` takes, with a count before it if there are several (``"2xT4"``), and before that the number of
    machines with so many each, if there are several (``"2x8xH100"``).

    Raises:
        HardwareError: the catalogue knows no such GPU, a count is 0, or there are more than two of them.
    """
    wish = text.strip()
    if wish.lower() == "cpu":
        return None
    if wish.lower() == "auto":
        return detect()
    counts: list[int] = []
    name = wish
    while counted := _COUNT_AND_NAME.fullmatch(name):
        counts.append(int(counted[1]))
        name = counted[2]
    if len(counts) > 2:
        raise HardwareError(
            f"before a GPU's name stand at most two numbers, machines x GPUs, such as 2x8x{name}; got {len(counts)} in {text!r}"
        )
    machines = counts[0] if len(counts) == 2 else 1
    return Hardware(gpu=gpu(name), count=machines * counts[-1] if counts else 1, machines=machines)


def available_host_bytes() -> int:
    """Return the memory of this machine that new processes can have without swapping."""
    for line in _MEMINFO.read_text(encoding="ascii").splitlines() if _MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_dtype(hardware: Hardware | None, dtype: Literal["fp32", "fp16", "bf16"]) -> None:
    """Check that ``hardware`` computes in ``dtype``: all do in fp32 and fp16, not every GPU in bf16.

    Raises:
        HardwareError: bf16 on a GPU of compute capability below 8.0, which would emulate it slowly or fail.
    """
    if dtype != "bf16" or hardware is None or hardware.gpu.supports_bf16:
        return
    capability = ".".join(map(str, hardware.gpu.capability or ()))
    raise HardwareError(
        f"bf16 needs a GPU of compute capability 8.0 or later; {hardware.gpu.name} has {capability}: "
        "use fp16 (with loss scaling) or fp32"
    )
