"""What a run prints: what a person needs most is kept on any screen, and a log tells that the run lives."""

import io
from datetime import timedelta
from types import SimpleNamespace

import pytest

from oomless.report import screen, terminal
from oomless.report.terminal import TerminalListener, perplexity
from oomless.units import GiB, counted

METRICS = {
    "step": 123456,
    "loss": 2.34567,
    "tokens_per_second": 12345.6,
    "learning_rate": 1.9e-5,
    "memory_bytes": int(13.21 * GiB),
}


def listener(width, **options):
    found = TerminalListener(screen.Screen(io.StringIO(), width=width, **options))
    found.total_steps, found.limit_bytes = 1_000_000, int(14.56 * GiB)
    found.pace.append((123455, found.live._logged_at))
    return found


def said(found):
    return found.screen.file._stream.getvalue()


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (40, ["step 123456/1000000"]),
        (80, ["step 123456/1000000", "memory 13.21 GiB of 14.56 GiB", " left"]),
        (140, ["step 123456/1000000", "loss 2.3457", "12,346 tokens/s", "lr 1.90e-05", "of 14.56 GiB", " left"]),
    ],
)
def test_the_live_line_keeps_what_matters(width, kept):
    found = listener(width, force_terminal=True, color_system=None)
    found.stepped(METRICS)
    line = said(found).split("\x1b[2K")[-1]
    assert len(line) <= width
    for part in kept:
        assert part in line
    found.close()


def test_time_left_is_told_by_the_steps_alone(monkeypatch):
    found = listener(80)
    clock = iter([1000.0, 1002.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found.pace[0] = (0, 0.0)
    found.evaluated(0, {"text": 1.0})
    found.pace.append((1, next(clock)))
    assert found.time_left() == timedelta(seconds=2 * (1_000_000 - 1))


def test_a_log_says_that_text_is_being_tokenised(monkeypatch):
    found = listener(80)
    found.tokenising(1 << 20, 4 << 20)
    assert said(found) == ""
    monkeypatch.setattr(screen, "SECONDS_BETWEEN_LOG_LINES", -1e9)
    found.tokenising(2 << 20, 4 << 20)
    assert said(found) == "tokenising: 2.00 MiB of 4.00 MiB\n"


@pytest.mark.parametrize(("loss", "shown"), [(0.0, "1.0"), (2.0, "7.4"), (30.0, "above 1e8"), (float("nan"), "nan")])
def test_perplexity(loss, shown):
    assert perplexity(loss) == shown


def test_one_is_no_plural():
    assert [counted(number, "step") for number in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
