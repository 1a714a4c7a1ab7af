"""The HTTP interface of the page: requests, their limits, and answers."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlp_jax.errors import UserError
from vlp_jax.serve.explorer import Explorer

PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
Endpoint = Callable[[Request], Awaitable[Response]]
MAX_JSON = 1 << 20  # bytes of a request without an image
DEFAULT_COUNT = 24

# Nothing from elsewhere is loaded, run or framed, whatever a file name or a text may contain.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class TooLarge(Exception):
    """A request with more bytes than are accepted."""


def make_app(explorer: Explorer, hosts: list[str], max_upload: int) -> Starlette:
    """Builds the application, which takes at most `max_upload` bytes of an image.

    It refuses names other than `hosts`: a page elsewhere could let its own name point here and
    read the answers (DNS rebinding).
    """
    endpoints = Endpoints(explorer, max_upload)
    files = [Route(path, functools.partial(_file, *file)) for path, file in FILES.items()]
    return Starlette(
        routes=[
            *files,
            *(
                Route(path, _answering(endpoint), methods=[method])
                for path, endpoint, method in (
                    ("/api/about", endpoints.about, "GET"),
                    ("/api/search", endpoints.search, "POST"),
                    ("/api/look", endpoints.look, "POST"),
                    ("/api/look/{number:int}", endpoints.look_at_known, "POST"),
                    ("/api/compare", endpoints.compare, "POST"),
                    ("/api/heat_map", endpoints.heat_map, "POST"),
                    ("/thumbnail/{number:int}", endpoints.thumbnail, "GET"),
                )
            ),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(Guarded),
        ],
    )


class Guarded:
    """Adds the headers, and refuses requests that the page of another site makes a browser send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        origin = request.headers.get("origin")
        # A browser sends the origin with every POST; other programs need not.
        own = (f"http://{request.headers.get('host')}", f"https://{request.headers.get('host')}")
        if request.method == "POST" and origin is not None and origin not in own:
            response: ASGIApp = _error(f"requests from {origin} are not answered", 403)
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _answering(endpoint: Endpoint) -> Endpoint:
    """Turns mistakes of the user into an answer that the page shows."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except UserError as error:
            return _error(str(error), 400)
        except TooLarge as error:
            return _error(str(error), 413)
        except ClientDisconnect:  # nobody is left to be told
            return Response(status_code=204)

    return answer


class Endpoints:
    """The answers to requests. The model computes in threads, so the page stays responsive."""

    def __init__(self, explorer: Explorer, max_upload: int) -> None:
        self._explorer, self._max_upload = explorer, max_upload

    async def about(self, request: Request) -> Response:
        """Answers with `Explorer.about` and the limit of an upload in bytes."""
        del request
        return JSONResponse({**self._explorer.about(), "max_upload": self._max_upload})

    async def search(self, request: Request) -> Response:
        """Answers {"text", "count"} with `Explorer.search`."""
        asked = await _json(request)
        count = asked.get("count", DEFAULT_COUNT)
        return await _in_thread(self._explorer.search, asked.get("text"), count)

    async def look(self, request: Request) -> Response:
        """Answers the bytes of an image file with `Explorer.look`."""
        content = await _body(request, self._max_upload)
        if not content:
            raise UserError("the file is empty")
        return await _in_thread(self._explorer.look, content, DEFAULT_COUNT)

    async def look_at_known(self, request: Request) -> Response:
        """Answers with `Explorer.look` at an image of the index."""
        number = request.path_params["number"]
        return await _in_thread(self._explorer.look_at_known, number, DEFAULT_COUNT)

    async def compare(self, request: Request) -> Response:
        """Answers {"key", "texts"} with `Explorer.compare`."""
        asked = await _json(request)
        return await _in_thread(self._explorer.compare, asked.get("key"), asked.get("texts"))

    async def heat_map(self, request: Request) -> Response:
        """Answers {"key", "text"} with a PNG."""
        asked = await _json(request)
        draw = self._explorer.heat_map
        content = await run_in_threadpool(draw, asked.get("key"), asked.get("text"))
        return Response(content, media_type="image/png")

    async def thumbnail(self, request: Request) -> Response:
        """Answers with a WebP of an image of the index."""
        number = request.path_params["number"]
        content = await run_in_threadpool(self._explorer.thumbnail, number)
        return Response(content, media_type="image/webp")


async def _file(name: str, kind: str, request: Request) -> Response:
    del request
    return Response((PAGE / name).read_bytes(), media_type=kind)


async def _in_thread(function: Callable[..., dict[str, Any]], *args: Any) -> Response:
    return JSONResponse(await run_in_threadpool(function, *args))


async def _body(request: Request, limit: int) -> bytes:
    """Reads the body of a request, and never holds more than `limit` bytes of it."""
    message = f"the file has more than {limit / 2**20:.0f} MiB, the most that is accepted"
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > limit:
        raise TooLarge(message)
    content = bytearray()
    # A sender may announce fewer bytes than it sends.
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise TooLarge(message)
    return bytes(content)


async def _json(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":  # a form of another site cannot send this type
        raise UserError("send JSON, with Content-Type: application/json")
    asked = None
    with contextlib.suppress(ValueError):
        asked = json.loads(await _body(request, MAX_JSON))
    if not isinstance(asked, dict):
        raise UserError("send a JSON object")
    return asked


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
