"""The retrieval part of a report: what is measured of a run, and the rows of its contact sheet.

Training patches are the gallery that levels are looked up in, held-out IHC the one in which a query's own pair is
sought. The latents of both are in the store already; a network of H&E alone scores the training patches once more.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgd.config import Config
from lgd.metrics import Predictions
from lgd.report.embeddings import he_only, measure, of_ihc
from lgd.report.figures import Query
from lgd.report.results import Retrieval
from lgd.report.sheet import Gallery, as_neighbour
from lgd.retrieval.queries import check_pair, search
from lgd.retrieval.search import Searcher
from lgd.scoring.predict import Scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store, read_all, read_levels
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Network:
    """A network, and what it gave on the report's split."""

    scorer: Scorer
    predictions: Predictions
    vectors_nD: np.ndarray
    """Hallucinated or true latents, or the features of H&E alone."""


def score_network(scorer: Scorer, shards: Sequence[Shard], threads: int) -> Network:
    """Score every sample once."""
    predictions, vectors_nD = score_shards(scorer, shards, threads=threads, vectors=vectors_of(scorer))
    assert vectors_nD is not None, "every network has vectors"
    return Network(scorer=scorer, predictions=predictions, vectors_nD=vectors_nD)


def vectors_of(scorer: Scorer) -> str:
    """Which vectors a network is compared by: hallucinated or true latents, or the features of H&E alone."""
    return "pooled" if scorer.method is None or scorer.method.retrieves_by == "latents" else "features"


def measure_retrieval(
    config: Config,
    store: Store,
    training: Sequence[Shard],
    shards: Sequence[Shard],
    student: Network,
    rivals: Sequence[Network],
) -> Retrieval:
    """The measures of each network, and of the teacher's own latents.

    `shards` were scored; `training` is the gallery that levels are looked up in. Students of other teachers have no
    row: their latents do not compare with the store's.
    """
    check_pair(student.scorer, store)
    own_nD = pooled_latents(store, shards)
    latents_mD = pooled_latents(store, training) if training else own_nD[:0]
    level_m = read_levels(store.parts_of(training)) if training else np.empty(0, np.int64)
    embeddings = []
    for network in (student, *rivals):
        scorer, predictions, vectors_nD = network.scorer, network.predictions, network.vectors_nD
        by = scorer.method and scorer.method.retrieves_by
        if by == "features" and training:
            patches = sum(shard.samples for shard in training)
            logger.info(
                "[report] %s: scoring %d training patches, the gallery of its own features", scorer.name, patches
            )
            train, train_mC = score_shards(scorer, training, threads=config.data.threads, vectors="features")
            assert train_mC is not None
            embeddings += he_only(predictions.name, vectors_nD, train_mC, train, latents_mD, own_nD)
        elif by == "latents" and scorer.config.teacher_sha256 == store.recipe.teacher.weights_sha256:
            name = f"{predictions.name}, hallucinated latents"
            embeddings.append(of_ihc(name, vectors_nD, latents_mD, own_nD))
    # What no hallucination can be expected to pass; its own pair would be the query itself.
    embeddings.append(of_ihc("IHC teacher, true latents", own_nD, latents_mD, None))
    return measure(embeddings, student.predictions, level_m, config.report.bootstrap, config.run.seed)


def pooled_latents(store: Store, shards: Sequence[Shard]) -> np.ndarray:
    """The teacher's latents of all patches of some shards, (n, D), in their order."""
    return read_all(store.parts_of(shards), "pooled")[:, 0].astype(np.float64)


def sheet_rows(config: Config, store: Store, shards: ShardSet, student: Network) -> list[Query]:
    """The rows of the contact sheet: some queries of the scored split, and what they find in the index."""
    predictions = student.predictions
    rows = _spread(predictions.level, config.report.queries)
    found = search(Searcher(store), store, student.vectors_nD[rows], 4) if len(rows) else []
    images = Gallery(store, 256, known=shards.folders)
    reader = Reader(shards.of_split(config.report.split), ("he", "ihc"), 256)

    queries = []
    for row, hits in zip(rows, found, strict=True):
        sample = reader.read(int(row))
        queries.append(
            Query(
                key=sample.key,
                slide=sample.meta.slide,
                level=None if sample.level < 0 else sample.level,
                predicted=number_of(predictions.probability[row]),
                he=sample.images["he"],
                ihc=sample.images["ihc"],
                neighbours=[as_neighbour(hit, images) for hit in hits],
            )
        )
    return queries


def number_of(probability_4: np.ndarray) -> int | None:
    """The number of the most probable level; None where a probability is no number."""
    return int(probability_4.argmax()) if np.isfinite(probability_4).all() else None


def _spread(level_n: np.ndarray, count: int) -> np.ndarray:
    """Rows that take the levels in turn, evenly spaced within each: nobody picked the pretty ones."""
    picked: list[int] = []
    levels = np.unique(level_n)
    for place, level in enumerate(levels):
        rows = np.flatnonzero(level_n == level)
        share = count // len(levels) + (place < count % len(levels))
        picked += rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(int)].tolist()
    return np.array(picked, np.int64)
