"""Everything that a report is made of: `lgd evaluate` measures it here, and `lgd.report.report` writes it down."""

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from lgd.config import Config
from lgd.metrics import Predictions
from lgd.report import compare, robustness
from lgd.report.caveats import ONE_TRAINING, UNTAUGHT, caveats_of
from lgd.report.colour import colour_only
from lgd.report.figures import Query
from lgd.report.results import Retrieval, Robustness
from lgd.retrieval.search import faiss_problem, read_document
from lgd.scoring.predict import load_scorer
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What was measured on one split."""

    student: Predictions
    others: Sequence[Predictions] = ()
    """What the student is compared with: further students, stain and background alone, the teacher."""
    retrieval: Retrieval | None = None
    queries: Sequence[Query] = ()
    """Rows of the contact sheet."""
    robustness: Robustness | None = None
    caveats: Sequence[str]
    provenance: dict[str, JsonValue]
    """Its `command` is shown as the way to reproduce the report."""
    resamples: int
    seed: int

    @property
    def rows(self) -> list[Predictions]:
        """The models of the report's tables, in their order."""
        return [self.student, *self.others]


def evaluate(
    config: Config,
    shards: ShardSet,
    provenance: dict[str, JsonValue],
    code: Collection[str],
) -> Evaluation:
    """Score the student, `report.also` and the teacher on the report's split.

    `provenance` is what is known before the scoring; `code` is what the networks may run of code outside LGD. Raises
    `DataError` for a split without patches, and for a student and a store that do not belong together.
    """
    split = shards.require_split(config.report.split, "report.split")
    # Where the training split itself is scored it is no gallery: queries would find themselves.
    training = shards.of_split("train") if config.report.split != "train" else []
    scorers = [load_scorer(folder, code=code) for folder in (config.student.dir, *config.report.also)]
    # Opened before the scoring, which can take hours.
    method = scorers[0].method
    store = Store(config.latents.dir) if method and method.retrieves_by == "latents" else None
    has_sheet = store is not None and config.report.queries > 0 and _is_searchable(store)
    networks = [
        compare.score_network(scorer, split, config.data.threads)
        for scorer in (*scorers, load_scorer(config.teacher.dir, "teacher", code))
    ]
    student, *rivals, teacher = networks
    labelled = student.scorer.config.training.labelled
    if not labelled:
        # Its levels are none, so there is nothing to compare either.
        student, *rivals, teacher = map(_without_levels, networks)
    retrieval = queries = shifted = None
    if store is not None:
        retrieval = compare.measure_retrieval(config, store, training, split, student, rivals)
        queries = compare.sheet_rows(config, store, shards, student) if has_sheet else None
    if config.report.robustness:
        shifted = robustness.measure(config, [student, *rivals, teacher], split)
    colour = colour_only(training, split, config.data.threads)
    return Evaluation(
        student=student.predictions,
        others=[*(one.predictions for one in rivals), *([colour] if colour else []), teacher.predictions],
        retrieval=retrieval,
        queries=queries or (),
        robustness=shifted,
        caveats=[ONE_TRAINING if labelled else UNTAUGHT, *caveats_of(shards, student.predictions)],
        provenance={
            "split": config.report.split,
            "shards": list(shards.digests),
            "student": student.scorer.config.weights_sha256,
            "seed": config.run.seed,
            **provenance,
        },
        resamples=config.report.bootstrap,
        seed=config.run.seed,
    )


def _without_levels(network: compare.Network) -> compare.Network:
    predictions = network.predictions
    unknown = dataclasses.replace(predictions, level=np.full_like(predictions.level, -1))
    return dataclasses.replace(network, predictions=unknown)


def _is_searchable(store: Store) -> bool:
    """Whether the index of a store can be searched: not without FAISS; `DataError` without an index."""
    problem = faiss_problem()
    if problem:
        logger.warning("[report] the contact sheet is left out: %s", problem)
        return False
    read_document(store)
    return True
