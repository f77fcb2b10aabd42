"""The page and what it asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from json import loads
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from oomless.errors import UserError
from oomless.report.charts import STYLE
from oomless.studio.offers import SETTINGS, offers
from oomless.studio.runs import Runs
from oomless.studio.safety import Safe
from oomless.studio.searches import LOG, Searches

FILES = Path(__file__).parent / "files"
ASKED = {LOG, "model", "gpu", *SETTINGS, "prefer", "tokens", "hours", "host_memory"}
"""What a question may say. None of it is a file, but for a model."""

MOST_BYTES = 8 << 20
"""What is asked is no longer than this."""


def application(folders: list[Path], token: str) -> Safe:
    """Return the studio of ``folders`` for who knows ``token``."""
    runs, searches = Runs(folders), Searches(folders)

    def offered(_: dict[str, Any]) -> dict[str, Any]:
        searches.warm()
        return offers(folders)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        searches.close()

    routes = [
        Route("/", _file("studio.html", "text/html")),
        Route("/studio.js", _file("studio.js", "text/javascript")),
        Route("/studio.css", _style),
        Route("/studio.svg", _file("studio.svg", "image/svg+xml")),
        Route("/api/runs", _asking(lambda _: {"runs": runs.list()})),
        Route("/api/runs/show", _asking(lambda asked: {"html": runs.parts(_texts(asked, "names"))}), methods=["POST"]),
        Route("/api/runs/stop", _asking(lambda asked: runs.stop(_text(asked, "name"))), methods=["POST"]),
        Route("/api/runs/resume", _asking(lambda asked: runs.resume(_text(asked, "name"))), methods=["POST"]),
        Route("/api/explain/keep", _asking(lambda asked: searches.keep(_text(asked, "text"))), methods=["POST"]),
        Route("/api/plan/offers", _asking(offered)),
        Route(
            "/api/plan/look",
            _asking(lambda asked: searches.look(_question(asked), _text(asked, "viewer"))),
            methods=["POST"],
        ),
        Route(
            "/api/plan/leave",
            _asking(lambda asked: searches.leave(_question(asked), _text(asked, "viewer"))),
            methods=["POST"],
        ),
        Route("/api/plan/enough", _asking(lambda asked: searches.enough(_question(asked))), methods=["POST"]),
    ]
    return Safe(
        Starlette(routes=routes, lifespan=lifespan, exception_handlers={UserError: _refused, HTTPException: _not_here}),
        token,
    )


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    content = (FILES / name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def _style(_: Request) -> Response:
    return Response(STYLE + (FILES / "studio.css").read_text(encoding="utf-8"), media_type="text/css")


def _asking(answer: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
    """Return an endpoint that answers with what ``answer`` returns, in a thread, so that none waits for another."""

    async def endpoint(request: Request) -> Response:
        asked: Any = {}
        if request.method == "POST":
            asked = await _asked(request)
        return JSONResponse(await run_sync(answer, asked) or {})

    return endpoint


async def _asked(request: Request) -> dict[str, Any]:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"what is asked is longer than {MOST_BYTES:,} bytes")
    try:
        asked = loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise HTTPException(400, "what is asked is a JSON object")
    return asked


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise HTTPException(400, f"{name} is a text")
    return value


def _texts(asked: dict[str, Any], name: str) -> list[str]:
    values = asked.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise HTTPException(400, f"{name} are texts, at least one")
    return values


def _question(asked: dict[str, Any]) -> dict[str, str]:
    question = asked.get("question")
    if not isinstance(question, dict) or not all(isinstance(value, str) for value in question.values()):
        raise HTTPException(400, "a question is an object of texts")
    unknown = question.keys() - ASKED
    if unknown:
        raise HTTPException(400, f"a plan is not asked for {', '.join(sorted(unknown))}")
    return question


async def _refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=422)


async def _not_here(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
