"""Serves the studio on this machine until Ctrl-C."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from oomless.errors import ConfigError
from oomless.studio.server import application

HOST = "127.0.0.1"


def serve(folders: Sequence[Path], port: int, ready: Callable[[str], None], *, open_page: bool) -> None:
    """Serve the studio of ``folders``; ``ready`` is told the address when it answers.

    Raises:
        ConfigError: the port is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used: {error.strerror}; name another --port, or leave it out"
        ) from error
    listening.listen()
    token = secrets.token_urlsafe(24)
    address = f"http://{HOST}:{listening.getsockname()[1]}/#token={token}"
    server = uvicorn.Server(
        uvicorn.Config(
            application(list(folders), token), log_level="error", access_log=False, timeout_graceful_shutdown=1
        )
    )
    ready(address)
    if open_page and _has_screen():
        webbrowser.open(address)  # it waits in the socket until it is answered
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _has_screen() -> bool:
    """Return whether a browser would be a window, and not a program in this terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
