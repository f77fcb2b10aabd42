"""A terminal for a command: a pseudo-terminal with an emulator behind it, and every screen that it showed."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte

from tests.cli.test_cli import ENVIRONMENT

LINES = 200


class Terminal:
    """Runs a command on a screen of ``columns``, with more in its ``environment``."""

    def __init__(self, *arguments, columns=80, **environment):
        self.screen = pyte.Screen(columns, LINES)
        self._stream = pyte.ByteStream(self.screen)
        self.frames = []
        self._master, side = os.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
        usual = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oomless", *map(str, arguments)],
            stdin=side,
            stdout=side,
            stderr=side,
            env=usual | {"TERM": "xterm-256color"} | {name: str(value) for name, value in environment.items()},
            start_new_session=True,
        )
        os.close(side)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def lines(self):
        """What stands on the screen."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def text(self):
        """What stands on the screen, without its line ends."""
        return " ".join(" ".join(self.lines()).split())

    def run(self, until=None, limit_s=240):
        """Go on until ``until`` says so of the screen, or to the end; return the exit code."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # the other side is closed
                data = b""
            if not data:
                return self.process.wait(timeout=60)
            for part in data.splitlines(keepends=True):
                self._stream.feed(part)
                self.frames.append(self.lines())
            if until is not None and any(until(line) for line in self.lines()):
                return None
        raise AssertionError(f"not in {limit_s} s: {self.lines()}")

    def press_ctrl_c(self):
        """What a terminal does: every process that runs in it hears of it."""
        os.killpg(self.process.pid, signal.SIGINT)
