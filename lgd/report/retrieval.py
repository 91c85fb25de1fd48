"""What retrieval by each network of a report is worth: its vectors, and the galleries that they search."""

import contextlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from lgd.base.labels import as_labels
from lgd.config import Config
from lgd.io.documents import MissingDocument
from lgd.labels.predictions import Predictions
from lgd.models.description import StudentConfig
from lgd.report.biased import with_bias
from lgd.report.embeddings import Embedding, he_only, measure
from lgd.report.probed import pooled_latents
from lgd.report.results import Retrieval
from lgd.retrieval.bias import open_bank
from lgd.retrieval.factory import fit_on_parts
from lgd.retrieval.index import measure_searcher
from lgd.retrieval.queries import check_pair
from lgd.retrieval.search import Searcher
from lgd.scoring.predict import Scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_labels
from lgd.store.store import Store

logger = logging.getLogger(__name__)


class Network(NamedTuple):
    """A network, and what it gave on the report's split."""

    scorer: Scorer
    predictions: Predictions
    vectors: dict[str, np.ndarray]
    """Mapped, hallucinated or true latents, or the features of H&E alone, by their names in `Scorer.score`."""


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

    `shards` of the `whole` run were scored; `training` is the gallery that labels are looked up in. Latents of patches
    without an IHC, if the store has none, are not searched; None where nothing is left to search.
    """
    check_pair(student.scorer, store)
    training = store.with_latents(training)
    if not training and len(store.with_latents(shards)) < len(shards):
        return None
    embeddings = list_embeddings(config, store, training, shards, (student, *rivals), whole)
    label_m = read_labels(store.parts_of(training)) if training else as_labels(whole.target, [])
    measured = measure(embeddings, student.predictions, label_m, config.report.bootstrap, config.run.seed)
    return measured.model_copy(update=_ask_index(store, student))


def _ask_index(store: Store, student: Network) -> dict[str, str | float]:
    """The index of a store, and its recall for what a student makes of the H&E; nothing where there is none of both."""
    latents_nD = student.vectors.get(f"query{check_pair(student.scorer, store)}")
    with contextlib.suppress(MissingDocument):
        if latents_nD is not None and find_spec("faiss"):
            searcher = Searcher(store)
            return {"index": searcher.document.factory, "index_recall": measure_searcher(searcher, latents_nD)}
    return {}


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
