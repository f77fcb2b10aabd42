"""``oomless rehearse``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from oomless.cli.options import gpus_to_compare
from oomless.errors import ConfigError


def rehearse(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="Your own training script.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, after --.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="The GPU to rehearse on, such as T4 or 24GiB.")] = "auto",
    what_if: Annotated[str | None, typer.Option(help="GPUs to compare: gpu=RTX4090,L4.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps to run.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    timeline: Annotated[
        Path | None, typer.Option(help="Write memory over time as .html or .png.", show_default=False)
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Write what PyTorch's memory visualiser opens.", show_default=False)
    ] = None,
) -> None:
    """Run a training script of your own, unchanged, on a GPU that is not there: does it fit, and which line asks for most?

    The script runs in a process of its own. Its models are built from their configs, no weights are read, and nothing of
    yours is written. Example: oomless rehearse train.py --gpu T4 -- --batch-size 4
    """
    if timeline is not None and timeline.suffix not in (".html", ".png"):
        raise ConfigError(f"a timeline is written as .html or .png; got {timeline.name}")
    for path in (timeline, snapshot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    gpus = gpus_to_compare(what_if)
    if gpus and (timeline or snapshot):
        raise ConfigError("a comparison goes without --timeline and --snapshot: rehearse on one of them for these")

    from oomless.cli.voice import out
    from oomless.programs.rehearse import compare_programs, rehearse_program
    from oomless.report.plan import write_timeline
    from oomless.report.program import print_program, print_programs

    if gpus:
        answers = compare_programs(script, gpus, arguments or [], steps=steps)
        if json:
            out().out(dumps([answer.to_dict() for answer in answers], indent=2))
        else:
            print_programs(out(), answers)
        return
    debug = context.find_root().params["debug"]
    answer = rehearse_program(script, gpu, arguments or [], steps=steps, snapshot=snapshot, debug=debug)
    if timeline is not None:
        write_timeline(answer.profile, timeline)
    if json:
        out().out(dumps(answer.to_dict(), indent=2))
    else:
        print_program(out(), answer)
    if not answer.fits:
        raise typer.Exit(1)
