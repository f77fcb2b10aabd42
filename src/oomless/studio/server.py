"""The page and what it asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
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
from oomless.studio.searches import Searches
from oomless.studio.worker import LOG, RUN, SNAPSHOT
from oomless.units import format_bytes

FILES = Path(__file__).parent / "files"
ASKED = {LOG, SNAPSHOT, "model", "gpu", *SETTINGS, "prefer", "tokens", "hours", "host_memory", RUN, "texts", "no_loss"}
"""What a question may say. None of it is a file, but for a model."""

MOST_BYTES = 8 << 20
"""What is asked is no longer than this."""

MOST_SNAPSHOT_BYTES = 1 << 30


def application(folders: list[Path], token: str, names: Collection[str] = ()) -> Safe:
    """Return the studio of ``folders`` for who knows ``token`` and asks by an address, as localhost, or by one of ``names``."""
    runs = Runs(folders)
    searches = Searches(folders, runs.path)

    def offered(_: dict[str, Any]) -> dict[str, Any]:
        searches.warm()
        return offers(folders)

    def begun(asked: dict[str, Any]) -> dict[str, Any]:
        """Begin a run from the pick of a plan."""
        given = asked.get("given")
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise HTTPException(400, "what is given to a run are texts")
        training = searches.training_of(_question(asked))
        return {"name": runs.begin(_text(asked, "name"), training["settings"], given, training["gpus"])}

    async def snapshot_given(request: Request) -> Response:
        path, size = searches.place_for_snapshot(), 0
        try:
            with path.open("wb") as file:
                async for piece in request.stream():
                    size += len(piece)
                    if size > MOST_SNAPSHOT_BYTES:
                        raise HTTPException(
                            413, f"a snapshot is at most {format_bytes(MOST_SNAPSHOT_BYTES)} here; use oomless explain"
                        )
                    await run_sync(file.write, piece)
        except BaseException:
            path.unlink()
            raise
        return JSONResponse(searches.keep_snapshot(path))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        searches.close()

    routes = [
        Route("/", _file("studio.html", "text/html")),
        Route("/studio.js", _file("studio.js", "text/javascript")),
        Route("/studio.css", _style),
        Route("/studio.svg", _file("studio.svg", "image/svg+xml")),
        Route("/api/runs", _asking(lambda _: {"runs": runs.listed()})),
        Route("/api/runs/show", _asking(lambda asked: {"html": runs.parts(_texts(asked, "names"))}), methods=["POST"]),
        Route("/api/runs/stop", _asking(lambda asked: runs.stop(_text(asked, "name"))), methods=["POST"]),
        Route("/api/runs/resume", _asking(lambda asked: runs.resume(_text(asked, "name"))), methods=["POST"]),
        Route("/api/runs/begin", _asking(begun), methods=["POST"]),
        Route("/api/compare", _asking(lambda _: {"runs": runs.compared()})),
        Route(
            "/api/compare/show",
            _asking(lambda asked: {"html": runs.comparison(_text(asked, "name"))}),
            methods=["POST"],
        ),
        Route("/api/explain/keep", _asking(lambda asked: searches.keep(_text(asked, "text"))), methods=["POST"]),
        Route("/api/explain/snapshot", snapshot_given, methods=["POST"]),
        Route("/api/plan/offers", _asking(offered)),
        Route(
            "/api/look",
            _asking(lambda asked: searches.look(_question(asked), _text(asked, "viewer"))),
            methods=["POST"],
        ),
        Route(
            "/api/leave",
            _asking(lambda asked: searches.leave(_question(asked), _text(asked, "viewer"))),
            methods=["POST"],
        ),
        Route("/api/enough", _asking(lambda asked: searches.enough(_question(asked))), methods=["POST"]),
    ]
    return Safe(
        Starlette(routes=routes, lifespan=lifespan, exception_handlers={UserError: _refused, HTTPException: _not_here}),
        token,
        names,
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
        raise HTTPException(400, f"nothing is asked for {', '.join(sorted(unknown))}")
    return question


async def _refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=422)


async def _not_here(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
