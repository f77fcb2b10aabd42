"""The commands, and how each of them can end."""

from __future__ import annotations

import logging
import re
import sys
import time
from errno import EPIPE
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from oomless import __version__
from oomless.cli import check_gpu, compare, explain, export, generate, plan, rehearse, report, studio, train
from oomless.cli.command import Interrupted, add, interruptible
from oomless.cli.voice import aside, out, speaks
from oomless.errors import TrainingError, UserError
from oomless.units import format_bytes

_DEBUG = "--debug"
_HEARD_SECONDS = 60
"""torchrun ends all processes as soon as one has ended: so long those that are silent leave the word to the one that says why.
One that came to its error by itself and is still there says it after all: the others did not find it."""

app = typer.Typer(
    help="Train language models on the GPU you have, and do not run out of memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
add(app, train.train, train.OPTIONS, train.FIRST, train.EXAMPLES)
add(app, plan.plan, plan.OPTIONS, plan.FIRST, plan.EXAMPLES)
add(app, explain.explain, explain.OPTIONS, explain.FIRST, explain.EXAMPLES)
app.command()(interruptible(rehearse.rehearse))
app.command()(interruptible(export.export))
app.command()(interruptible(report.report))
app.command()(interruptible(generate.generate))
app.command()(interruptible(compare.compare))
app.command()(interruptible(studio.studio))
app.command()(interruptible(check_gpu.check_gpu))


@app.command()
@interruptible
def demo(
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where the demo's files go. [default: a new folder under runs/]", show_default=False),
    ] = None,
) -> None:
    """Train a small model in about two minutes. One that knows Python code learns Python's manual; no network, no data."""
    from oomless.demo import run_demo

    run_demo(out(), output_dir)


def _version(value: bool) -> None:
    if value:
        out().print(f"oomless {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of what goes wrong inside; anywhere on the line.")
    ] = False,
) -> None:
    pass


def run() -> int:
    """Run the command line and return its exit code; what the user got wrong, or a model cannot do, is one message and 2."""
    of_script = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own = sys.argv[1:of_script]
    debug = _DEBUG in own
    arguments = [_DEBUG] * debug + [argument for argument in own if argument != _DEBUG] + sys.argv[of_script:]
    # bitsandbytes, which peft imports, advises every CPU user to install a package that oomless has no use for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except (UserError, TrainingError) as error:
        if debug and error.__cause__ is not None:
            raise
        if not speaks() if error.told is None else error.told:
            time.sleep(_HEARD_SECONDS)
        return _failed(None if error.told else str(error), 2 if isinstance(error, UserError) else 1)
    except Interrupted:
        aside().print("interrupted")
        return 130
    except Exception as error:
        message = None if debug else _told(error)
        if message is None:
            raise
        return _failed(message, 2)
    lost = out().lost
    if lost is not None and getattr(lost, "errno", None) != EPIPE:
        return _failed(f"not all of the answer could be written to standard output: {lost}", 1)
    return code


def _told(error: Exception) -> str | None:
    from oomless.models.blame import blamed

    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        asked = re.search(r"allocate (\d+) bytes", str(error))
        size = f" {format_bytes(int(asked[1]))} were asked for at once:" if asked else ""
        return (
            f"this machine's memory is full:{size} close other programs, or take a smaller model or shorter sequences"
        )
    told = blamed(error)
    return None if told is None else str(told)


def _failed(message: str | None, code: int) -> int:
    if message is not None:
        aside().print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    return code
