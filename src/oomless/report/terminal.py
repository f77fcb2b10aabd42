"""A run on the terminal: one live line for a person, plain lines for a log."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from oomless.techniques.trainable import TrainableRow
from oomless.training.listening import Listener, RunFacts, RunResult
from oomless.units import format_bytes

SECONDS_BETWEEN_LOG_LINES = 10.0


class TerminalListener(Listener):
    """Prints a run to ``console``; close it when the run has ended."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.task: TaskID | None = None
        self.total_steps = 0
        self.limit_bytes: int | None = None
        self.printed_at = -math.inf

    def close(self) -> None:
        """End the live line."""
        if self.live is not None:
            self.live.stop()
            self.live = self.task = None

    def tokenising(self, done_bytes: int, total_bytes: int) -> None:
        """Move the bar of the text that is tokenised."""
        if not self.console.is_terminal:
            return
        if self.live is None:
            self.live = Progress(
                TextColumn("tokenising"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console
            )
            self.task = self.live.add_task("", total=total_bytes, text="")
            self.live.start()
        if self.task is not None:
            text = f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
            self.live.update(self.task, completed=done_bytes, text=text)

    def prepared(self, facts: RunFacts) -> None:
        """Print what will train on what, and open the live line."""
        self.close()
        self.console.print(parameter_table(facts.table))
        for line in facts.data.summary:
            self.console.print(line, highlight=False)
        self.total_steps = facts.total_steps
        self.limit_bytes = facts.device.capacity_bytes
        config = facts.config
        self.console.print(
            f"{facts.total_steps - facts.first_step} steps of {config.blocks_per_step * facts.gpus} blocks x "
            f"{config.max_seq_length} tokens on {f'{facts.gpus} x ' if facts.gpus > 1 else ''}{facts.device.name}",
            highlight=False,
        )
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.live.add_task("", total=facts.total_steps, completed=facts.first_step, text="")
            self.live.start()

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Renew the live line, or print one line now and then."""
        text = self.describe(metrics)
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=metrics["step"], text=text)
        elif time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LOG_LINES or metrics["step"] == self.total_steps:
            self.printed_at = time.monotonic()
            self.console.print(f"step {metrics['step']}/{self.total_steps}  {text}", highlight=False)

    def describe(self, metrics: dict[str, Any]) -> str:
        """Return loss, speed, rate and memory of one line of metrics."""
        memory = format_bytes(metrics["memory_bytes"])
        if self.limit_bytes is not None:
            memory += f" of {format_bytes(self.limit_bytes)}"
        return (
            f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"lr {metrics['learning_rate']:.2e}  memory {memory}"
        )

    def evaluated(self, step: int, losses: dict[str, float]) -> None:
        """Print validation losses and perplexities."""
        shown = ", ".join(f"{name} {loss:.4f} (perplexity {perplexity(loss)})" for name, loss in losses.items())
        self.console.print(f"validation loss after step {step}: {shown}", highlight=False)

    def saved(self, folder: Path) -> None:
        """Print where something was saved."""
        self.console.print(f"saved {folder}", highlight=False, soft_wrap=True)

    def said(self, message: str) -> None:
        """Print the message."""
        self.console.print(message, highlight=False, soft_wrap=True)


def perplexity(loss: float) -> str:
    """Return the perplexity of a mean cross-entropy."""
    return f"{math.exp(loss):,.1f}" if loss < 20 else "above 1e8"


def parameter_table(rows: list[TrainableRow]) -> Table:
    """Return the table of what trains."""
    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("module")
    for column in ("parameters", "trainable"):
        table.add_column(column, justify="right")
    table.add_column("dtype")
    for row in rows:
        table.add_row(row.name, f"{row.parameters:,}", f"{row.trainable:,}" if row.trainable else "frozen", row.dtype)
    total, trains = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    table.add_row("total", f"{total:,}", f"{trains:,} ({trains / total:.1%})", style="bold")
    return table


def print_result(console: Console, result: RunResult, resume_command: str) -> None:
    """Print what a run came to."""
    if result.interrupted:
        console.print(f"interrupted and saved after step {result.steps}; go on with: {resume_command}", soft_wrap=True)
        return
    console.print(
        f"{result.tokens:,} tokens in {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}",
        highlight=False,
    )
    for name, after in result.eval_after.items():
        before = result.eval_before[name]
        console.print(
            f"  {name}: validation loss {before:.4f} -> {after:.4f}, perplexity {perplexity(before)} -> {perplexity(after)}",
            highlight=False,
        )
    console.print(f"model: {result.model_dir}", soft_wrap=True, highlight=False)
