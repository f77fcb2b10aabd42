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

ANY = ("0.0.0.0", "::")


def serve(folders: Sequence[Path], host: str, port: int, ready: Callable[[str], None], *, open_page: bool) -> None:
    """Serve the studio of ``folders`` on ``host``; ``ready`` is told the address when it answers.

    Raises:
        ConfigError: there is no such host here, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used: {error.strerror}; name another --port or --host, or leave them out"
        ) from error
    token, name = secrets.token_urlsafe(24), socket.gethostname() if host in ANY else host
    shown = f"[{name}]" if ":" in name else name
    address = f"http://{shown}:{listening.getsockname()[1]}/#token={token}"
    server = uvicorn.Server(
        uvicorn.Config(
            application(list(folders), token, [name]), log_level="error", access_log=False, timeout_graceful_shutdown=1
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
