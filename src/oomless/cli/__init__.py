"""The command line: parse, call, render; no logic. One file a command."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line, and as early as this, while everything is still being imported."""
    try:
        from oomless.cli.app import run

        code = run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    # Where Ctrl-C met code that Python makes of a string, as of a dataclass, it would end by the signal; this makes it forget that.
    exec("")
    sys.exit(code)
