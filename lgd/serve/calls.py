"""What the urls take, and what they need of the process that scores slides, wherever it runs."""

import re
from collections.abc import Sequence
from typing import Annotated, Protocol

from fastapi import Depends, HTTPException, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import AfterValidator

from lgd.base.text import escape_text
from lgd.scoring.images import Mpp
from lgd.serve.slide_jobs import SlideState

_MOST_NEIGHBOURS = 50
_MPP = re.compile(r"[0-9]{1,3}(\.[0-9]{1,12})?", re.ASCII)

K = Annotated[int, Query(ge=1, le=_MOST_NEIGHBOURS, description="Neighbours.")]
Offset = Annotated[int, Query(ge=0, le=10**9, description="How many are left out before.")]
Limit = Annotated[int, Query(ge=1, le=500, description="How many are given.")]
Place = Annotated[float, Query(ge=0, le=10**9, allow_inf_nan=False, description="Level-0 pixels.")]
Names = Annotated[str, Query(max_length=500, description="Names, separated by commas.")]


def _check_mpp(text: str) -> str:
    if text in ("", "unknown") or (_MPP.fullmatch(text) and float(text)):
        return text
    raise ValueError("give micrometres per pixel, such as 0.46, or unknown")


ImageMpp = Annotated[
    str,
    AfterValidator(_check_mpp),
    Query(description="Micrometres per pixel, such as 0.46, or unknown; nothing for a patch of the training's size."),
]


def read_mpp(text: str) -> Mpp:
    """What a request says of an image's scale."""
    return "unknown" if text == "unknown" else float(text) if text else None


async def read_image(request: Request) -> bytes:
    """The body of a request, whatever its media type says; raises `HTTPException` for what is no single file."""
    content = await request.body()
    kind = request.headers.get("content-type", "")
    if not content or kind.startswith("multipart/"):
        what = "a form" if content else "no image"
        raise HTTPException(422, f"the body is {what}: send the image file itself, such as by curl --data-binary @FILE")
    return content


ImageBody = Annotated[bytes, Depends(read_image)]
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "description": "An image file: JPEG, PNG, WebP, TIFF, BMP or JPEG 2000.",
    }
}
"""What the documentation says of it."""


def _list_parameters(dependant: Dependant) -> list[str]:
    """What a url takes after the `?`."""
    below = [name for one in dependant.dependencies for name in _list_parameters(one)]
    return [*(one.alias for one in dependant.query_params), *below]


def refuse_unknown_parameters(request: Request) -> None:
    """Raise `HTTPException` for a parameter after the `?` that the url does not have, which would be passed over."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = _list_parameters(route.dependant)
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        there = f"there are {', '.join(known)}" if known else "this url has none"
        raise HTTPException(422, escape_text(f"there is no parameter {', '.join(unknown)}: {there}", 500))


class Jobs(Protocol):
    """The scoring of slides."""

    async def list_states(self) -> dict[str, SlideState]:
        """How far each slide is, by its id."""
        ...

    async def get_state(self, identity: str) -> SlideState:
        """How far a slide is."""
        ...

    async def start(self, identity: str) -> SlideState:
        """Have a slide scored."""
        ...


def split_names(text: str) -> Sequence[str] | None:
    """Names that a comma separates; None where there are none."""
    return text.split(",") if text else None
