"""How many tokens a run reads, where that can be known, and what is then said of its hours."""

import io

import pytest
from rich.console import Console

from oomless.config import TrainConfig
from oomless.planning.duration import tokens_to_read
from oomless.planning.throughput import Throughput
from oomless.report.choice import hours_in_words, print_speed
from oomless.units import parse_count, short


def config(data="-", **settings):
    common = {"model": "-", "data": str(data), "output_dir": "-", "max_seq_length": 100}
    return TrainConfig.from_mapping(common | settings)


def tokens(**settings):
    found = tokens_to_read(config(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings))
    return found.tokens_low, found.tokens_high


def test_a_given_length_is_exact():
    assert tokens(max_steps=5) == (4000, 4000)
    assert tokens(max_tokens=801) == (1600, 1600)  # the last step is whole


def test_files_are_weighed(tmp_path):
    for name in ("a.txt", "b.py"):
        (tmp_path / name).write_bytes(b"x" * 15_000)
    assert tokens(data=tmp_path) == (6_000, 10_000)
    assert tokens(data=tmp_path, num_train_epochs=2) == (12_000, 20_000)
    assert "2 files at 3 to 5 bytes a token" in tokens_to_read(config(tmp_path)).basis


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet", "missing"])
def test_nothing_is_made_up(tmp_path, name):
    if name != "missing":
        (tmp_path / name).write_bytes(b"x" * 15_000)
    assert tokens_to_read(config(tmp_path / name)) is None


def test_what_is_said():
    speed = Throughput(
        tokens_per_second_low=100.0,
        tokens_per_second=150.0,
        tokens_per_second_high=200.0,
        basis="what a test assumes",
        calibrated=False,
    )
    said = io.StringIO()
    print_speed(Console(file=said, width=200), speed, config(max_steps=7200))
    assert said.getvalue().splitlines() == [
        "720,000 tokens (7,200 steps) would take 1.0 hours to 2.0 hours, predicted",
        "100 to 200 tokens/s, 150 expected, are predicted, not measured: what a test assumes",
    ]
    said = io.StringIO()
    print_speed(Console(file=said, width=200), speed, config())
    assert "would take" not in said.getvalue()


@pytest.mark.parametrize(
    ("hours", "words"),
    [
        ((0.001, 0.002), "1 min"),
        ((0.2, 0.5), "12-30 min"),
        ((2, 4), "2.0-4.0 h"),
        ((12, 30), "12-30 h"),
        ((41, 92), "1.7-3.8 days"),
    ],
)
def test_hours_in_words(hours, words):
    assert hours_in_words(hours) == words


@pytest.mark.parametrize(
    ("text", "count"), [("100M", 100_000_000), ("1.5b", 1_500_000_000), ("32768", 32768), ("10 k", 10_000)]
)
def test_a_number_of_tokens(text, count):
    assert parse_count(text) == count
    assert parse_count(short(count)) == pytest.approx(count, rel=5e-3)


@pytest.mark.parametrize("text", ["many", "-5", "10GiB", "", "1e9"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(ValueError, match="such as 100M"):
        parse_count(text)
