"""A plan as a page: what to train, what may be chosen instead, and where its memory goes."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import Any

import yaml

from oomless.memory.profile import CATEGORIES, Holder, MemoryProfile
from oomless.planning.choice import Choice
from oomless.planning.choose import picked_settings
from oomless.planning.plan import Plan
from oomless.planning.row import Row
from oomless.planning.strategies import Settings, in_words
from oomless.planning.throughput import Throughput
from oomless.report.charts import page, table, text
from oomless.report.choice import (
    NAMES,
    answer,
    hours_of,
    lacking,
    launcher,
    named_rows,
    of_a_step,
    read_text,
    rejected_rows,
    speed_in_words,
)
from oomless.report.pictures import OTHERS, Dot, choices, held_over_time, made_of
from oomless.report.plan import held_by
from oomless.units import counted, format_bytes

LARGEST = 12
"""So many of the tensors at the peak are listed."""


def choice_page(choice: Choice) -> str:
    """Return the page of what a search found."""
    return page(f"{choice.model} on {choice.target.name}", choice_parts(choice))


def plan_page(plan: Plan, speed: Throughput | None) -> str:
    """Return the page of a plan by itself."""
    head = [f"<p>{text(_fits(plan))}</p>"]
    if speed is not None:
        head.append(f"<p>{text(_speed(speed))}</p>")
    head.append(f"<p>{text(plan.rates)}</p>")
    return page(f"{plan.model} on {plan.target.name}", [*head, *plan_parts(plan)])


def in_short(choice: Choice) -> dict[str, str]:
    """Return the pick in a few words, to stand beside other picks."""
    row = choice.picked
    if row is None or choice.config is None:
        return {"strategy": "nothing fits"}
    return {
        "strategy": str(row.quality),
        "memory": format_bytes(row.needed_bytes),
        "speed": speed_in_words(row),
        "hours": hours_of(choice, row),
        "how": in_words(row.settings),
        "learning_rate": f"{choice.config.learning_rate:g}",
    }


def choice_parts(choice: Choice) -> Iterator[str]:
    """Yield what a search found, part by part."""
    if choice.picked is None or choice.plan is None:
        usable = format_bytes(choice.target.usable_bytes - choice.target.margin_bytes)
        yield f"<p><strong>Nothing fits</strong> the {usable} of {text(choice.target.name)} that a plan may fill.</p>"
        yield from _rejected(choice)
        return
    headline, took = answer(choice)
    yield f"<p><strong>{text(headline)}</strong>{text(took)}</p>"
    if choice.stopped:
        yield "<p><strong>The search was stopped: this is the best that it had found.</strong></p>"
    yield _choices(choice)
    yield _to_train(choice)
    yield _frontier(choice)
    yield from plan_parts(choice.plan)
    yield from _rejected(choice)
    yield from _rests_on(choice)


def plan_parts(plan: Plan) -> Iterator[str]:
    """Yield where the memory of a plan goes."""
    profile, target = plan.profile, plan.target
    sizes: list[tuple[str, int]] = [(name, profile.peak_bytes_by_category.get(name, 0)) for name in CATEGORIES]
    sizes += [("cached but unused", plan.cached_bytes), ("outside the allocator", target.outside_bytes)]
    limits = [("the GPU has", float(target.capacity_bytes))]
    if target.margin_bytes:
        limits.append(("a plan fills", float(target.capacity_bytes - target.margin_bytes)))
    said = ""
    if profile.peak is not None:
        where = f" in {profile.peak.module}" if profile.peak.module else ""
        said = (
            f"The peak is reached in the {profile.peak.phase} phase{where}, when {profile.peak.operation} asks for "
            f"{format_bytes(profile.peak.size_bytes)}."
        )
    within: dict[str, list[str]] = {
        category: [_held(one) for one in holders] for category, holders in profile.peak_holders.items()
    }
    yield made_of("Memory at the peak", sizes, limits, said, within)
    if not plan.fits and plan.out_of_memory:
        yield f"<p>PyTorch would say: {text(plan.out_of_memory)}</p>"
    yield held_over_time(held_by(profile, [("the allocator can have", float(target.usable_bytes))]))
    phases = [
        (text(name), format_bytes(peak.allocated_bytes), format_bytes(peak.reserved_bytes))
        for name, peak in profile.phases.items()
    ]
    yield _largest(profile)
    yield f"<section><h2>Phases</h2>{table('Phases', ('phase', 'most allocated', 'most reserved'), phases)}</section>"


def _held(holder: Holder) -> str:
    several = f" x {holder.allocations:,}" if holder.allocations > 1 else ""
    return f"{holder.name or 'others'}{several}: {format_bytes(holder.size_bytes)}"


def _largest(profile: MemoryProfile) -> str:
    """Return the largest tensors at the peak as a table."""
    held = [(one, category) for category, holders in profile.peak_holders.items() for one in holders if one.name]
    held.sort(key=lambda pair: -pair[0].size_bytes)
    rows = [
        (text(one.name), f"{one.allocations:,}", text(category), format_bytes(one.size_bytes))
        for one, category in held[:LARGEST]
    ]
    title = "Largest at the peak"
    return (
        f"<section><h2>{title}</h2>{table(title, ('tensor, or who asked', 'tensors', 'for', 'memory'), rows)}</section>"
    )


def _choices(choice: Choice) -> str:
    assert choice.wish is not None
    columns = ("choice", "memory", "tokens/s", read_text(choice), "learns", "trains", "how", "given up")
    named = named_rows(choice)
    others = [row for row in choice.rows if row.fits and not any(row is one for one in named)]
    rows = [
        (
            text(("► " if row.picked else "") + (", ".join(NAMES[name] for name in row.named) or "also fits")),
            text(format_bytes(row.needed_bytes)),
            text(speed_in_words(row)),
            text(hours_of(choice, row)),
            f"{choice.wish.share(row):.0%}",
            *(text(words) for words in (str(row.quality), in_words(row.settings), row.quality.given_up())),
        )
        for row in [*named, *others]
    ]
    drawn = table("What fits", columns, rows, columns[-3:])
    return f'<section class="wide"><h2>What fits</h2>{drawn}<p>{text(of_a_step(choice))}</p><p>{text(choice.rates)}</p></section>'


def _frontier(choice: Choice) -> str:
    """Return the choices by speed and by what a token teaches; empty where the GPU's rates are not known."""
    assert choice.wish is not None
    fitting = [row for row in choice.rows if row.fits and row.speed is not None]
    if not fitting:
        return ""
    named = named_rows(choice)

    def dot(row: Row) -> Dot:
        assert choice.wish is not None
        assert row.speed is not None
        place = next((number for number, one in enumerate(named) if one is row), None)
        called = ", ".join(NAMES[name] for name in row.named)
        share = choice.wish.share(row)
        said = [
            str(row.quality),
            f"{row.speed.tokens_per_second:,.0f} tokens/s",
            f"learns {share:.0%}",
            format_bytes(row.needed_bytes),
        ]
        return Dot(
            name=called,
            x=row.speed.tokens_per_second,
            y=share,
            size=row.needed_bytes,
            said="\n".join(([called] if called else []) + said),
            colour=OTHERS if place is None else place,
            picked=row.picked,
        )

    words = (
        "Across: tokens/s, predicted. Up: what a token teaches beside full training. Size: memory. Ringed: the pick."
    )
    return choices("Quality against speed", words, [dot(row) for row in fitting], lambda speed: f"{speed:,.0f}")


def _to_train(choice: Choice) -> str:
    settings = picked_settings(choice)
    written = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    command = f"{launcher(choice.target.gpus_of_machine, choice.target.machines)} train {' '.join(_options(settings))}"
    return (
        f'<section class="wide"><h2>To train it</h2><pre class="copied" aria-label="Command" tabindex="0">{text(command)}</pre>'
        f"<p>The same as a file, for <code>oomless train --config run.yaml</code>:</p>"
        f'<pre class="copied" aria-label="YAML" tabindex="0">{text(written)}</pre></section>'
    )


def _options(settings: Settings) -> list[str]:
    """Return ``settings`` as options of ``oomless train``, and those without which it does not begin; of the file where an option cannot say them."""
    missing = [f"--{name.replace('_', '-')} ..." for name in ("data", "output_dir") if name not in settings]
    if not all(isinstance(value, bool | str | int | float) for value in settings.values()):
        return ["--config run.yaml", *missing]
    return [_option(name.replace("_", "-"), value) for name, value in settings.items()] + missing


def _option(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else quote(f"--{name}={value}")


def _rejected(choice: Choice) -> Iterator[str]:
    rows = [
        tuple(
            text(words)
            for words in (row.quality, f"> {format_bytes(row.needed_bytes)}", lacking(choice, row), row.reason)
        )
        for row in rejected_rows(choice)
    ]
    if rows:
        columns = ("strategy", "needs", "short by", "why")
        drawn = table("What does not fit", columns, rows, columns[-1:])
        yield f'<section class="wide"><h2>What does not fit</h2>{drawn}</section>'


def _rests_on(choice: Choice) -> Iterator[str]:
    assert choice.picked is not None
    assert choice.wish is not None
    said = [] if choice.picked.speed is None else [_speed(choice.picked.speed)]
    basis = choice.wish.basis if choice.wish.tokens else "assumed, as nothing says how many"
    said.append(f"{choice.wish.text_tokens:,} tokens of text: {basis}")
    shares = {one.name: one for row in named_rows(choice) for one in choice.wish.given_up(row)}
    said += [
        f"{name.replace('_', ' ')} learns {one.share:.0%} ({one.evidence}): {one.source}"
        for name, one in shares.items()
    ]
    said += choice.target.notes
    yield (
        '<section class="wide"><h2>What the figures rest on</h2><ul>'
        + "".join(f"<li>{text(one)}</li>" for one in said)
        + "</ul></section>"
    )


def _fits(plan: Plan) -> str:
    left = "headroom" if plan.headroom_bytes >= 0 else "short by"
    return (
        f"It {'fits' if plan.fits else 'does not fit'}. It needs {'' if plan.whole else 'at least '}{format_bytes(plan.needed_bytes)} of the "
        f"{format_bytes(plan.target.usable_bytes)} that are usable ({left} {format_bytes(abs(plan.headroom_bytes))}). "
        f"{counted(plan.parameters, 'parameter')}, of which {plan.trainable_parameters:,} train."
    )


def _speed(speed: Throughput) -> str:
    return (
        f"{speed.tokens_per_second_low:,.0f} to {speed.tokens_per_second_high:,.0f} tokens/s, {speed.tokens_per_second:,.0f} expected, "
        f"are predicted, not measured: {speed.basis}"
    )
