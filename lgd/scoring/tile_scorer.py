"""Tiles of a slide -> what a network says of them, part by part; this is what a worker of `predict` runs."""

import functools
import itertools
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.base.threads import map_ordered_prefetch
from lgd.io.files import exists
from lgd.io.location import Location
from lgd.models.description import StudentConfig
from lgd.models.student import GRIDS
from lgd.scoring.notes import NO_NUMBER, join_notes
from lgd.scoring.predict import Scorer, load_scorer
from lgd.scoring.slide_parts import ScoredTiles, has_part, list_missing, write_part
from lgd.scoring.slide_plan import PARTS, PlanArrays, SlidePlan, read_arrays
from lgd.scoring.slide_result import finish_slide
from lgd.slides.slide import Slide, open_slide
from lgd.stain.checks import find_notes

if TYPE_CHECKING:
    from tqdm import tqdm

CHUNKS_AT_ONCE = 2
"""Chunks that a worker has in hand: while the result of one is written, the tiles of the next are read already."""
BATCH = {"cpu": 8, "cuda": 64}
"""Tiles in a forward pass."""


class Chunk(NamedTuple):
    """Some tiles of a slide."""

    slide: Path
    mpp: float
    """Micrometres per level-0 pixel that the slide is taken to have."""
    folder: Location
    plan: str
    """Digest of the plan."""
    number: int


class Tile(NamedTuple):
    """A tile as it was read."""

    pixels: np.ndarray | None
    """uint8 (H, W, 3); None where it could not be read."""
    notes: str
    error: str


class TileScorer:
    """Scores chunks; it may be called from several threads, which share its threads and its network."""

    def __init__(self, scorer: Scorer, threads: int, bar: "tqdm[None] | None" = None) -> None:
        assert isinstance(scorer.config, StudentConfig), "a teacher reads the IHC"
        self.scorer, self.config, self.threads, self.bar = scorer, scorer.config, threads, bar
        self.batch = BATCH["cpu" if scorer.device == "cpu" else "cuda"]
        self._turn, self._counting, self._finishing = threading.Lock(), threading.Lock(), threading.Lock()
        self._stopping = threading.Event()

    def __call__(self, chunk: Chunk) -> tuple[Chunk, int]:
        """Write the part of a chunk; gives it back with its number of tiles."""
        plan, arrays = _read_plan(chunk.folder, chunk.plan)
        rows = plan.find_rows(chunk.number)
        if has_part(chunk.folder, chunk.number):
            # A worker wrote it and died before it could say so.
            return chunk, rows.stop - rows.start
        # The threads end before the slide is closed.
        with open_slide(chunk.slide, chunk.mpp) as slide, ThreadPoolExecutor(self.threads) as pool:
            read = functools.partial(_read_tile, slide, plan.inputs.pixels, plan.inputs.tile_mpp)
            places = arrays.xy_n2[rows].tolist()
            scored = list(self._score(map_ordered_prefetch(pool, read, places, count=2 * self.batch)))
            write_part(chunk.folder, chunk.number, ScoredTiles(*map(np.concatenate, zip(*scored, strict=True))))
            self._finish(slide, chunk, plan)
        return chunk, rows.stop - rows.start

    def _finish(self, slide: Slide, chunk: Chunk, plan: SlidePlan) -> None:
        """Write the files of a slide that has no part left to be scored."""
        with self._finishing:
            if not list_missing(chunk.folder, plan) and not exists(chunk.folder / "slide.json"):
                finish_slide(slide, chunk.folder, plan, self.config)

    def _score(self, tiles: Iterator[Tile]) -> Iterator[ScoredTiles]:
        """A batch at a time. Raises `InterruptedError` where the results are not wanted any more."""
        while batch := list(itertools.islice(tiles, self.batch)):
            if self._stopping.is_set():
                raise InterruptedError("scoring was stopped")
            yield self._score_batch(batch)
            if self.bar is not None:
                with self._counting:
                    self.bar.update(len(batch))

    def _score_batch(self, batch: list[Tile]) -> ScoredTiles:
        read_n = np.array([tile.pixels is not None for tile in batch])
        # A stand-in for what could not be read keeps the shapes; its values are not.
        pixels = [tile.pixels for tile in batch if tile.pixels is not None] or [self._blank]
        with self._turn:
            # One batch after the other; meanwhile the threads read the next ones.
            out = self.scorer.score(np.stack(pixels), grids=True)
        output_nK, features_nD = (_fill_rows(out[name], read_n) for name in ("output", "features"))
        notes = [tile.notes for tile in batch]
        if self.config.training.labelled:
            diverged_n = read_n & ~np.isfinite(output_nK).all(1)
            said = NO_NUMBER.format(self.config.training.target.label_word)
            notes = [note or said if lost else note for note, lost in zip(notes, diverged_n, strict=True)]
        absent = np.empty((len(pixels), 0), np.float32)
        grids = {name: _shrink(_fill_rows(out.get(name, absent), read_n)) for name in GRIDS.values()}
        errors = _as_texts([tile.error for tile in batch])
        return ScoredTiles(output_nK, features_nD, _as_texts(notes), errors, **grids)

    @property
    def _blank(self) -> np.ndarray:
        return np.full((self.config.size,) * 2 + (3,), 255, np.uint8)

    def stop(self) -> None:
        """End the calls in other threads at their next batch."""
        self._stopping.set()


def load_tile_scorer(folder: str, code: Collection[str], threads: int, bar: None = None) -> TileScorer:
    """In a worker: the network of a student's folder; it is elsewhere, and its driver has the bar."""
    return TileScorer(load_scorer(folder, code=code), threads, bar)


@functools.lru_cache(maxsize=4)
def _read_plan(folder: Location, digest: str) -> tuple[SlidePlan, PlanArrays]:
    plan = SlidePlan.read(folder / PARTS / "plan.json")
    return plan, read_arrays(folder, plan)


def _read_tile(slide: Slide, pixels: int, mpp: float, place: tuple[int, int]) -> Tile:
    """Read a tile, in any thread; one that is damaged costs its own row."""
    try:
        image_HW3 = slide.read(*place, pixels, pixels, mpp)
    except DataError as error:
        return Tile(None, "", str(error).removeprefix(str(slide.path)).lstrip(": "))
    return Tile(image_HW3, join_notes(find_notes(image_HW3)), "")


def _fill_rows(value_m: np.ndarray, read_n: np.ndarray) -> np.ndarray:
    """The rows (n, ...) of tiles that were read, and NaN for others."""
    value_n = np.full((len(read_n), *value_m.shape[1:]), np.nan, np.float32)
    value_n[read_n] = value_m[: read_n.sum()]
    return value_n


def _shrink(grid_n: np.ndarray) -> np.ndarray:
    """As float16, whose three digits are more than a grid has."""
    most: float = np.finfo(np.float16).max.item()
    return grid_n.clip(max=most).astype(np.float16)


def _as_texts(texts: list[str]) -> np.ndarray:
    """As bytes; NumPy knows no text of no length."""
    return np.array([text.encode() for text in texts], "S500")
