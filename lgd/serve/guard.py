"""What stands between the network and the routes: the token, the bounds of a body, and what a browser may do.

Ray's own token guards its dashboard and jobs, and not the port of Ray Serve, which has no bound of a body either.
"""

import asyncio
import contextlib
import hmac
import os
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from lgd.serve.options import DEFAULT_MB

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health", "/docs", "/openapi.json")
"""What is answered without the token, beside what lies below `OPEN_FOLDERS`: it holds nothing of slides or patches."""
OPEN_FOLDERS = ("/static/", "/docs/")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_SECONDS = 60.0
"""In which a body must be there."""
_PAUSE_SECONDS = 2.0
"""After which who sends nothing gets the answer to a body of which something is left."""
_MAX_MB = "LGD_SERVE_MAX_MB"
"""Names the variable that the proxy reads."""

_PAGE = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
_POLICY = _PAGE + "frame-ancestors 'none'"
# The page of FastAPI has a script and styles in it.
_DOCS_POLICY = _POLICY + "; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
_SENT = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class BodyBound:
    """An ASGI application around another one, which refuses a body that is too large, or too slow.

    Where it runs in Ray Serve's proxy, such a body is never held; one that runs behind it alone is given what the proxy
    has read meanwhile.
    """

    def __init__(self, app: "ASGIApp", most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 15:
            await _refuse(400, "Content-Length is no length")(scope, receive, send)
            return
        if "content-length" in headers and "transfer-encoding" in headers:
            # Programs differ in where such a request ends.
            await _refuse(400, "give Content-Length or Transfer-Encoding, and not both")(scope, receive, send)
            return
        body = _Body(receive, self.most, headers)
        if int(length) > self.most:
            await body.skip()
            await body.too_large(scope, receive, send)
            return
        answered = False

        async def send_unless_refused(message: "Message") -> None:
            nonlocal answered
            if not body.refused or answered:
                answered = True
                await body.skip()
                await send(message)

        try:
            await self.app(scope, body.receive, send_unless_refused)
        except Exception:
            if not body.refused:
                raise
        if body.refused and not answered:
            await body.skip()
            await body.refused(scope, receive, send)


class _Body:
    """The body of a request; where it is refused, the application sees that the one who asked has gone."""

    def __init__(self, receive: "Receive", most: int, headers: Headers) -> None:
        self._receive, self._left, self._done = receive, most, False
        self._ends = asyncio.get_running_loop().time() + BODY_SECONDS
        remedy = "start the service with a larger --max-mb"
        self.too_large = _refuse(413, f"the body is larger than {most // 10**6} MB, the most that is taken: {remedy}")
        self.refused: JSONResponse | None = None
        self._has_body = "content-length" in headers or "transfer-encoding" in headers
        # Who waits for 100 sends nothing before the body is asked for.
        self._comes = self._has_body and headers.get("expect", "").lower() != "100-continue"
        # Ray Serve's proxy reads while the answer is sent: of two that wait for one message, one would wait in vain.
        self._reading = asyncio.Lock()

    async def receive(self) -> "Message":
        if self._done:
            # Only whether the one who asked has gone.
            return await self._receive()
        self._comes = self._has_body
        try:
            async with asyncio.timeout_at(self._ends), self._reading:
                return await self._gather()
        except TimeoutError:
            self.refused = _refuse(408, f"the body did not come within {BODY_SECONDS:.0f} seconds")
            return {"type": "http.disconnect"}

    async def _gather(self) -> "Message":
        """The body as one message: Ray Serve fetches each one that waits from the proxy by a call of its own."""
        parts = list[bytes]()
        while True:
            message = await self._receive()
            self._done = _ends(message)
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            self._left -= len(parts[-1])
            if self._left < 0:
                self.refused = self.too_large
                return {"type": "http.disconnect"}
            if self._done:
                return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    async def skip(self) -> None:
        """Throw away what is left, as it comes: who still sends would not read an answer, and closing would lose it."""
        now = asyncio.get_running_loop().time
        with contextlib.suppress(TimeoutError):
            while self._comes and not self._done:
                async with asyncio.timeout_at(min(self._ends, now() + _PAUSE_SECONDS)), self._reading:
                    self._done = self._done or _ends(await self._receive())


def _ends(message: "Message") -> bool:
    return message["type"] != "http.request" or not message.get("more_body", False)


def _refuse(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


def bound_proxy() -> list[Middleware]:
    """What Ray Serve's proxy puts in front of all applications, where `make_proxy_variables` names it.

    Its connections are those of `lgd.serve.connections` from then on.
    """
    from uvicorn import config

    # Ray passes uvicorn no protocol.
    config.HTTP_PROTOCOLS["auto"] = "lgd.serve.connections:BoundedProtocol"
    return [Middleware(BodyBound, most=int(os.environ.get(_MAX_MB, DEFAULT_MB)) * 10**6)]


def make_proxy_variables(max_mb: int) -> dict[str, str]:
    """The environment of Ray's processes in which its proxy bounds bodies."""
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:{bound_proxy.__name__}", _MAX_MB: str(max_mb)}


class Guard:
    """An ASGI application around another one, which asks for the token, and limits what a browser may do.

    Args:
        app: The application.
        token: What a request must bear; without one only requests to a loopback address are answered, of which none may
            come from the page of another site.
    """

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            # Web sockets are not spoken here.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SENT | {"Content-Security-Policy": _DOCS_POLICY if path == "/docs" else _POLICY})
                # A slide is its patient's: only the browser that was given it keeps it.
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if refused := self._check(Headers(scope=scope), scope["method"], path):
            await refused(scope, receive, send_guarded)
        else:
            await self.app(scope, receive, send_guarded)

    def _check(self, headers: Headers, method: str, path: str) -> JSONResponse | None:
        """Why a request is not answered."""
        if not self.token:
            return _check_origin(headers, method)
        if path in OPEN or path.startswith(OPEN_FOLDERS):
            return None
        what = "this token is wrong: give the" if "authorization" in headers else "give the"
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        detail = f"{what} token of this service: Authorization: Bearer TOKEN"
        return JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})


def _check_origin(headers: Headers, method: str) -> JSONResponse | None:
    """Without a token: a page of another site must neither ask by its user's browser, nor pass for this one (DNS)."""
    host = headers.get("host", "")
    if _name_host(host) not in LOOPBACK:
        detail = "without a token this service answers to 127.0.0.1 and localhost only"
        return JSONResponse({"detail": detail}, 400)
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return JSONResponse({"detail": "a page of another site may not ask this service"}, 403)
    return None


def _name_host(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
