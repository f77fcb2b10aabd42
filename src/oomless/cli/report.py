"""``oomless report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oomless.errors import ConfigError


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, over or still going on.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page to write. [default: RUN/report.html]", show_default=False),
    ] = None,
) -> None:
    """Write a run as one page to look at or to mail: loss, evaluation, speed, memory against its prediction, recoveries, settings.

    The page needs no network and holds no script. Example: oomless report runs/first
    """
    from oomless.cli.options import require_writable
    from oomless.cli.voice import out
    from oomless.report.run import read_run, run_page, summary
    from oomless.training.checkpoint import write_atomically

    logged = read_run(run)
    path = run / "report.html" if output is None else output
    require_writable(path)
    try:
        write_atomically(path, run_page(logged))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}: make room, or name another --output"
        ) from error
    for line in summary(logged):
        out().print(line)
    out().print(f"written: {path}", soft_wrap=True)
