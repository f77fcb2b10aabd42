"""Who may ask: this machine's own browser, in the page that was opened with the token.

The token comes after the ``#`` of the address, which a browser never sends, and is kept by the page, which puts it into a header. So no other
page can ask for anything: it does not know the token, and a browser adds none by itself as it would a cookie. A name that leads here from
outside (DNS rebinding) is refused by the ``Host``, which is an address or a name that the studio knows to be its own; another page's request by
its ``Origin``.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from ipaddress import ip_address
from typing import Any

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TOKEN = "x-oomless-token"
_PORT = re.compile(r":\d{1,5}$")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Safe:
    """An application that only those may ask who may; every answer carries what keeps a browser from more."""

    def __init__(self, app: Any, token: str, names: Collection[str]) -> None:
        """Guard ``app``, which is asked by one of ``names`` or an address; under ``/api/`` the ``token`` is asked for."""
        self.app, self.token, self.names = app, token, {"localhost", *names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        refused = self._refused(scope)
        answer = self.app if refused is None else JSONResponse({"error": refused}, status_code=403)
        await answer(scope, receive, sending)

    def _is_own(self, host: str) -> bool:
        try:
            return host in self.names or bool(ip_address(host.strip("[]")))
        except ValueError:
            return False

    def _refused(self, scope: Scope) -> str | None:
        """Return why ``scope`` is not answered."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_own(_PORT.sub("", host)):
            return f"the studio answers to the address that it printed; got {host!r}"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return f"another page may not ask; this one is of {origin!r}"
        known = hmac.compare_digest(headers.get(TOKEN, "").encode("latin-1"), self.token.encode())
        if scope["path"].startswith("/api/") and not known:
            return "this page does not know the token: open the address that oomless studio printed"
        return None
