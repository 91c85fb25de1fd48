"""Everything that a report is made of: `lgd evaluate` measures it here, and `lgd.report.report` writes it down."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.base.labels import Labels
from lgd.base.target import KNOWN, Target
from lgd.config import Config
from lgd.labels.predictions import Predictions, paired_differences
from lgd.models.description import TeacherConfig
from lgd.report.caveats import (
    ONE_TRAINING,
    UNTAUGHT,
    UNTAUGHT_TEACHER,
    WITHOUT_TEACHER,
    caveats_of,
    chance_retrieval_caveats,
    colour_shortcut_caveats,
    probe_caveat,
)
from lgd.report.colour import colour_only, read_training_colours
from lgd.report.pictures import Pictured, read_pictured
from lgd.report.probed import score_by_probe
from lgd.report.results import Difference, Results, Retrieval, state_target
from lgd.report.retrieval import Network, measure_retrieval
from lgd.report.robustness import measure as measure_robustness
from lgd.report.set_coverage import measure_label_sets
from lgd.report.sites import NOTHING_TAUGHT, Taught, describe_training, find_site_caveats, measure_sites
from lgd.report.slides import describe_rules, score_model
from lgd.retrieval.queries import open_for
from lgd.retrieval.search import read_document, require_faiss
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.manifest import Values
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import ProbeDocument, find_probe
from lgd.store.store import Store

logger = logging.getLogger(__name__)


class Probed(NamedTuple):
    """What answers for a teacher that no label taught."""

    store: Store
    probe: ProbeDocument | None
    """None where too few labels are there to fit one on."""
    caveat: str


def evaluate(
    config: Config, shards: ShardSet, provenance: dict[str, JsonValue], code: Collection[str]
) -> tuple[Results, list[Predictions], Pictured]:
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
        # It has no answers, so there is nothing to compare either.
        networks = [one._replace(predictions=one.predictions.without_labels()) for one in networks]
    student, *rivals = networks[: len(scorers)]
    teachers = [one.predictions for one in networks[len(scorers) :]]
    if probed is not None:
        teachers = [score_by_probe(probed.store, probed.probe, shards, split, student.predictions)]
    retrieval = shifted = None
    if store is not None:
        retrieval = measure_retrieval(config, store, training, split, student, rivals, shards)
    pictured = read_pictured(config, store, shards, student, has_sheet)
    if config.report.robustness and labelled:
        answering = [(one.scorer, one.predictions) for one in networks if one.scorer.config.training.labelled]
        shifted = measure_robustness(config, answering, split)
    colours = read_training_colours(training, config.data.threads)
    colour = colour_only(colours, split, shards.target, config.data.threads)
    scored = [*(one.predictions for one in (student, *rivals)), *([colour] if colour else []), *teachers]
    results = measure_results(
        scored,
        caveats=[
            ONE_TRAINING if labelled else UNTAUGHT.format(shards.target.label_word),
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
        taught=describe_training(shards, colours, config.run.seed),
    )
    return results.model_copy(update={"robustness": shifted}), scored, pictured


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
    store = Store(config.latents.dir, teachers=(config.teacher.name,))
    probe = find_probe(store, store.with_latents(shards.of_split("train")))
    target = shards.target
    caveat = probe_caveat(probe, described, target) if probe else UNTAUGHT_TEACHER.format(target.label_word)
    return Probed(store, probe, caveat)


def measure_results(
    scored: Sequence[Predictions],
    *,
    caveats: Sequence[str],
    provenance: dict[str, JsonValue],
    resamples: int,
    seed: int,
    retrieval: Retrieval | None = None,
    taught: Taught = NOTHING_TAUGHT,
) -> Results:
    """What a report says of some models, the student first; `DataError` where they were scored on other patches.

    It has no robustness yet.
    """
    student, *others = scored
    target, measures, labels = student.target, student.measures, student.labelled().label
    models = tuple(score_model(predictions, resamples, seed) for predictions in scored)
    differences = tuple(
        Difference(
            of=student.name,
            minus=other.name,
            metrics=paired_differences(student, other, [*measures.headline], resamples, seed),
        )
        for other in others
        # One that was taught no labels has no answers that could differ.
        if other.known.any() == bool(len(labels))
    )
    sites = measure_sites(scored, taught, resamples, seed)
    return Results(
        caveats=(
            *caveats,
            *find_site_caveats(student, sites, taught),
            *colour_shortcut_caveats(models, differences, measures),
            *chance_retrieval_caveats(retrieval),
        ),
        provenance=provenance,
        resamples=resamples,
        seed=seed,
        patches=len(student.keys),
        labelled=len(labels),
        groups=len(set(student.groups)),
        levels=_count_labels(target, labels),
        always_the_commonest_level=_guess_class(labels) if len(labels) and not target.is_number else None,
        slide_rules=describe_rules(target),
        models=models,
        differences=differences,
        retrieval=retrieval,
        robustness=None,
        target=state_target(target),
        values=_summarise(labels) if len(labels) and target.is_number else None,
        always_the_mean=float(abs(labels - taught.values.mean).mean()) if len(labels) and taught.values else None,
        sites=tuple(sites) or None,
        label_sets=tuple(measure_label_sets(scored, resamples, seed)) or None,
        training_sites={kind: dict(Counter(names)) for kind, names in (taught.sites or {}).items()} or None,
    )


def _count_labels(target: Target, label_n: Labels) -> dict[str, int]:
    if target.is_number:
        return {KNOWN: len(label_n)}
    return {name: int((label_n == number).sum()) for number, name in enumerate(target.classes)}


def _guess_class(label_n: Labels) -> float:
    """The accuracy of always answering the commonest class."""
    return float(np.bincount(label_n.astype(np.int64)).max() / len(label_n))


def _summarise(label_n: Labels) -> Values:
    least, most = float(label_n.min()), float(label_n.max())
    return Values(mean=float(label_n.mean()), std=float(label_n.std()), least=least, most=most)
