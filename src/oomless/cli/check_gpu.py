"""``oomless check-gpu``."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from oomless.errors import ConfigError


def check_gpu(
    gpu: Annotated[str, typer.Option(help="auto, cuda:1, or a virtual one such as virtual:4GiB.")] = "auto",
    minutes: Annotated[float, typer.Option(help="No further training is begun after so many.")] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Compare what oomless predicts with what this GPU does, once: memory, kernels, speed. Nothing is downloaded.

    What it measures is kept, and from then on plans and runs on a GPU of this name use it and say so. On a virtual GPU it tries
    itself, with tiny models, and keeps nothing. Example: oomless check-gpu
    """
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"minutes must be above 0; got {minutes:g}")

    from oomless.calibration.check import check
    from oomless.catalogue import calibration
    from oomless.cli.voice import aside, out
    from oomless.planning.plan import target_for
    from oomless.report.calibration import print_checked
    from oomless.training.assemble import open_device

    device = open_device(gpu)
    if device.capacity_bytes is None:
        raise ConfigError(
            f"check-gpu is for a GPU, and {'none is here' if gpu == 'auto' else 'the CPU is none'}: "
            "--gpu virtual:4GiB tries the check itself on the CPU"
        )
    target = target_for(gpu if gpu.startswith("virtual:") else "auto")
    found = check(device, target, seconds=60 * minutes, heard=lambda part: aside().print(part, style="dim"))
    kept = None if found.calibration is None else calibration.keep(found.calibration)
    if json:
        out().out(dumps({**found.to_dict(), "kept": kept}, indent=2))
    else:
        print_checked(out(), found)
        if found.calibration is not None:
            where = kept or "nowhere, for the user's cache folder cannot be written"
            out().print(f"kept for plans and runs on {found.gpu}: {where}", soft_wrap=True)
    if not found.right:
        raise typer.Exit(1)
