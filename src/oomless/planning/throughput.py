"""How fast a training would be, from what its rehearsal computed and moved. A prediction, and never shown as anything else.

A roofline, operator by operator: each takes as long as its arithmetic at the GPU's rate, its bytes at the memory's bandwidth, or
the host's start of it, whichever is longest; the catalogue's efficiencies scale all three. What goes between GPUs goes around a ring, as fast
as its slowest part: from GPU to GPU, or from machine to machine over the network. That, and what goes over the host's link, runs beside that at best, after it at worst, and half and half in between. The range is that of the efficiencies; where the
catalogue has measured points for the GPU, the median of their ratios to the prediction scales it, and their spread, a little
widened, is the range.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oomless.catalogue import Gpu
from oomless.catalogue.efficiency import Bound, Efficiency, Measured, efficiency, efficiency_source, measured
from oomless.config import TrainConfig
from oomless.memory.work import Cost, Work
from oomless.planning.plan import Plan, Target
from oomless.techniques.sharding import shared

_BESIDE: dict[Bound, float] = {"low": 1.0, "expected": 0.5, "high": 0.0}
"""How much of the shorter of computation and copies is not hidden behind the longer."""

NOMINAL_RATES = {"fp32": 10e12, "fp16": 80e12, "bf16": 80e12}
NOMINAL_BANDWIDTH, NOMINAL_LINK, NOMINAL_PEERS = 500e9, 12e9, 8e9
"""Proportions of a common GPU, which order strategies where the GPU's own rates are not known; never shown."""

SPREAD = 0.1
"""By so much the range is wider than that of measured points: what is predicted is not what was measured."""

SLOWEST_LINK = 8e9
"""Bytes a second to the host where the GPU's machine is not known: half of PCIe 3.0 with 16 lanes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """A predicted range of tokens a second."""

    tokens_per_second_low: float
    tokens_per_second: float
    """The expected one."""

    tokens_per_second_high: float
    basis: str
    """What the range rests on."""

    calibrated: bool
    """Whether measured points of this GPU scale it."""

    def hours(self, tokens: int) -> tuple[float, float]:
        """Return the fewest and the most hours that ``tokens`` would take."""
        return tokens / self.tokens_per_second_high / 3600, tokens / self.tokens_per_second_low / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def throughput(
    work: Work, target: Target, config: TrainConfig, points: Sequence[Measured] | None = None
) -> Throughput | None:
    """Return the predicted speed of a training; ``None`` where the rates of ``target`` are not known.

    Args:
        work: of one optimizer step, from the rehearsal.
        target: the GPU, or several.
        config: the run, for the tokens of a step.
        points: measured ones; by default the catalogue's for this GPU, where there is one.
    """
    gpu = target.gpu
    if gpu is None or gpu.bandwidth_bytes_per_s is None or not gpu.peak_flops:
        return None
    tokens = tokens_of_step(config, target)
    low, expected, high = (
        tokens / _seconds(work, config, _Rates.of(target, gpu, efficiency(gpu, bound)), _BESIDE[bound])
        for bound in ("low", "expected", "high")
    )
    basis = efficiency_source(gpu, target.gpus, target.machines)
    if points is None:
        points = measured(gpu) if target.gpus == 1 else ()
    if points:
        ratios = [point.measured / point.predicted for point in points]
        low, high = expected * min(ratios) * (1 - SPREAD), expected * max(ratios) * (1 + SPREAD)
        expected *= statistics.median(ratios)
        basis = f"{len(points)} measured points on {gpu.name}: {'; '.join(dict.fromkeys(p.source for p in points))}"
    return Throughput(
        tokens_per_second_low=low,
        tokens_per_second=expected,
        tokens_per_second_high=high,
        basis=basis,
        calibrated=bool(points),
    )


def speed_of(plan: Plan, config: TrainConfig) -> Throughput | None:
    """Return the predicted speed of ``config``, whose plan is ``plan``; ``None`` where it does not fit, or as ``throughput``."""
    if not plan.fits or plan.work is None:
        return None
    return throughput(plan.work, plan.target, shared(config, plan.target.gpus))


def relative_seconds(work: Work, target: Target, config: TrainConfig) -> float:
    """Return seconds for a token, expected; on a GPU whose rates are not known only in proportion, to order strategies."""
    known = throughput(work, target, config, ())
    if known is not None:
        return 1 / known.tokens_per_second
    nominal = _Rates(
        flops=NOMINAL_RATES,
        memory=NOMINAL_BANDWIDTH,
        link=NOMINAL_LINK,
        peers=min(NOMINAL_PEERS, target.network_bytes_per_s or math.inf),
        operator_seconds=1e-5,
    )
    return _seconds(work, config, nominal, _BESIDE["expected"]) / tokens_of_step(config, target)


def tokens_of_step(config: TrainConfig, target: Target) -> int:
    """Return the tokens of one optimizer step, those of all GPUs together."""
    return config.blocks_per_step * config.max_seq_length * target.gpus


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """What is reached, per second."""

    flops: dict[str, float]
    memory: float
    link: float
    peers: float
    operator_seconds: float

    @classmethod
    def of(cls, target: Target, gpu: Gpu, share: Efficiency) -> _Rates:
        peaks = {rate: peak * share.matrix for rate, peak in gpu.peak_flops.items()}
        slowest = min(peaks.values())
        peers = (gpu.nvlink_bytes_per_s or gpu.host_link_bytes_per_s or SLOWEST_LINK) * share.peers
        network = math.inf if target.network_bytes_per_s is None else target.network_bytes_per_s * share.network
        return cls(
            # A dtype that the hardware does not have runs in fp32.
            flops={rate: peaks.get(rate, peaks.get("fp32", slowest)) for rate in ("fp32", "fp16", "bf16")},
            memory=(gpu.bandwidth_bytes_per_s or 0) * share.memory,
            link=(gpu.host_link_bytes_per_s or SLOWEST_LINK) * share.link,
            peers=min(peers, network),
            operator_seconds=share.operator_seconds,
        )


def _seconds(work: Work, config: TrainConfig, rates: _Rates, beside: float) -> float:
    """Return the seconds of one optimizer step: its passes, of which fewer were rehearsed, and its update."""

    def computing(costs: Sequence[tuple[Cost, int]]) -> float:
        return sum(
            count * max(flops / rates.flops[rate], moved / rates.memory, rates.operator_seconds)
            for (rate, flops, moved), count in costs
        )

    passes = config.gradient_accumulation_steps / work.passes
    total = 0.0
    for times, costs, link, exchanged in (
        (passes, work.of_passes, work.link_bytes_of_passes, work.exchanged_bytes_of_passes),
        (1, work.of_update, work.link_bytes_of_update, work.exchanged_bytes_of_update),
    ):
        computed, copied = computing(costs), link / rates.link + exchanged / rates.peers
        total += times * (max(computed, copied) + beside * min(computed, copied))
    return total
