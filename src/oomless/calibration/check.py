"""What ``oomless check-gpu`` does: each part by itself, then whole trainings, predicted and measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from oomless.calibration import parts
from oomless.calibration.points import POINTS, Point, try_point
from oomless.catalogue.calibration import Calibration
from oomless.errors import HardwareError
from oomless.memory.device import Device
from oomless.planning.plan import Target
from oomless.units import GiB, counted, format_bytes

ALLOCATED_ERROR, RESERVED_ERROR = 0.01, 0.05
"""By more than these a peak is not predicted."""

LEAST_FREE_BYTES = GiB

MOST_OUTSIDE = 2
"""More than so many times what the catalogue expects outside the allocator is held by other programs too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One part, and whether it is as it should be."""

    part: str
    right: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What was found of a GPU."""

    gpu: str
    virtual: bool
    findings: tuple[Finding, ...]
    points: tuple[Point, ...]
    untried: int
    """Trainings for which there was no time."""

    rates: dict[str, float]
    calibration: Calibration | None
    """``None`` where what was measured is no GPU's."""

    @property
    def right(self) -> bool:
        """Whether all is as it should be."""
        return all(finding.right for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "right": self.right}


def check(device: Device, target: Target, *, seconds: float, heard: Callable[[str], None]) -> Checked:
    """Check ``device``, which ``target`` describes, in about ``seconds``; each part is told to ``heard`` when it begins.

    On a virtual GPU models are tiny, and what is measured is the CPU's: it tries the check itself.

    Raises:
        HardwareError: too little of its memory is free.
    """
    ends = time.monotonic() + seconds
    virtual = device.torch_device.type != "cuda"
    free = device.capacity_bytes or 0 if virtual else torch.cuda.mem_get_info(device.torch_device)[0]
    if free < LEAST_FREE_BYTES:
        raise HardwareError(
            f"a check asks for up to {format_bytes(LEAST_FREE_BYTES)}, and {format_bytes(free)} of {device.name} are free: "
            f"{'name a larger one' if virtual else 'end what else uses it'}"
        )
    findings = []
    with device.active():
        for name, part in (
            ("allocator", parts.allocator),
            ("attention", parts.attention),
            ("operators", parts.operators),
            ("updates", parts.updates),
        ):
            heard(name)
            try:
                findings.append(Finding(part=name, right=True, text=part(device)))
            except RuntimeError as error:
                findings.append(Finding(part=name, right=False, text=str(error)))
        heard("rates")
        reached = parts.rates(device, tiny=virtual)
    points: list[Point] = []
    for settings in POINTS:
        if points and time.monotonic() > ends:
            break
        heard(f"{settings['model']}, {settings['trainable']}")
        points.append(try_point(settings, device, target, tiny=virtual))
    findings += [_judged(points)]
    outside, finding = (None, None) if virtual else _outside(device, target)
    findings += [finding] if finding is not None else []
    speeds = tuple(
        (point.predicted_tokens_per_second, point.measured_tokens_per_second)
        for point in points
        if point.predicted_tokens_per_second is not None and point.measured_tokens_per_second
    )
    return Checked(
        gpu=target.name,
        virtual=virtual,
        findings=tuple(findings),
        points=tuple(points),
        untried=len(POINTS) - len(points),
        rates=reached,
        calibration=None
        if virtual or target.gpu is None
        else Calibration(
            gpu=target.gpu.name,
            made=f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}",
            outside_bytes=outside,
            speeds=speeds,
            rates=reached,
        ),
    )


def _judged(points: list[Point]) -> Finding:
    """Say how well the peaks of ``points`` were predicted."""
    failed = [point for point in points if point.error is not None]
    if failed:
        text = f"{failed[0].name} was to fit and did not: {failed[0].error}"
        return Finding(part="peaks", right=False, text=text)
    ran = [point for point in points if point.measured_allocated_bytes]
    if not ran:
        return Finding(part="peaks", right=True, text="no training that is tried here fits: nothing was compared")
    allocated = max((point.allocated_error for point in ran), key=abs)
    reserved = max((point.reserved_error for point in ran), key=abs)
    right = abs(allocated) <= ALLOCATED_ERROR and abs(reserved) <= RESERVED_ERROR
    return Finding(
        part="peaks",
        right=right,
        text=f"of {counted(len(ran), 'training')} the worst is {allocated:+.2%} allocated and {reserved:+.2%} reserved",
    )


def _outside(device: Device, target: Target) -> tuple[int | None, Finding]:
    """Return what this process holds outside the allocator, where that can be told, and what is to be said of it."""
    free, total = torch.cuda.mem_get_info(device.torch_device)
    held = total - free - device.usage().reserved_bytes
    expected = target.outside_bytes
    if held > MOST_OUTSIDE * expected:
        text = f"{format_bytes(held)}, {format_bytes(expected)} expected: other programs use this GPU too, so it is not taken over"
        return None, Finding(part="context", right=True, text=text)
    return held, Finding(part="context", right=True, text=f"{format_bytes(held)}, {format_bytes(expected)} expected")
