"""The one way to the terminal: no text is markup, none steers the terminal, and what cannot be written stops no work."""

import io
import re
import subprocess
import sys

import pytest
from rich.text import Text
from tests.cli.test_cli import ENVIRONMENT

from oomless.report.screen import LiveLine, Screen, joined
from oomless.report.tables import Grid

HOSTILE = ["[INST] hello [/INST]", "[/x]", "[bold]name[/]", "a[0].weight", ":smile:", "[link=x]y[/link]", "\\[/b]"]


def screen(width=80, **options):
    return Screen(io.StringIO(), width=width, **options)


def shown(on):
    return on.file._stream.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup(text):
    on = screen(force_terminal=True)
    on.print(text)
    on.say(("error:", "bold red"), f" {text}", indent=2)
    grid = Grid(columns=(text, "size"), title=text)
    grid.add(text, "1", below=text)
    grid.print(on)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown(on)).count(text) == 6
    live = LiveLine(on)
    live.show(Text(text), text)
    live.close()
    assert f"\r\x1b[2K{text}" in shown(on)
    assert "\x1b[?25l" not in shown(on)


def test_no_text_steers_the_terminal():
    on = screen()
    on.print("a\x1b[2Jb\rc\x07d\udcffe\u202ef")
    on.say("\x1b]0;title\x07")
    assert not set(shown(on)) & set("\x1b\r\x07\u202e")
    shown(on).encode("utf-8")


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_keeps_whole_words(width):
    on = screen(width)
    grid = Grid(columns=("module", "parameters", "trainable", "dtype"), title="Parameters")
    words = ("model.layers.*.post_attention_layernorm", "1,234,567,890", "1,234,567,890", "bfloat16")
    grid.add(*words)
    grid.print(on)
    assert all(len(line.rstrip()) <= width for line in shown(on).splitlines())
    for word in " ".join(words).split():
        assert word in shown(on)


@pytest.mark.parametrize("width", range(30, 81, 2))
def test_what_stands_under_a_row_has_the_whole_width_and_no_word_is_cut(width):
    on = screen(width)
    grid = Grid(columns=("choice", "memory", "tokens/s"), numbers=frozenset(("memory", "tokens/s")))
    below = "given up: the body learns through LoRA alone, embed_tokens and lm_head nothing"
    grid.add("  fastest, of all", "12.03 GiB", "1,451-2,635", below=below)
    grid.print(on)
    lines = shown(on).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "…" not in shown(on)
    for word in f"fastest, of all 12.03 GiB 1,451-2,635 {below}".split():
        assert word in shown(on)
    if width == 80:
        assert lines[-1].strip() == below


def test_what_matters_least_goes_first():
    fields = [(0, "step 1/2"), (2, "loss 1"), (1, "left")]
    assert joined(fields, 22) == "step 1/2  loss 1  left"
    assert joined(fields, 21) == "step 1/2  left"
    assert joined(fields, 5) == "step 1/2"


def test_a_log_has_a_line_now_and_then():
    on = screen()
    live = LiveLine(on, silent_s=0)
    for number in range(5):
        live.show(Text("drawn"), f"line {number}", always=number == 4)
    assert shown(on) == "line 0\nline 4\n"


def test_what_cannot_be_written_stops_no_work():
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    on = Screen(Full())
    on.print("first")
    on.print("second")
    assert on.lost.errno == 28


def oomless(redirected):
    command = f"{sys.executable} -m oomless --version {redirected}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one():
    assert (oomless("| true").returncode, oomless("| true").stderr) == (0, "")
    full = oomless("> /dev/full")
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "No space left" in full.stderr
    assert oomless(">&-").returncode == 1
