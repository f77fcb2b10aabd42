"""``oomless studio``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oomless.errors import ConfigError


def studio(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with runs and models; no other is looked at. [default: this one]", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 0,
    host: Annotated[
        str, typer.Option(help="Who may reach it: this machine alone, or with 0.0.0.0 every machine that can.")
    ] = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Plan, watch runs and explain logs in a browser on this machine: live curves, memory against its prediction; stop and resume. Ctrl-C closes it.

    A run goes on when the studio is closed. Example: oomless studio runs
    """
    from oomless.cli.voice import out

    try:
        from oomless.studio.serve import serve
    except ImportError as error:
        raise ConfigError(f"oomless studio needs {error.name}: install oomless[studio]") from error
    given = [folder.expanduser().resolve() for folder in folders or [Path()]]
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"the studio looks at folders; {folder} is none: name one that is there")
    given = [one for one in dict.fromkeys(given) if not any(other in one.parents for other in given)]

    def ready(address: str) -> None:
        out().print(f"the studio is at {address}", soft_wrap=True)
        out().print("Only who has this address can use it. Ctrl-C closes it; runs go on.", style="dim")
        if host not in ("127.0.0.1", "localhost", "::1"):
            out().print(
                "It is not encrypted: whoever reads this network has the address too. ssh -L is safer (docs/studio.md).",
                style="bold",
            )

    serve(given, host, port, ready, open_page=open_page)
