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
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.report.biased import with_bias
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
from lgd.report.embeddings import Embedding, he_only, measure
from lgd.report.figures import Query
from lgd.report.probed import pooled_latents, score_by_probe
from lgd.report.results import HEADLINE, Difference, Results, Retrieval, Robustness
from lgd.report.robustness import measure as measure_robustness
from lgd.report.sheet import Gallery, read_images
from lgd.report.slides import SLIDE_RULES, score_model
from lgd.retrieval.answers import Answer, name_level
from lgd.retrieval.bias import open_bank
from lgd.retrieval.factory import fit_on_parts
from lgd.retrieval.queries import BIASED, check_pair, note_bias, open_for, search
from lgd.retrieval.search import Searcher, read_document, require_faiss
from lgd.scoring.predict import Scorer, choose_latents, choose_level, load_scorer, name_probabilities, score_shards
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_levels
from lgd.store.probe import ProbeDocument, find_probe
from lgd.store.store import Store
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)


class Network(NamedTuple):
    """A network, and what it gave on the report's split."""

    scorer: Scorer
    predictions: Predictions
    vectors: dict[str, np.ndarray]
    """Mapped, hallucinated or true latents, or the features of H&E alone, by their names in `Scorer.score`."""


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


def measure_retrieval(
    config: Config,
    store: Store,
    training: Sequence[Shard],
    shards: Sequence[Shard],
    student: Network,
    rivals: Sequence[Network],
    whole: ShardSet,
) -> Retrieval | None:
    """The measures of what `list_embeddings` gives.

    `shards` of the `whole` run were scored; `training` is the gallery that levels are looked up in. Latents of patches
    without an IHC, if the store has none, are not searched; None where nothing is left to search.
    """
    check_pair(student.scorer, store)
    training = store.with_latents(training)
    if not training and len(store.with_latents(shards)) < len(shards):
        return None
    embeddings = list_embeddings(config, store, training, shards, (student, *rivals), whole)
    level_m = read_levels(store.parts_of(training)) if training else np.empty(0, np.int64)
    return measure(embeddings, student.predictions, level_m, config.report.bootstrap, config.run.seed)


def list_embeddings(
    config: Config,
    store: Store,
    training: Sequence[Shard],
    shards: Sequence[Shard],
    networks: Sequence[Network],
    whole: ShardSet,
) -> list[Embedding]:
    """The vectors of each network, and the teacher's own latents, with what they search.

    Students of other teachers have no row: their latents do not compare with the store's. Latents are compared as
    queries compare them, whitened by those of `training`, and with `latents.bias` first with a bias against hubs, which
    is learnt from the H&E of the `whole` run's split val; beside that stand hallucinated and true ones as they are.
    """
    has_own = len(store.with_latents(shards)) == len(shards)
    own_nD = pooled_latents(store, shards) if has_own else None
    latents_mD = pooled_latents(store, training or shards)[: None if training else 0]
    whitening = fit_on_parts(store.parts_of(training or shards), config.latents.components)
    whiten, white = (whitening.apply, ", whitened") if whitening else (np.asarray, "")
    white_own_nD = None if own_nD is None else whiten(own_nD)
    embeddings = []
    for scorer, predictions, vectors in networks:
        name = predictions.name
        if scorer.retrieves_by == "features" and training:
            message = "[report] %s: scoring %d training patches, the gallery of its own features"
            logger.info(message, scorer.name, sum(shard.samples for shard in training))
            train, train_vectors = score_shards(scorer, training, threads=config.data.threads)
            features = vectors["features"], train_vectors["features"]
            what = "whitened latents" if whitening else "latents"
            embeddings += he_only(name, *features, train, whiten(latents_mD), white_own_nD, what)
        elif isinstance(scorer.config, StudentConfig) and scorer.retrieves_by == "latents":
            of = scorer.config.suffix_of(store.recipe.teacher.weights_sha256)
            if of is None:
                continue
            if f"query{of}" in vectors:
                title, mapped_nD, white_mD = (
                    f"{name}, mapped latents{white}",
                    whiten(vectors[f"query{of}"]),
                    whiten(latents_mD),
                )
                plain = Embedding(title, mapped_nD, white_mD, white_own_nD)
                if sharpness := config.latents.bias:
                    bank = open_bank(scorer, of, whole, sharpness, config.data.threads)
                    embeddings.append(with_bias(plain, whiten(bank.make_latents()), sharpness))
                embeddings.append(plain)
            embeddings.append(Embedding(f"{name}, hallucinated latents", vectors[f"pooled{of}"], latents_mD, own_nD))
    # What no hallucination can be expected to pass; its own pair would be the query itself.
    if own_nD is not None and white_own_nD is not None:
        embeddings.append(Embedding("IHC teacher, true latents", own_nD, latents_mD))
        if whitening:
            embeddings.append(Embedding(f"IHC teacher, true latents{white}", white_own_nD, whiten(latents_mD)))
    return embeddings


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
