"""A run on the terminal: one live line for a person, plain lines for a log."""

from __future__ import annotations

import math
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.text import Text

from oomless.report.screen import LiveLine, Screen, bar, joined
from oomless.report.tables import Grid
from oomless.techniques.trainable import TrainableRow
from oomless.training.listening import Listener, RunFacts, RunResult
from oomless.units import counted, format_bytes

BAR_WIDTH = 24
NARROWEST_BAR = 8
PACE_OF = 50
"""Time left is told by so many of the last lines of metrics."""


class TerminalListener(Listener):
    """Prints a run to ``screen``; close it when the run has ended."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.live = LiveLine(screen)
        self.total_steps = 0
        self.limit_bytes: int | None = None
        self.pace: deque[tuple[int, float]] = deque(maxlen=PACE_OF)

    def close(self) -> None:
        """End the live line."""
        self.live.close()

    def tokenising(self, done_bytes: int, total_bytes: int) -> None:
        """Say how much of the text is tokenised."""
        said = f"tokenising: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        share = done_bytes / max(1, total_bytes)
        self.live.show(Text.assemble(bar(share, min(BAR_WIDTH, self.screen.width // 4)), f" {said}"), said)

    def prepared(self, facts: RunFacts) -> None:
        """Print what will train on what, and open the live line."""
        self.close()
        print_parameters(self.screen, facts.table)
        for line in facts.data.summary:
            self.screen.print(line)
        config, left = facts.config, facts.total_steps - facts.first_step
        self.screen.print(
            f"{counted(left, 'step')} of {counted(config.blocks_per_step * facts.gpus, 'block')} x "
            f"{counted(config.max_seq_length, 'token')} on {f'{facts.gpus} x ' if facts.gpus > 1 else ''}{facts.device.name}"
        )
        self.screen.print(facts.rates)
        self.total_steps, self.limit_bytes = facts.total_steps, facts.device.capacity_bytes
        self.live = LiveLine(self.screen, silent_s=0)
        self.pace.clear()
        self.pace.append((facts.first_step, time.monotonic()))

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Renew the live line, which goes after the last step, or print one line now and then."""
        step, width = metrics["step"], self.screen.width
        self.pace.append((step, time.monotonic()))
        fields = self.fields(metrics)
        text = joined(fields, width)
        room = min(BAR_WIDTH, width - len(text) - 2)
        drawn = Text.assemble(bar(step / self.total_steps, room), "  ") if room >= NARROWEST_BAR else Text()
        log = "  ".join(text for _, text in fields)
        self.live.show(drawn.append(text), log, always=step == self.total_steps)
        if step == self.total_steps:
            self.close()

    def fields(self, metrics: dict[str, Any]) -> list[tuple[int, str]]:
        """Return step, loss, speed, rate, memory and time left of a line of metrics, each with its rank; 0 matters most."""
        memory = format_bytes(metrics["memory_bytes"])
        if self.limit_bytes is not None:
            memory += f" of {format_bytes(self.limit_bytes)}"
        return [
            (0, f"step {metrics['step']}/{self.total_steps}"),
            (1, f"loss {metrics['loss']:.4f}"),
            (4, f"{metrics['tokens_per_second']:,.0f} tokens/s"),
            (5, f"lr {metrics['learning_rate']:.2e}"),
            (3, f"memory {memory}"),
            (2, f"{self.time_left()} left"),
        ]

    def time_left(self) -> timedelta:
        """Return how long the steps that are left take at the pace of the last ones."""
        (first, began), (last, now) = self.pace[0], self.pace[-1]
        seconds = (now - began) / max(1, last - first) * (self.total_steps - last)
        return timedelta(seconds=round(seconds))

    def evaluated(self, step: int, losses: dict[str, float]) -> None:
        """Print validation losses and perplexities."""
        if len(self.pace) == 1:  # before the first step, whose pace begins now
            self.pace[0] = (self.pace[0][0], time.monotonic())
        shown = ", ".join(f"{name} {loss:.4f} (perplexity {perplexity(loss)})" for name, loss in losses.items())
        self.screen.print(f"validation loss after step {step}: {shown}")

    def sampled(self, step: int, samples: list[dict[str, str]]) -> None:
        """Print what the model wrote."""
        self.screen.print(f"written after step {step}:")
        for sample in samples:
            self.screen.say("  ", (sample["prompt"], "dim"), sample["text"])

    def saved(self, folder: Path) -> None:
        """Print where something was saved."""
        self.screen.print(f"saved {folder}", soft_wrap=True)

    def said(self, message: str) -> None:
        """Print the message."""
        self.screen.print(message, soft_wrap=True)


def perplexity(loss: float) -> str:
    """Return the perplexity of a mean cross-entropy."""
    return "above 1e8" if loss >= 20 else f"{math.exp(loss):,.1f}"  # or nan


def print_parameters(screen: Screen, rows: list[TrainableRow]) -> None:
    """Print what trains."""
    grid = Grid(
        title="Parameters",
        columns=("module", "parameters", "trainable", "dtype"),
        numbers=frozenset(("parameters", "trainable")),
    )
    for row in rows:
        grid.add(
            row.name.removesuffix(".weight").removesuffix(".default"),
            f"{row.parameters:,}",
            f"{row.trainable:,}" if row.trainable else "frozen",
            row.dtype,
        )
    total, trains = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    cells = (f"total, of which {trains / total:.1%} train", f"{total:,}", f"{trains:,}", "")
    grid.add(*(Text(cell, "bold") for cell in cells))
    grid.print(screen)


def print_result(screen: Screen, result: RunResult, resume_command: str) -> None:
    """Print what a run came to."""
    if result.interrupted:
        screen.print(f"interrupted and saved after step {result.steps}; go on with: {resume_command}", soft_wrap=True)
        return
    speed = f"{result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else "no step was left"
    screen.print(
        f"{counted(result.tokens, 'token')} in {counted(result.steps, 'step')}, {speed}, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}",
        highlight=False,
    )
    for name, after in result.eval_after.items():
        before = result.eval_before[name]
        screen.print(
            f"  {name}: validation loss {before:.4f} -> {after:.4f}, perplexity {perplexity(before)} -> {perplexity(after)}",
            highlight=False,
        )
    alone = result.model_dir is not None and (result.model_dir / "adapter_config.json").is_file()
    screen.print(f"{'adapter' if alone else 'model'}: {result.model_dir}", soft_wrap=True)
