"""What the service says of images: the network, and the store that it asks, opened once in a process.

Nothing here knows Ray or HTTP.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.config_files import is_run
from lgd.io.location import as_location
from lgd.models.description import StudentConfig
from lgd.models.methods import find_method
from lgd.retrieval.answers import Stored
from lgd.retrieval.queries import open_latents
from lgd.scoring import slide_rows
from lgd.scoring.images import Fitted, MemoryImage, Mpp, read_fitted, upright_size
from lgd.scoring.label_sets import name_set
from lgd.scoring.notes import NO_LABELS, VIRTUAL
from lgd.scoring.predict import Prediction, Scorer, load_scorer, make_prediction
from lgd.serve.batches import Batches
from lgd.serve.gallery import StoreGallery
from lgd.serve.neighbours import Filters, NeighbourFinder
from lgd.serve.options import ServeOptions
from lgd.stain.checks import NEARLY_BLANK, NO_HE
from lgd.store.store import Store

NAME = "image"
"""What an image of a request is called in messages."""
Values = dict[str, np.ndarray]
"""A row of what `Scorer.score` gives."""
_BATCH = 16
MOST_REQUESTS = 200
"""That are in hand at a time; more are refused."""
NO_STORE = (
    "there is no feature store, or the network hallucinates no latents, so there is nothing to query: start the "
    "service with --store, and with a network such as LGD-Net"
)


def open_store(options: ServeOptions, config: StudentConfig) -> Store | None:
    """The store that queries search; None where the network asks none, or there is none in its run.

    Raises `DataError` for a store that is named and cannot be used.
    """
    if find_method(config.method).retrieves_by != "latents":
        return None
    folder = options.store or (options.model if is_run(as_location(options.model)) else "")
    if not folder:
        return None
    return open_latents(config, folder, options.teacher or None)


class TooManyError(Exception):
    """So many requests are in hand that another one would only wait."""


class Network:
    """The student, ready to score and to query; its coroutines are those of one event loop."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.scorer: Scorer = load_scorer(options.student, code=options.code)
        config = self.scorer.config
        assert isinstance(config, StudentConfig), "a teacher reads the IHC"
        store = open_store(options, config)
        self.gallery = None if store is None else StoreGallery(store)
        self.finder = None if self.gallery is None else NeighbourFinder(self.scorer, self.gallery)
        self._batches = Batches(self._score, _BATCH)
        self._requests = 0

    def describe(self) -> dict[str, object]:
        """What there is to ask, as JSON."""
        config = self.scorer.config
        training, target, gallery = config.training, config.training.target, self.gallery
        shape = next((one for one in training.shapes if one.mpp), None)
        notes = [VIRTUAL] if training.virtual else []
        notes += [] if training.labelled else [NO_LABELS.format(target.label_word)]
        shown = {name: getattr(target, name) for name in ("name", "kind", "label_word", "classes", "unit")}
        return {
            "method": self.scorer.name,
            "target": shown
            | {"set_word": name_set(target), "area_percent": target.area_percent, "doubts": [NEARLY_BLANK, NO_HE]},
            "size": config.size,
            "mpp": shape.mpp if shape else None,
            "virtual": training.virtual,
            "notes": notes,
            "store": gallery and {"patches": gallery.total, "splits": gallery.splits, "labels": gallery.count_labels()},
            "slides": bool(self.options.slides),
        }

    async def predict(self, content: bytes, mpp: Mpp) -> dict[str, object]:
        """What the network says of an image file, as `lgd predict --json`."""
        with self._take():
            fitted = await asyncio.to_thread(self._fit, content, mpp)
            shown = slide_rows.as_json(self._describe(fitted, await self._batches.ask(fitted.pixels)))
        return {name: value for name, value in shown.items() if name != "image"}

    async def query(self, content: bytes, mpp: Mpp, filters: Filters) -> dict[str, object]:
        """The nearest known IHC of an image file."""
        with self._take():
            return await self._query(await asyncio.to_thread(self._fit, content, mpp), filters)

    async def query_stored(self, name: str, filters: Filters) -> dict[str, object]:
        """The same of the H&E of a stored patch, whose slide is left out."""
        with self._take():
            patch = await asyncio.to_thread(self._finder.gallery.find, name)
            pixels = await asyncio.to_thread(self._finder.gallery.read_input, patch, self.scorer.config.size)
            return await self._query(Fitted(pixels, []), filters, patch, patch.slide)

    async def query_region(self, pixels: np.ndarray, filters: Filters, slide: str) -> dict[str, object]:
        """The same of a square of a slide, as the network sees it; patches of a slide of that name are left out."""
        with self._take():
            return await self._query(Fitted(pixels, []), filters, slide=slide)

    @contextlib.contextmanager
    def _take(self) -> Iterator[None]:
        """Have a request in hand; raises `TooManyError`."""
        if self._requests >= MOST_REQUESTS:
            raise TooManyError("too many requests wait already: ask again later")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    def _fit(self, content: bytes, mpp: Mpp) -> Fitted:
        """An image file at the scale of the network; raises `DataError` for what cannot be used."""
        height, width = upright_size(content, NAME)
        most = self.options.max_pixels
        if height * width > most * 10**6:
            raise DataError(
                f"{NAME} has {width} x {height} pixels, and at most {most} megapixels are taken: cut it into patches"
            )
        return read_fitted(MemoryImage(NAME, content), self.scorer.config.training, self.scorer.config.size, mpp)

    def _score(self, images: Sequence[np.ndarray]) -> list[Values]:
        """Images of any sizes in as few forward passes as these allow."""
        rows = dict[int, Values]()
        order = sorted(range(len(images)), key=lambda number: images[number].shape)
        for _, alike in itertools.groupby(order, key=lambda number: images[number].shape):
            numbers = list(alike)
            out = self.scorer.score(np.stack([images[number] for number in numbers]))
            rows |= {number: {name: one[row] for name, one in out.items()} for row, number in enumerate(numbers)}
        return [rows[number] for number in range(len(images))]

    async def _query(
        self, fitted: Fitted, filters: Filters, patch: Stored | None = None, slide: str | None = None
    ) -> dict[str, object]:
        finder = self._finder
        values = await self._batches.ask(fitted.pixels)
        slides = frozenset([slide]) if slide else frozenset()
        return await asyncio.to_thread(finder.find, self._describe(fitted, values), values, filters, patch, slides)

    def _describe(self, fitted: Fitted, values: Values) -> Prediction:
        return make_prediction(self.scorer, NAME, fitted, values)

    @property
    def _finder(self) -> NeighbourFinder:
        if self.finder is None:
            raise DataError(NO_STORE)
        return self.finder
