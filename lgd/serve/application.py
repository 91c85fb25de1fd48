"""The service as an ASGI application: its page, its urls and its errors.

GET  /, /static/...         the page           GET  /health, /docs
GET  /model                                    what there is to ask
POST /predict, /query                          an image as the body
GET  /patches, /patches/ID/he.jpg, ihc.jpg     the patches of the store    POST /patches/ID/query
GET  /slides, /slides/ID/...                   the slides of the folder    POST /slides/ID/score, /slides/ID/query
"""

import http
import importlib.resources
import logging
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import lgd
from lgd.base.errors import ConfigError, DataError
from lgd.base.text import escape_text
from lgd.serve.calls import Jobs, refuse_unknown_parameters
from lgd.serve.guard import BodyBound, Guard
from lgd.serve.messages import SEE_LOG, explain
from lgd.serve.names import UnknownName
from lgd.serve.network import Network, TooManyError
from lgd.serve.options import ServeOptions
from lgd.serve.patch_routes import PatchRoutes
from lgd.serve.slide_routes import SlideRoutes

logger = logging.getLogger(__name__)

_STATIC = Path(str(importlib.resources.files("lgd.serve") / "static"))


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def create_app(options: ServeOptions, token: str, network: Network, jobs: Jobs | None) -> FastAPI:
    """The application; without `jobs` it has no slides."""
    app = fastapi_offline.FastAPIOffline(
        redoc_url=None,
        static_url="/docs/static",
        title="LGD",
        version=lgd.__version__,
        description="Scores from H&E alone, and the nearest known IHC. Errors are `{detail: sentence}`.",
        responses={status: {"model": Problem, "description": "What is wrong"} for status in (404, 422)},
        # `Guard` asks for the token; this gives the page of the urls a field for it.
        dependencies=[Depends(refuse_unknown_parameters), *([Depends(HTTPBearer(auto_error=False))] if token else [])],
    )
    app.include_router(_make_page())
    app.include_router(PatchRoutes(network).make_router())
    app.include_router(_make_no_slides() if jobs is None else SlideRoutes(options, network, jobs).make_router())
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    store = "" if network.gallery is None else str(network.gallery.store.folder)
    paths = {str(options.student): "the network", store: "the store"}

    def answer_error(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, UnknownName):
            return JSONResponse({"detail": str(error)}, 404)
        if isinstance(error, TooManyError):
            return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})
        if isinstance(error, ConfigError | DataError):
            logger.warning("%s %s: %s", request.method, request.url.path, error)
            return JSONResponse({"detail": explain(error, paths)}, 422)
        logger.error("%s %s", request.method, request.url.path, exc_info=error)
        return JSONResponse({"detail": SEE_LOG}, 500)

    for kind in (ConfigError, DataError, TooManyError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(404, _answer_unknown_url)
    app.add_exception_handler(405, _answer_unknown_url)
    # The last one stands in front.
    app.add_middleware(BodyBound, most=options.max_mb * 10**6)
    app.add_middleware(Guard, token=token)
    return app


def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    """One sentence, in place of FastAPI's list."""
    assert isinstance(error, RequestValidationError)
    parts = []
    for one in error.errors():
        name = ".".join(map(str, one["loc"][1:])) or "body"
        missing = one["type"] == "missing"
        parts.append(f"{name} is missing" if missing else f"{name}: {one['msg'].removeprefix('Value error, ')}")
    return JSONResponse({"detail": escape_text("; ".join(parts), 500)}, 422)


def _answer_unknown_url(request: Request, error: Exception) -> JSONResponse:
    """In place of two words; what an answer of the service itself says stays."""
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == http.HTTPStatus(error.status_code).phrase:
        detail = "there is no such url" if error.status_code == 404 else "this url takes another method"
        detail += ": the page /docs lists all"
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


def _make_no_slides() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/slides", methods=["GET", "POST"])
    @router.api_route("/slides/{rest:path}", methods=["GET", "POST"])
    async def explain_no_slides(rest: str = "") -> None:
        raise UnknownName("this service was started without --slides, and has no slide: start it with --slides FOLDER")

    return router


def _make_page() -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        return FileResponse(_STATIC / "index.html")

    @router.get("/health", summary="Whether the service answers")
    async def check_health() -> dict[str, str]:
        return {"status": "ok", "version": lgd.__version__}

    return router
