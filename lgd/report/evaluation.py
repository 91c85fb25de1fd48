"""Everything that a report is made of: `lgd evaluate` measures it here, and `lgd.report.report` writes it down."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.config import Config
from lgd.config_sections import LEVEL_NAMES
from lgd.metrics import Predictions, paired_differences
from lgd.models.description import TeacherConfig
from lgd.report.caveats import (
    ONE_TRAINING,
    UNTAUGHT,
    UNTAUGHT_TEACHER,
    WITHOUT_TEACHER,
    caveats_of,
    chance_retrieval_caveats,
    colour_only,
    colour_shortcut_caveats,
    probe_caveat,
)
from lgd.report.figures import Query
from lgd.report.probed import score_by_probe
from lgd.report.results import HEADLINE, Difference, Results, Retrieval, Robustness
from lgd.report.retrieval import Network, measure_retrieval
from lgd.report.robustness import measure as measure_robustness
from lgd.report.sheet import Gallery, read_images
from lgd.report.slides import SLIDE_RULES, score_model
from lgd.retrieval.answers import Answer, name_level
from lgd.retrieval.queries import BIASED, note_bias, open_for, search
from lgd.retrieval.search import Searcher, read_document, require_faiss
from lgd.scoring.predict import choose_latents, choose_level, load_scorer, name_probabilities, score_shards
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import ProbeDocument, find_probe
from lgd.store.store import Store
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)


class Probed(NamedTuple):
    """What answers for a teacher that no label taught."""

    store: Store
    probe: ProbeDocument | None
    """None where too few labels are there to fit one on."""
    caveat: str


def evaluate(
    config: Config, shards: ShardSet, provenance: dict[str, JsonValue], code: Collection[str]
) -> tuple[Results, list[Predictions], list[Query]]:
    """Score the student, `report.also` and the teacher on the report's split; what `write_report` writes.

    `provenance` is what is known before the scoring; `code` is what the networks may run of code outside LGD. Raises
    `DataError` for a split without patches, and for a student and a store that do not belong together.
    """
    split = shards.require_split(config.report.split, "report.split")
    # Where the training split itself is scored it is no gallery: queries would find themselves.
    training = shards.of_split("train") if config.report.split != "train" else []
    scorers = [load_scorer(folder, code=code) for folder in (config.student.dir, *config.report.also)]
    unpaired = sum(shard.samples for shard in split if "ihc" not in shard.roles)
    # A teacher that no label taught answers by the probe of its stored latents, and its network is not asked.
    has_network = not unpaired and config.teacher.source != "imported"
    described = TeacherConfig.read_folder(config.teacher.dir) if has_network else None
    own = [load_scorer(config.teacher.dir, "teacher", code)] if described and described.gives_labels else []
    # Opened before the scoring, which can take hours.
    store = open_for(scorers[0], config.latents.dir, None) if scorers[0].retrieves_by == "latents" else None
    has_sheet = store is not None and config.report.queries > 0 and _can_search(store)
    probed = _open_probe(config, shards, described)
    networks = [
        Network(scorer, *score_shards(scorer, split, threads=config.data.threads)) for scorer in (*scorers, *own)
    ]
    labelled = scorers[0].config.training.labelled
    if not labelled:
        # Its levels are none, so there is nothing to compare either.
        unknown = np.full_like(networks[0].predictions.level, -1)
        networks = [one._replace(predictions=replace(one.predictions, level=unknown)) for one in networks]
    student, *rivals = networks[: len(scorers)]
    teachers = [one.predictions for one in networks[len(scorers) :]]
    if probed is not None:
        teachers = [score_by_probe(probed.store, probed.probe, shards, split, student.predictions)]
    retrieval = shifted = None
    queries: list[Query] = []
    if store is not None:
        retrieval = measure_retrieval(config, store, training, split, student, rivals, shards)
        queries = sheet_rows(config, store, shards, student) if has_sheet else []
    if config.report.robustness and labelled:
        answering = [(one.scorer, one.predictions) for one in networks if one.scorer.config.training.labelled]
        shifted = measure_robustness(config, answering, split)
    colour = colour_only(training, split, config.data.threads)
    scored = [*(one.predictions for one in (student, *rivals)), *([colour] if colour else []), *teachers]
    results = measure_results(
        scored,
        caveats=[
            ONE_TRAINING if labelled else UNTAUGHT,
            *([probed.caveat] if probed and labelled else []),
            *([WITHOUT_TEACHER.format(unpaired, len(student.predictions.keys))] if unpaired and not probed else []),
            *caveats_of(shards, student.predictions, bool(labelled)),
        ],
        provenance={
            "split": config.report.split,
            "shards": list(shards.digests),
            "student": student.scorer.config.weights_sha256,
            "seed": config.run.seed,
            **provenance,
        },
        resamples=config.report.bootstrap,
        seed=config.run.seed,
        retrieval=retrieval,
        robustness=shifted,
    )
    return results, scored, queries


def _can_search(store: Store) -> bool:
    """Whether queries of the contact sheet can be answered, else a note; `DataError` for a store without an index."""
    try:
        require_faiss()
    except DataError as error:
        logger.warning("[report] the contact sheet is left out: %s", error)
        return False
    read_document(store)
    return True


def _open_probe(config: Config, shards: ShardSet, described: TeacherConfig | None) -> Probed | None:
    """What answers for a teacher that gives no labels itself; nothing where it cannot see the patches."""
    if described.gives_labels if described else config.teacher.source != "imported":
        return None
    learnt = described.learns if described else ()
    store = Store(config.latents.dir, teachers=(config.teacher.name,))
    probe = find_probe(store, store.with_latents(shards.of_split("train")))
    return Probed(store, probe, probe_caveat(probe, learnt) if probe else UNTAUGHT_TEACHER)


def measure_results(
    scored: Sequence[Predictions],
    *,
    caveats: Sequence[str],
    provenance: dict[str, JsonValue],
    resamples: int,
    seed: int,
    retrieval: Retrieval | None = None,
    robustness: Robustness | None = None,
) -> Results:
    """What a report says of some models, the student first; `DataError` where they were scored on other patches."""
    student, *others = scored
    labels = student.level[student.level >= 0]
    models = tuple(score_model(predictions, resamples, seed) for predictions in scored)
    differences = tuple(
        Difference(
            of=student.name, minus=other.name, metrics=paired_differences(student, other, [*HEADLINE], resamples, seed)
        )
        for other in others
        # One that was taught no labels has no answers that could differ.
        if (other.level >= 0).any() == bool(len(labels))
    )
    return Results(
        caveats=(*caveats, *colour_shortcut_caveats(models, differences), *chance_retrieval_caveats(retrieval)),
        provenance=provenance,
        resamples=resamples,
        seed=seed,
        patches=len(student.keys),
        labelled=len(labels),
        groups=len(set(student.groups)),
        levels={name: int((labels == level).sum()) for level, name in enumerate(LEVEL_NAMES)},
        always_the_commonest_level=float(np.bincount(labels).max() / len(labels)) if len(labels) else None,
        slide_rules=SLIDE_RULES,
        models=models,
        differences=differences,
        retrieval=retrieval,
        robustness=robustness,
    )


def sheet_rows(config: Config, store: Store, shards: ShardSet, student: Network) -> list[Query]:
    """The rows of the contact sheet: some queries of the scored split, and what they find in the index."""
    predictions = student.predictions
    rows = _spread(predictions.level, config.report.queries)
    searcher = Searcher(store)
    note = note_bias(searcher.document, student.scorer)
    queries_nD = choose_latents(student.vectors)[rows]
    found = search(searcher, queries_nD, 4, biased=note == BIASED) if len(rows) else []
    images = Gallery(store, 256, shards.folders)
    split = Reader(shards.of_split(config.report.split), ())
    samples = [split.read(row) for row in rows.tolist()]
    pictures = [read_images(split.shards[sample.shard], sample.row, 256) for sample in samples]
    return [
        Query(
            answer=Answer(
                image=sample.key,
                level=choose_level(name_probabilities(predictions.probability[row])),
                neighbours=hits,
                notes=[note] if note else [],
            ),
            slide=sample.meta.slide,
            level=name_level(sample.level),
            he=he,
            ihc=ihc,
            images=[images.show(hit) for hit in hits],
        )
        for row, sample, (he, ihc), hits in zip(rows, samples, pictures, found, strict=True)
    ]


def _spread(level_n: np.ndarray, count: int) -> np.ndarray:
    """Rows that take the levels in turn, evenly spaced within each: nobody picked the pretty ones."""
    picked: list[int] = []
    levels = np.unique(level_n)
    for place, level in enumerate(levels):
        rows = np.flatnonzero(level_n == level)
        share = count // len(levels) + (place < count % len(levels))
        picked += rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(int)].tolist()
    return np.array(picked, np.int64)
