"""The page shows what is printed today."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "explain_page.py"
SPEC = importlib.util.spec_from_file_location("explain_page", SCRIPT)
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


@pytest.mark.parametrize(
    "title",
    [pytest.param(t, marks=pytest.mark.full_length) if t == page.REHEARSED else t for t in page.ANSWERS],
)
def test_an_answer_of_the_page_is_what_is_printed(title):
    assert page.written(title) == page.said(title)
