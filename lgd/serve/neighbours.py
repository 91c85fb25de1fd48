"""The nearest known IHC of what a network sees, with what chance would give and which IHCs are hubs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.metrics import Ints
from lgd.retrieval.answers import Answer, Stored
from lgd.retrieval.chance import describe_chance
from lgd.retrieval.filters import find_allowed
from lgd.retrieval.hubs import find_hubs
from lgd.retrieval.queries import BIASED, check_pair, find_neighbours, make_answer, note_bias, search
from lgd.retrieval.rows import as_json
from lgd.retrieval.search import Searcher
from lgd.scoring.predict import Prediction, Scorer, choose_latents
from lgd.serve.gallery import StoreGallery, name_patch
from lgd.store.parts import as_labels

logger = logging.getLogger(__name__)

_QUERIES, _NEAREST = 200, 5
"""Held-out H&E that is asked for hubs, and the answers of each that count."""
_BATCH = 16
_BY_CHANCE = 0.01
"""Most rows of an index that would be called hubs where all answers were drawn blindly, expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """What a query may find."""

    k: int
    labels: Sequence[str] | None = None
    splits: Sequence[str] | None = None


class NeighbourFinder:
    """An index and the student that asks it, opened for many queries; threads may share one."""

    def __init__(self, scorer: Scorer, gallery: StoreGallery) -> None:
        """Raises `DataError` for a store without an index, and for one of another teacher."""
        self.scorer, self.store, self.gallery = scorer, gallery.store, gallery
        self.suffix = check_pair(scorer, self.store)
        self.searcher = Searcher(self.store)
        self.note = note_bias(self.searcher.document, scorer)
        self.label_m = as_labels(self.searcher.table["label"], self.store.target)
        self.hubs = self._find_hubs()

    def find(
        self,
        prediction: Prediction,
        values: dict[str, np.ndarray],
        filters: Filters,
        stored: Stored | None = None,
        slides: frozenset[str] = frozenset(),
    ) -> dict[str, object]:
        """The answer of an H&E as JSON, without patches of some `slides`; `stored` is the patch that it is of.

        Raises `ConfigError` for filters that there are none of, and `DataError` where these leave nothing.
        """
        filtered = filters.splits is not None or filters.labels is not None
        allowed = find_allowed(self.searcher, filters.splits, filters.labels) if filtered else None
        asked = make_answer(prediction, self.store, self.note, stored)
        vector_D = choose_latents(values, self.suffix)
        excluded = [slides] if slides else None
        found = find_neighbours(
            self.searcher, [asked], [vector_D], filters.k, allowed, excluded, biased=self.note == BIASED
        )
        searched_m = np.ones(len(self.label_m), bool) if allowed is None else allowed
        if slides:
            searched_m = searched_m & self.searcher.find_other_slides(slides)
        return self._as_json(found[0], self.label_m[searched_m])

    def _as_json(self, answer: Answer, label_m: np.ndarray) -> dict[str, object]:
        shown = {name: value for name, value in as_json([answer])[0].items() if name != "image"}
        neighbours = shown["neighbours"]
        assert isinstance(neighbours, list)
        shown["neighbours"] = [
            {"id": name_patch(hit), **one, "hub": self.hubs.get((hit.part, hit.row)), **self.gallery.make_urls(hit)}
            for hit, one in zip(answer.neighbours, neighbours, strict=True)
        ]
        stored = shown["stored"]
        if isinstance(stored, dict) and answer.stored:
            shown["stored"] = stored | self.gallery.make_urls(answer.stored)
        return shown | {"chance": describe_chance(answer, label_m)}

    def _find_hubs(self) -> dict[tuple[int, int], str]:
        """A sentence on each hub, by (part, row): an IHC that many held-out H&Es find; none where there is no H&E."""
        held_out = [part for part in self.store.parts if part.split == "val"] or [
            part for part in self.store.parts if part.split == "test"
        ]
        patches = [
            Stored(key="", slide=None, split=part.split, label=None, part=self.store.parts.index(part), row=row)
            for part in held_out
            for row in range(part.rows)
        ]
        if not patches:
            return {}
        asked = [
            patches[number] for number in np.linspace(0, len(patches) - 1, min(len(patches), _QUERIES)).astype(int)
        ]
        try:
            images = [self.gallery.read_input(patch, self.scorer.config.size) for patch in asked]
        except DataError as error:
            logger.warning("no neighbour is marked as a hub: %s", error)
            return {}
        vectors_nD = np.concatenate(
            [
                choose_latents(self.scorer.score(np.stack(images[start : start + _BATCH])), self.suffix)
                for start in range(0, len(images), _BATCH)
            ]
        )
        hits = search(self.searcher, vectors_nD, _NEAREST, None, asked, self.note == BIASED)
        places = [(hit.part, hit.row) for found in hits for hit in found]
        numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
        rows = len(self.searcher.table)
        count_m = np.bincount([numbers[place] for place in places], minlength=rows)
        return _describe_hubs([*numbers], count_m, len(asked))


def _describe_hubs(places: Sequence[tuple[int, int]], count_m: Ints, queries: int) -> dict[tuple[int, int], str]:
    """The rows of the most frequent hundredth that chance would hardly find so often."""
    from scipy.stats import binom

    chance = min(1.0, _NEAREST / len(count_m))
    described = {}
    for row in find_hubs(count_m).tolist():
        count = int(count_m[row])
        if row < len(places) and len(count_m) * binom.sf(count - 1, queries, chance) < _BY_CHANCE:
            described[places[row]] = (
                f"hub: among the nearest {_NEAREST} of {100 * count / queries:.0f} % of {queries} held-out H&E patches "
                f"(by chance of {100 * chance:.2g} %)"
            )
    return described
