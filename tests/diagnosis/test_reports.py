"""Reports as people paste them, written for the tests: what the first answer says of each, and what it must not say."""

import io
import sys
from pathlib import Path
from subprocess import run

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from oomless.catalogue import gpu
from oomless.diagnosis.first_answer import first_answer
from oomless.report.first_answer import print_first_answer, print_missing, print_remedies
from oomless.report.screen import Screen

REPORTS = {
    f"{path.stem}: {report['name']}": report
    for path in sorted((Path(__file__).parent / "reports").glob("*.yaml"))
    for report in yaml.safe_load(path.read_text(encoding="utf-8"))
}
TEXTS = sorted({report["text"] for report in REPORTS.values()})


def printed(text, given_settings=None, width=4000):
    answer = first_answer(text, given_settings)
    stream = io.StringIO()
    screen = Screen(stream, width=width)
    print_first_answer(screen, answer)
    print_remedies(screen, answer)
    print_missing(screen, answer.missing)
    return stream.getvalue()


def test_there_are_enough():
    assert len(REPORTS) >= 150


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_said(name):
    report = REPORTS[name]
    text = printed(report["text"], report.get("given"))
    for line in report.get("says", "").splitlines():
        assert line in text
    for line in report.get("never", "").splitlines():
        assert line not in text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_cut_or_mixed_report_is_answered(data):
    """No text ends in an error, whatever is missing of it."""
    pieces = []
    for text in data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2)):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        pieces.append(text[first:last])
    at = data.draw(st.integers(0, len(pieces[0])))
    noise = data.draw(st.text(max_size=30))
    text = pieces[0][:at] + noise + pieces[0][at:] + "".join(pieces[1:])
    assert printed(text, {"model": data.draw(st.sampled_from(["-", "gpt2", "Qwen/Qwen2.5-7B"]))})


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_answered(text):
    assert printed(text)


def test_the_first_answer_needs_no_torch():
    """So that it stands there at once, however long the import of torch takes."""
    code = "import sys, oomless.diagnosis.first_answer, oomless.report.first_answer; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


SIZES = (
    *(
        "24.00",
        "7.66",
        "7.79",
        "22.03",
        "22.73",
        "23.98",
        "44.53",
        "63.98",
        "79.44",
        "251.98",
        "15.70",
        "5.93",
        "139.81",
    ),
    *("8.00", "12.00", "16.00", "48.00", "3.94", "31.74", "94.50", "178.36"),
)


@pytest.mark.parametrize("size", SIZES)
def test_any_size_of_a_gpu_is_one_that_can_be_rehearsed_on(size):
    from oomless.diagnosis.run import _target
    from oomless.diagnosis.situation import read_situation

    answer = first_answer(
        f"CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of {size} GiB of which 1.00 GiB is free."
    )
    target, _ = _target(read_situation(answer.situation.reading, {}))
    assert abs(target.capacity_bytes - float(size) * 2**30) < 2**23


def test_a_gpu_that_is_given_as_a_size_is_rehearsed_on():
    from oomless.diagnosis.run import _target

    situation = first_answer("CUDA out of memory. Tried to allocate 1.00 GiB.", {"gpu": "24GiB"}).situation
    assert _target(situation)[0].capacity_bytes == 24 << 30


def test_a_name_of_a_gpu_that_several_sizes_share_is_told_by_the_message():
    text = "on an A100. CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 39.39 GiB of which 1.00 GiB is free."
    assert first_answer(text).situation.gpu == gpu("A100-40GB").name
