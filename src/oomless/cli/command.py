"""A command: its own options and one for every setting, and a help that begins with what matters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from oomless.cli.options import options
from oomless.cli.voice import out

Own = tuple[str, Any, Any]
"""An option that is no setting: its name, annotation and default."""

NARROW = 64
"""On a screen with fewer columns what an option means stands below it, not beside it."""


def own(name: str, kind: type, text: str) -> Own:
    """Return an option of a command itself."""
    option = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)
    return (name, Annotated[bool, option], False) if kind is bool else (name, Annotated[kind | None, option], None)


CONFIG = own("config", Path, "YAML with any of the settings; options outrank it.")
AS_GIVEN = own("as_given", bool, "Choose nothing: take the settings given, and the defaults for the rest.")
PREFER = own(
    "prefer", str, "What counts among what fits: quality, balanced (quality for its time) or fast. [default: balanced]"
)
HOST_MEMORY = own(
    "host_memory", str, "Memory of the machine, such as 32GiB, for what may be offloaded. [default: what is free here]"
)


def add(app: typer.Typer, function: Any, own_options: Sequence[Own], first: Sequence[str], examples: str) -> None:
    """Add ``function`` as a command with its own options and one for every setting, those in ``first`` for its short help."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in (*own_options, _HELP_ALL)
    ]

    @wraps(function)
    def command(help_all: bool, **given: Any) -> None:
        function(**given)

    command.__signature__ = inspect.Signature([*parameters, *options()])  # type: ignore[attr-defined]
    app.command(cls=type("Command", (Command,), {"first": first}), epilog=examples)(interruptible(command))


def interruptible(function: Any) -> Any:
    """Return ``function`` with an error of ours for Ctrl-C, at which typer would end the program without a word."""

    @wraps(function)
    def interrupted(**given: Any) -> None:
        try:
            function(**given)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    return interrupted


class Interrupted(Exception):
    """Ctrl-C was pressed."""


class Command(TyperCommand):
    """A command whose help has two lengths."""

    first: Sequence[str] = ()
    """The settings that most runs need."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, short."""
        self.print_help(ctx, everything=False)

    def print_help(self, ctx: Any, *, everything: bool) -> None:
        """Print how the command is used, with the settings that most runs need or with ``everything``."""
        screen, beside = out(), out().width >= NARROW
        own_options: list[Any] = []
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            section = getattr(parameter, "rich_help_panel", None)
            if section is None:
                own_options.append(parameter)
            elif everything or parameter.name in self.first:
                sections.setdefault(section if everything else "Settings", []).append(parameter)
        if not everything:
            sections["Settings"].sort(key=lambda parameter: self.first.index(parameter.name))
        screen.print(
            Text.assemble(("Usage: ", "bold"), ctx.command_path, *(f" {p}" for p in self.collect_usage_pieces(ctx)))
        )
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            screen.print(Padding.indent("\n" + " ".join(paragraph.split()), 2))
        _title(screen, "Examples")
        for line in (self.epilog or "").strip().splitlines():
            screen.print(f"  {line}", style="dim" if line.startswith("#") else None, soft_wrap=True)
        for title, parameters in {**sections, "Options": own_options}.items():
            _title(screen, title)
            screen.print(Padding.indent(_listed(parameters, beside), 2))
        screen.print()
        if everything:
            screen.print("A switch such as --shuffle is turned off by --no-shuffle.")
        else:
            screen.print(f"{ctx.command_path} --help-all lists every setting, by section.")


def _title(screen: Any, text: str) -> None:
    screen.print(Text(f"\n{text}", "bold"))


def _listed(parameters: Sequence[Any], beside: bool) -> Table | Group:
    """Return each option with its meaning, ``beside`` it or below it."""
    rows = [(_name(parameter), " ".join((getattr(parameter, "help", None) or "").split())) for parameter in parameters]
    if not beside:
        return Group(*(part for name, text in rows for part in (Text(name, "cyan"), Padding.indent(text, 4))))
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _name(parameter: Any) -> str:
    return ", ".join(parameter.opts) if parameter.param_type_name == "option" else str(parameter.name).upper()


def _print_everything(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.command.print_help(ctx, everything=True)  # type: ignore[attr-defined]
        raise typer.Exit


_HELP_ALL: Own = (
    "help_all",
    Annotated[
        bool,
        typer.Option(
            "--help-all",
            callback=_print_everything,
            is_eager=True,
            show_default=False,
            help="Show this with every setting.",
        ),
    ],
    False,
)
