"""Memory watched while a run lasts: leaks seen from their trend, and host memory before the kernel's killer sees it.

At the end of a step, when gradients and activations are gone, a device holds the same bytes each time, whatever lengths
the step had. What grows there from step to step is a leak, and the step at which it meets the capacity can be told. The host
is watched the same way (what this process holds and no file backs, over minutes: it wavers), and against what the machine or its control group has left:
where that nears its end the run writes a checkpoint and stops, while there is memory to do so.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from oomless.errors import HostMemoryError
from oomless.memory.device import Device, MemoryUsage
from oomless.units import format_bytes

READINGS = 30
SECONDS_BETWEEN_HOST_READINGS = 0.2
SECONDS_BETWEEN_TREND_READINGS = 5.0
SHARE_OF_HOST = 50
"""One in so many bytes of the host must stay available, where nothing is configured."""


class Trend:
    """Bytes held at equal points of the steps, and whether they grow steadily.

    Steadily: in the last ``READINGS`` readings each third ends higher than the one before it, and nothing in it lies lower. A
    cache that fills once or a reading that wavers does not do that; a leak does, be it at every step or at every tenth.
    """

    def __init__(self) -> None:
        self._readings: deque[tuple[int, int]] = deque(maxlen=READINGS)

    def add(self, step: int, held_bytes: int) -> float:
        """Return by how many bytes a step what is held grows; 0 where it does not grow steadily."""
        self._readings.append((step, held_bytes))
        if len(self._readings) < READINGS:
            return 0.0
        third = READINGS // 3
        readings = list(self._readings)
        thirds = [[held for _, held in readings[start : start + third]] for start in range(0, READINGS, third)]
        steady = thirds[0][-1] > thirds[0][0] and all(
            min(later) >= max(earlier) and later[-1] > earlier[-1]
            for earlier, later in zip(thirds, thirds[1:], strict=False)
        )
        if not steady:
            return 0.0
        return (sum(thirds[2]) - sum(thirds[0])) / third / (readings[2 * third][0] - readings[0][0])


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """What the host has, in whole bytes: the machine, or the control group that this process is in."""

    held_bytes: int
    """What this process holds of it, without what files back."""

    available_bytes: int
    """What can still be asked for before something is killed."""

    limit_bytes: int


def read_host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> HostMemory | None:
    """Return the memory of the host, by the tightest of machine and control groups; ``None`` where ``proc`` does not say."""
    try:
        held = _kibibytes(proc / "self" / "status", "RssAnon") + _kibibytes(proc / "self" / "status", "RssShmem")
        limit, available = (_kibibytes(proc / "meminfo", key) for key in ("MemTotal", "MemAvailable"))
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, TypeError):
        return None
    for most, used in _group_limits(lines, groups):
        limit, available = min(limit, most), min(available, most - used)
    return HostMemory(held_bytes=held, available_bytes=max(0, available), limit_bytes=limit)


def _kibibytes(path: Path, key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+)", path.read_text(), re.MULTILINE)[1]) << 10  # type: ignore[index]


def _group_limits(lines: list[str], groups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group that holds this process; file cache that can be dropped is not in use."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                most, used = (int((group / name).read_text()) for name in names[:2])
                droppable = int(re.search(rf"^{names[2]} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)[1])  # type: ignore[index]
                yield most, used - droppable
            except (OSError, ValueError, TypeError):  # no such group here, or "max"
                pass
            if group == root:
                break


class MemoryWatch:
    """Looks at device and host after steps, and says what a person should know while there is time."""

    def __init__(
        self,
        device: Device,
        total_steps: int,
        say: Callable[[str], None],
        *,
        largest_tensor_bytes: int,
        host_reserve_bytes: int | None = None,
    ) -> None:
        """Watch for ``say``; on the host keep ``host_reserve_bytes``, or what saving needs and a share of the host."""
        self.device, self.total_steps, self.say = device, total_steps, say
        self.largest_tensor_bytes, self.host_reserve_bytes = largest_tensor_bytes, host_reserve_bytes
        self._device_trend, self._host_trend = Trend(), Trend()
        self._grows_on_host = 0.0
        self._said: set[str] = set()
        self._read_at = self._trend_read_at = -float("inf")

    def device_after(self, step: int, usage: MemoryUsage) -> None:
        """Look at what the device holds at the end of ``step``."""
        if self.device.capacity_bytes is not None:
            grows = self._device_trend.add(step, usage.allocated_bytes)
            self._warn_of_leak("the device", step, grows, self.device.capacity_bytes - usage.peak_allocated_bytes)

    def host_after(self, step: int) -> None:
        """Look at the host after ``step``, if the last look was not a moment ago.

        Raises:
            HostMemoryError: the host has less left than its reserve.
        """
        now = time.monotonic()
        if self.host_reserve_bytes == 0 or now - self._read_at < SECONDS_BETWEEN_HOST_READINGS:
            return
        self._read_at = now
        host = read_host_memory()
        if host is None:
            return
        reserve = self.host_reserve_bytes
        if reserve is None:
            reserve = host.limit_bytes // SHARE_OF_HOST + 2 * self.largest_tensor_bytes
        if now - self._trend_read_at >= SECONDS_BETWEEN_TREND_READINGS:
            self._trend_read_at = now
            self._grows_on_host = self._host_trend.add(step, host.held_bytes)
            self._warn_of_leak("the host", step, self._grows_on_host, host.available_bytes - reserve)
        if host.available_bytes < reserve:
            raise HostMemoryError(
                f"after step {step} the host has {format_bytes(host.available_bytes)} of memory left, less than its reserve of "
                f"{format_bytes(reserve)}, and its killer would come next; this process holds {format_bytes(host.held_bytes)}"
                + (f", {format_bytes(round(self._grows_on_host))} more at every step" if self._grows_on_host else "")
            )
        if host.available_bytes < 2 * reserve:
            self._say_once(
                "the host is short",
                f"the host has {format_bytes(host.available_bytes)} of memory left; below {format_bytes(reserve)} the run "
                "writes a checkpoint and stops",
            )

    def _warn_of_leak(self, where: str, step: int, bytes_per_step: float, room_bytes: int) -> None:
        if bytes_per_step <= 0:
            return
        end = step + max(0, int(room_bytes / bytes_per_step))
        if end < self.total_steps:
            self._say_once(
                where,
                f"memory leaks: at the end of each step {where} holds {format_bytes(round(bytes_per_step))} more than after the "
                f"one before; at about step {end} of {self.total_steps} there is none left. A checkpoint before that (save_steps) "
                "and --resume begin anew",
            )

    def _say_once(self, subject: str, message: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            self.say(message)
