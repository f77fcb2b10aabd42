"""Logs explained by the studio: what ``oomless explain`` prints, as text."""

import re

import pytest
from tests.cli.test_cli import oomless
from tests.studio.test_plan import look, processes, until

LOG = """step 3 <img src=x onerror=alert(1)>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of 14.56 GiB of which 811.56 MiB \
is free. Including non-PyTorch memory, this process has 13.76 GiB memory in use. Of the allocated memory 13.41 GiB is allocated by \
PyTorch, and 225.35 MiB is reserved by PyTorch but unallocated.
"""


def test_a_log_is_explained_as_the_command_explains_it(studio, tmp_path):
    question = studio.post("/api/explain/keep", json={"text": LOG}).json()
    html = until(studio, question, lambda said: said["html"] or said["error"])["html"]
    assert not re.search(r"<(img|script)\b|\x1b", html)
    (tmp_path / "log.txt").write_text(LOG)
    said = " ".join(oomless("explain", tmp_path / "log.txt").stdout.split())
    shown = " ".join(re.sub(r"<[^>]+>", "", html).split())
    for part in ("1002.00 MiB", "14.56 GiB"):
        assert part in said
    assert (
        shown.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#x27;", "'")
        .replace("&quot;", '"')
        .replace("&amp;", "&")
        == said
    )
    assert processes() == 0


@pytest.mark.slow
def test_what_cannot_be_explained_is_said(studio, tmp_path):
    question = studio.post("/api/explain/keep", json={"text": LOG}).json()
    assert "paste it again" in look(studio, {"log": "0" * 32})["error"]
    assert "lies outside" in look(studio, {**question, "model": "/etc"})["error"]
    assert studio.post("/api/explain/keep", json={"text": 1}).status_code == 400
    said = until(studio, {**question, "dtype": "no-such"}, lambda said: said["html"] or said["error"])
    assert "no-such is left out" in (said["html"] or said["error"])
