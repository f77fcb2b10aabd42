import pytest

from oomless.errors import nearest
from oomless.units import GiB, format_bytes, format_rate, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.50 KiB"), (3 << 20, "3.00 MiB"), (int(14.7 * GiB), "14.70 GiB")],
)
def test_format_bytes(size_bytes, text):
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1024", 1024),
        ("256MiB", 256 << 20),
        (" 1.5 GiB ", 3 << 29),
        ("2GB", 2 * 10**9),
        ("1.5tib", 3 << 39),
        ("1 TB", 10**12),
    ],
)
def test_parse_bytes(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1 GiB", "1 GiBB", "one"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="a size is a number"):
        parse_bytes(text)


def test_nearest():
    assert nearest("rtx4009", ["RTX4090", "T4"]) == " Did you mean 'RTX4090'?"
    assert nearest("zebra", ["RTX4090"]) == ""


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "shown"),
    [
        ("100Gbit", 12.5e9, "100 Gbit/s"),
        ("100 gbit/s", 12.5e9, "100 Gbit/s"),
        ("12.5GB/s", 12.5e9, "100 Gbit/s"),
        ("900Mbit", 112.5e6, "0.9 Gbit/s"),
        ("3.2Tbit/s", 400e9, "3,200 Gbit/s"),
    ],
)
def test_rates(text, bytes_per_s, shown):
    assert parse_rate(text) == pytest.approx(bytes_per_s)
    assert format_rate(parse_rate(text)) == shown


@pytest.mark.parametrize("text", ["100", "100Gb", "12GB", "0Gbit", "-1Gbit", "fast", ""])
def test_rates_that_say_no_unit_or_nothing_are_refused(text):
    with pytest.raises(ValueError, match="such as 100Gbit; got"):
        parse_rate(text)
