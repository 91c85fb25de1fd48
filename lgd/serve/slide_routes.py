"""Urls of whole slides: the list, tiles and overlays for a viewer, the result, its files, and queries of a place."""

import functools
from collections.abc import Callable
from typing import Literal, TypeVar
from urllib.parse import quote

import numpy as np
from anyio.to_thread import run_sync
from fastapi import APIRouter, HTTPException, Response

from lgd.base.errors import DataError
from lgd.io.files import read_bytes
from lgd.models.description import StudentConfig
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slide_plan import find_scale
from lgd.scoring.tile_table import TileTable, read_tiles
from lgd.serve.calls import Jobs, K, Limit, Offset, Place
from lgd.serve.gallery import encode_jpeg
from lgd.serve.names import UnknownName
from lgd.serve.neighbours import Filters
from lgd.serve.network import Network
from lgd.serve.options import ServeOptions
from lgd.serve.overlays import draw_overlay, list_overlays
from lgd.serve.slide_folder import TILE, ListedSlide, Region, SlideFolder, count_levels, explain_slide
from lgd.serve.slide_jobs import REPLACED, SlideState, is_of_slide, read_score
from lgd.slides.slide import Slide

Result = TypeVar("Result")

_FILES = {
    "patches.geojson": "application/geo+json",
    "tiles.csv": "text/csv",
    "heatmap.png": "image/png",
}
_NOT_SCORED = "this slide is not scored yet: POST /slides/ID/score"
_CACHED = {"Cache-Control": "private, max-age=300"}
"""Of pictures: a file that is replaced has the same urls."""
_KEPT = 8
"""Results of which the tiles and the overlays are in memory."""


class SlideRoutes:
    """The urls, of a folder of slides."""

    def __init__(self, options: ServeOptions, network: Network, jobs: Jobs) -> None:
        folder = options.slides_folder
        assert folder is not None, "there are no slides"
        self.network, self.jobs = network, jobs
        self.config = StudentConfig.read_folder(options.student)
        self.scale = find_scale(self.config.training, self.config.size)
        self.slides, self.results = SlideFolder(folder, options.hide_names, self.scale), options.results
        # By the result's digest too, for a result that is made anew.
        self._read_tiles = functools.lru_cache(_KEPT)(self._read_tiles_of)
        self._draw_overlay = functools.lru_cache(4 * _KEPT)(self._draw_overlay_of)

    def make_router(self) -> APIRouter:
        """What answers them."""
        router, one = APIRouter(prefix="/slides"), "/{slide}"
        router.get("", summary="The slides of the folder, and how far each is")(self.list_slides)
        router.get(one, summary="A slide, its result and its overlays")(self.show)
        router.post(f"{one}/score", status_code=202, summary="Have a slide scored")(self.start)
        router.get(f"{one}/tiles/{{level}}/{{column}}_{{row}}.jpg", summary="A tile of the viewer")(self.draw_tile)
        router.get(f"{one}/overlays/{{name}}.png", summary="An overlay, one pixel a cell")(self.draw_overlay)
        router.get(f"{one}/rows", summary="What the network says of each tile")(self.list_rows)
        router.get(f"{one}/region.jpg", summary="The field that a query of a place sees")(self.draw_region)
        router.post(f"{one}/query", summary="The nearest known IHC of a place")(self.query)
        router.get(f"{one}/{{name}}", summary="patches.geojson, tiles.csv or heatmap.png")(self.download)
        return router

    async def list_slides(self) -> list[dict[str, object]]:
        """In the order of their names."""
        states = await self.jobs.list_states()
        listed = await run_sync(self.slides.list_slides)
        return [_show_state(one, states.get(one.id, SlideState("unscored"))) for one in listed]

    async def show(self, slide: str) -> dict[str, object]:
        """Sizes and places are level-0 pixels."""
        listed = await run_sync(self.slides.find, slide)
        state = await self.jobs.get_state(slide)
        return await run_sync(self._describe, listed, state)

    def _describe(self, listed: ListedSlide, state: SlideState) -> dict[str, object]:
        shown = {**_show_state(listed, state), "score": None, "overlays": []}
        try:
            shown |= self.slides.use(listed.id, self._measure)
        except UnknownName:
            raise
        except DataError as error:
            # The page still shows why.
            return shown | {"state": "failed", "problem": explain_slide(error, listed)}
        if state.state == "scored" and (score := read_score(self.results, listed)):
            if not is_of_slide(score, self.results, listed):
                return shown | {"state": "failed", "problem": REPLACED}
            kept = ("answer", "tissue", "tiles", "failed", "blank", "notes", "side", "target")
            shown["score"] = {name: one for name, one in score.document().items() if name in kept}
            overlays = list_overlays(self.results / listed.folder, score, self.config)
            shown["overlays"] = [overlay.as_json() for overlay in overlays]
        return shown

    def _measure(self, slide: Slide) -> dict[str, object]:
        return {
            "width": slide.width,
            "height": slide.height,
            "mpp": slide.mpp,
            "vendor": slide.vendor,
            "tile_size": TILE,
            "max_level": count_levels(slide) - 1,
            "field": slide.find_side(self.scale.pixels, self.scale.mpp),
        }

    async def start(self, slide: str) -> dict[str, object]:
        """One that is scored, or asked for already, stays as it is; one that was left undone is gone on with."""
        await run_sync(self.slides.find, slide)
        await self.jobs.start(slide)
        return await self.show(slide)

    async def draw_tile(self, slide: str, level: int, column: int, row: int) -> Response:
        """`max_level` is full resolution, and each level below it halves the slide; tiles of 512 pixels."""
        if min(level, column, row) < 0 or max(level, column, row) > 10**6:
            raise UnknownName("there is no such tile")
        content = await self._use(slide, self.slides.draw_tile, level, column, row)
        return Response(content, media_type="image/jpeg", headers=_CACHED)

    async def draw_region(self, slide: str, x: Place, y: Place) -> Response:
        """`x` and `y` are its middle."""
        region = await self._use(slide, self.slides.read_region, x, y, self.scale)
        return Response(encode_jpeg(region.pixels), media_type="image/jpeg", headers=_CACHED)

    async def query(self, slide: str, x: Place, y: Place, k: K = 5) -> dict[str, object]:
        """`x` and `y` are the middle of the field. Patches of the slide itself are left out."""
        region: Region = await self._use(slide, self.slides.read_region, x, y, self.scale)
        name = self.slides.find(slide).path.stem.removesuffix(".ome")
        answer = await self.network.query_region(region.pixels, Filters(k=k), name)
        return answer | {"x": region.x, "y": region.y, "side": region.side}

    async def draw_overlay(self, slide: str, name: str) -> Response:
        """As `overlays` of the slide describes it."""
        listed, score = await run_sync(self._find_score, slide)
        content = await run_sync(self._draw_overlay, listed.folder, score.digest, name)
        return Response(content, media_type="image/png", headers={"Cache-Control": "private, no-cache"})

    def _draw_overlay_of(self, folder: str, digest: str, name: str) -> bytes:
        score = SlideScore.read(self.results / folder / "slide.json")
        if name not in [one.name for one in list_overlays(self.results / folder, score, self.config)]:
            raise UnknownName("there is no such overlay: GET /slides/ID lists them")
        content: bytes = draw_overlay(self.results / folder, score, self.config, name)
        return content

    async def list_rows(
        self, slide: str, offset: Offset = 0, limit: Limit = 100, sort: Literal["number", "grade", "-grade"] = "number"
    ) -> dict[str, object]:
        """The tiles of the map as a table; those without a grade are last."""
        listed, score = await run_sync(self._find_score, slide)
        table = await run_sync(self._read_tiles, listed.folder, score.digest)
        order = np.arange(len(table.grade_n))
        if sort != "number":
            # NaN is sorted last.
            order = np.argsort(table.grade_n if sort == "grade" else -table.grade_n, kind="stable")
        rows = [_show_tile(table, score, number) for number in order[offset : offset + limit].tolist()]
        return {"total": len(order), "rows": rows}

    def _read_tiles_of(self, folder: str, digest: str) -> TileTable:
        return read_tiles(self.results / folder, SlideScore.read(self.results / folder / "slide.json"))

    async def download(self, slide: str, name: str) -> Response:
        """What `lgd predict --out` leaves."""
        if name not in _FILES:
            raise UnknownName(f"there are {', '.join(_FILES)}")
        listed, _ = await run_sync(self._find_score, slide)
        content = await run_sync(read_bytes, self.results / listed.folder / name)
        # The name of the folder is of plain letters and signs; with hidden names it is the id.
        shown = slide if self.slides.hide_names else listed.folder
        sent = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(shown)}-{name}"}
        return Response(content, media_type=_FILES[name], headers=sent)

    def _find_score(self, slide: str) -> tuple[ListedSlide, SlideScore]:
        listed = self.slides.find(slide)
        score = read_score(self.results, listed)
        if score is None or score.inputs.model != self.config.digest:
            raise UnknownName(_NOT_SCORED)
        if not is_of_slide(score, self.results, listed):
            raise DataError(REPLACED)
        return listed, score

    async def _use(self, slide: str, work: Callable[..., Result], *arguments: object) -> Result:
        """Some work on a slide, in a thread; an error of a damaged slide names no path."""
        try:
            return await run_sync(functools.partial(work, slide, *arguments))
        except UnknownName:
            raise
        except DataError as error:
            # As it is: a `DataError` would be explained once more, with its options as parameters.
            raise HTTPException(422, explain_slide(error, self.slides.find(slide))) from error


def _show_state(listed: ListedSlide, state: SlideState) -> dict[str, object]:
    return {"id": listed.id, "name": listed.name, **state._asdict()}


def _show_tile(table: TileTable, score: SlideScore, number: int) -> dict[str, object]:
    grade, probability_K = float(table.grade_n[number]), table.probability_nK[number]
    known = bool(np.isfinite(grade))
    x, y = table.xy_n2[number].tolist()
    return {
        "number": number,
        "x": x,
        "y": y,
        "side": score.side,
        "tissue": float(table.tissue_n[number]),
        "label": table.label_n[number],
        "grade": grade if known else None,
        "probabilities": dict(zip(score.target.classes, probability_K.tolist(), strict=False)) if known else {},
        "notes": table.note_n[number],
        "error": table.error_n[number],
    }
