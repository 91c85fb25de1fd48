"""Which patches of the scored split a report pictures, and what is shown of them: never more of a larger split."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lgd.config import Config
from lgd.labels.predictions import Predictions
from lgd.models.student import GRIDS
from lgd.report.contact_sheet import Query
from lgd.report.grids import MOST_PATCHES, GridPatch, read_grid_patches
from lgd.report.retrieval import Network
from lgd.report.sheet import Gallery, read_fields
from lgd.report.slide_map import SlideMap, read_slide_maps
from lgd.retrieval.answers import Answer
from lgd.retrieval.queries import BIASED, note_bias, search
from lgd.retrieval.search import Searcher
from lgd.scoring.colours import find_ends
from lgd.scoring.predict import choose_latents, read_answer
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store
from lgd.stream.reader import Reader


class Pictured(NamedTuple):
    """What the pictures of a report are drawn of, beside its numbers."""

    queries: Sequence[Query] = ()
    """The rows of the contact sheet."""
    grids: Sequence[GridPatch] = ()
    slides: Sequence[SlideMap] = ()
    ends: tuple[float, float] = (0.0, 1.0)
    """The grades that the ends of the colours of `slides` stand for."""


NOTHING_PICTURED = Pictured()


def read_pictured(config: Config, store: Store | None, shards: ShardSet, student: Network, has_sheet: bool) -> Pictured:
    """All that is pictured of the scored split; `store`: of a student that hallucinates its latents; `has_sheet`:
    whether queries can be answered.
    """
    split, ends = shards.of_split(config.report.split), find_ends(student.scorer.config.training)
    slides = read_slide_maps(student.predictions, split, ends, config.data.threads)
    if store is None:
        return Pictured(slides=slides, ends=ends)
    queries = read_queries(config, store, shards, student) if has_sheet else []
    return Pictured(queries=queries, grids=read_grids(config, store, shards, student), slides=slides, ends=ends)


def read_queries(config: Config, store: Store, shards: ShardSet, student: Network) -> list[Query]:
    """The rows of the contact sheet: some queries of the scored split, and what they find in the index."""
    predictions, target = student.predictions, student.predictions.target
    rows = choose_rows(predictions, config.report.queries)
    searcher = Searcher(store)
    note = note_bias(searcher.document, student.scorer)
    queries_nD = choose_latents(student.vectors)[rows]
    found = search(searcher, queries_nD, 4, biased=note == BIASED) if len(rows) else []
    images = Gallery(store, shards.folders)
    split = Reader(shards.of_split(config.report.split), ())
    samples = [split.read(row) for row in rows.tolist()]
    pictures = [read_fields(split.shards[sample.shard], sample.row) for sample in samples]
    return [
        Query(
            answer=Answer(
                image=sample.key,
                label=read_answer(target, predictions.output[row])[0],
                known=store.target,
                neighbours=hits,
                notes=[note] if note else [],
            ),
            slide=sample.meta.slide,
            label=target.name_label(sample.label),
            he=he,
            ihc=ihc,
            images=[images.show(hit) for hit in hits],
        )
        for row, sample, (he, ihc), hits in zip(rows, samples, pictures, found, strict=True)
    ]


def read_grids(config: Config, store: Store, shards: ShardSet, student: Network) -> list[GridPatch]:
    """Some patches of the scored split with their grids, but for those that training left out."""
    weights = dict.fromkeys(GRIDS.values(), config.student.membrane_weight) | {"nuclei": config.student.nuclei_weight}
    taught = [name for name, weight in weights.items() if weight]
    predictions, target = student.predictions, student.predictions.target
    rows = choose_rows(predictions, MOST_PATCHES).tolist()
    titles = []
    for row in rows:
        true = target.name_label(predictions.label[row].item())
        said, _ = read_answer(target, predictions.output[row])
        labels = [
            f"{name} {target.label_word} {target.format_label(one)}"
            for name, one in (("true", true), ("predicted", said))
            if one is not None
        ]
        titles.append("  ".join([predictions.keys[row], f"slide {predictions.groups[row]}", *labels]))
    return read_grid_patches(student.scorer, store, shards.of_split(config.report.split), rows, titles, taught)


def choose_rows(predictions: Predictions, count: int) -> np.ndarray:
    """Rows that take the labels in turn, evenly spaced within each: nobody picked the pretty ones.

    Values are evenly spaced in their order.
    """
    label_n = predictions.label
    if predictions.target.is_number:
        rows = np.argsort(label_n, kind="stable")[: int(predictions.known.sum()) or None]
        return np.array(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)])
    picked: list[int] = []
    labels = np.unique(label_n)
    for place, label in enumerate(labels):
        rows = np.flatnonzero(label_n == label)
        share = count // len(labels) + (place < count % len(labels))
        picked += rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(int)].tolist()
    return np.array(picked, np.int64)
