"""Logs and snapshots explained by the studio: what ``oomless explain`` prints and draws."""

import contextlib
import pickle
import re
from html import unescape

import pytest
import torch
from tests.cli.test_cli import oomless
from tests.studio.test_plan import look, processes, until

from oomless.memory.snapshot import write_snapshot
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.units import MiB, format_bytes

LOG = """step 3 <img src=x onerror=alert(1)>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of 14.56 GiB of which 811.56 MiB \
is free. Including non-PyTorch memory, this process has 13.76 GiB memory in use. Of the allocated memory 13.41 GiB is allocated by \
PyTorch, and 225.35 MiB is reserved by PyTorch but unallocated.
"""


def explained(studio, question):
    return until(studio, question, lambda said: said["html"] or said["error"])


def words(html):
    """The words of ``html``, without its pictures and tables."""
    shown = re.sub(r"<(svg|table)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", "\n", shown)).split())


def test_a_log_is_explained_as_the_command_explains_it(studio, tmp_path):
    """In the same words, with a picture of what filled the GPU in place of a list; the command writes the same page."""
    question = studio.post("/api/explain/keep", json={"text": LOG}).json()
    html = explained(studio, question)["html"]
    shown = unescape(html)
    assert not re.search(r"<(img|script)\b|\x1b", html)
    (tmp_path / "log.txt").write_text(LOG)
    page = tmp_path / "log.html"
    said = oomless("explain", tmp_path / "log.txt", "--html", page).stdout
    sizes = re.findall(r"(.+\S)  +(\S+ [KMG]iB)\n", said)
    assert [size for _, size in sizes] == [
        "1002.00 MiB",
        "14.56 GiB",
        "811.56 MiB",
        "13.41 GiB",
        "225.35 MiB",
        "140.69 MiB",
    ]
    for name, size in sizes:
        assert f"<td>{name.strip()}</td><td>{size}</td>" in shown
        said = said.replace(f"{name}", "").replace(f"  {size}\n", "\n")
    for line in said.splitlines():
        assert " ".join(line.split()) in words(html)
    assert "".join(re.findall("<section>.*</section>", html)) in page.read_text().replace("\n", "")
    filled = ["held by tensors", "cached by PyTorch, unused", "not PyTorch's here", "asked for"]
    assert re.findall(r"<title>(\w[^:<]*): [^<]*</title>", shown) == filled
    assert processes() == 1


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_snapshot_is_explained_and_nothing_of_it_is_run(studio, tmp_path):
    """One that would run code is refused; a real one tells who held the memory, with no log beside it."""
    marker = tmp_path / "it-ran"
    question = studio.post("/api/explain/snapshot", content=pickle.dumps(Hostile(marker))).json()
    assert "refused" in explained(studio, question)["error"]
    assert not marker.exists()

    device = VirtualGPU(64 * MiB, snapshot_history=True)
    with device.active():
        kept = []
        with contextlib.suppress(torch.OutOfMemoryError):
            for _ in range(9):
                kept.append(torch.zeros(8 * MiB, dtype=torch.uint8))
        write_snapshot(device.allocator, tmp_path / "s.pickle")
        held = format_bytes(sum(tensor.nbytes for tensor in kept))
        kept.clear()
    question = studio.post("/api/explain/snapshot", content=(tmp_path / "s.pickle").read_bytes()).json()
    html = explained(studio, question)["html"]
    assert "What held the memory of GPU 0, by the snapshot" in html
    assert "What was held, by who asked for it" in html
    assert f"<td>together</td><td>{held}</td>" in html
    assert "not kept any more" in look(studio, {"snapshot": "../../etc/passwd"})["error"]


@pytest.mark.slow
def test_what_cannot_be_explained_is_said(studio, tmp_path):
    question = studio.post("/api/explain/keep", json={"text": LOG}).json()
    assert "give it again" in look(studio, {"log": "0" * 32})["error"]
    assert "lies outside" in look(studio, {**question, "model": "/etc"})["error"]
    assert studio.post("/api/explain/keep", json={"text": 1}).status_code == 400
    said = until(studio, {**question, "dtype": "no-such"}, lambda said: said["html"] or said["error"])
    assert "no-such is left out" in (said["html"] or said["error"])
