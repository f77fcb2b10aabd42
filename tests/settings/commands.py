"""The commands, run in this process as ``python -m oomless`` would run them."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from unittest.mock import patch

from oomless import cli
from oomless.cli import voice
from oomless.training import loop


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def flags(settings, **places):
    """``settings`` as options of the command line; ``{model}`` and the like stand for ``places``."""
    found = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found += [f"--{flag}", str(value).format(**places) if isinstance(value, str) else str(value)]
    return found


def oomless(*arguments):
    """Return what a command said, whatever it raised; what no command may raise goes on."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    for screen in (voice.out, voice.aside):
        screen.cache_clear()
    with (
        patch.object(sys, "argv", ["oomless", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for screen in (voice.out, voice.aside):
                screen.cache_clear()
    return Said(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def devices():
    """Collect the devices that runs open meanwhile."""
    opened, open_device = [], loop.open_device
    with patch.object(loop, "open_device", lambda name: opened.append(open_device(name)) or opened[-1]):
        yield opened
