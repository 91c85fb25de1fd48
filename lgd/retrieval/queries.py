"""H&E query -> the latent that the student's map makes of it -> nearest teacher latents; or stored IHC -> its nearest.

    answers = lgd.query("runs/demo/student", "runs/demo/latents", "he.png", k=5, labels=["3+"])
    answers = lgd.query(None, "runs/demo/latents", keys=["00012_test_3+"], k=5, exclude_same_slide=True)
    answers[0].neighbours[0].key, answers[0].vote.label

`lgd query` prints what `lgd.retrieval.answers` makes of it; nothing is left on disk but the `--sheet`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lgd.base.errors import ConfigError, DataError, require
from lgd.config_files import find_in_run
from lgd.io.location import Location, as_location
from lgd.models.description import ModelConfig, StudentConfig
from lgd.models.methods import METHODS, PROPOSED
from lgd.retrieval.answers import Answer, Hit, Stored, find_slides, find_stored
from lgd.retrieval.filters import find_allowed
from lgd.retrieval.index_files import IndexDocument
from lgd.retrieval.search import Searcher, choose_near, near_duplicates
from lgd.scoring.images import Images, Mpp, OneImage, list_sources, take_images
from lgd.scoring.predict import Prediction, Scorer, choose_latents, load_scorer, score_images
from lgd.scoring.slide_rows import require_names
from lgd.shards.candidate import safe_key
from lgd.store.document import StoreDocument
from lgd.store.parts import as_labels
from lgd.store.store import Store

BIASED = (
    "neighbours are in the order of the cosine and a bias against hubs (latents.bias), so a nearer one can stand later"
)
OTHER_STUDENT = (
    "the index has a bias against hubs (latents.bias) that was learnt from another student, and it is left out: run "
    "lgd build-index to learn that of this one"
)


def require_latents(scorer: Scorer) -> None:
    """Raise `DataError` unless the student hallucinates latents."""
    if scorer.method is None or scorer.method.retrieves_by != "latents":
        raise DataError(
            f"the student {scorer.folder} hallucinates no latents ({scorer.name}): query with one that does, such as "
            f"{METHODS[PROPOSED].title}"
        )


def check_pair(scorer: Scorer, store: Store) -> str:
    """What ends the names of the latents that a student hallucinates of the store's first teacher.

    Raises `DataError` where it hallucinates none of them.
    """
    require_latents(scorer)
    config = scorer.config
    stored, teachers = store.recipe.teacher.weights_sha256, config.teachers if isinstance(config, StudentConfig) else ()
    suffix = config.suffix_of(stored) if isinstance(config, StudentConfig) else None
    if suffix is None:
        taught = ", ".join(f"{one.name}, {one.weights_sha256[:12]}" for one in teachers)
        raise DataError(
            f"the latents of {store.teacher} in the store {store.folder} are of another teacher ({stored[:12]}) than "
            f"this student hallucinates ({taught}): name another of its teachers by --teacher, use the store "
            "that it was trained on, or cache and train again"
        )
    return suffix


def note_bias(document: IndexDocument, scorer: Scorer | None) -> str:
    """BIASED, OTHER_STUDENT, or nothing: how the bias of an index concerns what a student asks.

    A stored IHC, of which there is no scorer, asks without the bias, which was learnt from H&E.
    """
    if document.bias is None or scorer is None:
        return ""
    return BIASED if document.bias.student == scorer.config.weights_sha256 else OTHER_STUDENT


def open_for(scorer: Scorer | None, folder: str | Location, teacher: str | None) -> Store:
    """A store, or that of its run, seen through a teacher: by default the student's first one that it has latents of.

    Raises `DataError` for a store without latents of that name, and for a student that hallucinates none.
    """
    if scorer is not None:
        # Before the store is opened: the run of such a student need not have one.
        require_latents(scorer)
    return open_latents(None if scorer is None else scorer.config, folder, teacher)


def open_latents(config: ModelConfig | None, folder: str | Location, teacher: str | None) -> Store:
    """As `open_for`, of what the folder of a student that hallucinates latents says."""
    at = find_in_run(folder, "latents")
    if teacher is None and isinstance(config, StudentConfig):
        stored = StoreDocument.read(at / "store.json").teachers
        own = (one.name for one in config.teachers)
        teacher = next((name for name in own if name in stored), None)
    return Store(at, teachers=[teacher] if teacher else ())


def query(  # noqa: PLR0913 - a public function, whose options are given by name
    scorer: Scorer | str | Location | None,
    store: Store | str | Location,
    images: Images = (),
    k: int = 5,
    *,
    keys: Sequence[str] = (),
    splits: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
    exclude_same_slide: bool = False,
    slides: str | Location | None = None,
    mpp: Mpp = None,
    teacher: str | None = None,
    keep_going: bool = False,
) -> list[Answer]:
    """Find the nearest stored IHC latents of H&E images, or of stored patches.

    Args:
        scorer: The student, from `load_scorer`, or its folder; None for `keys`, which need no student.
        store: The feature store, or its folder, or that of its run.
        images: H&E images as `predict` takes them; or give `keys`.
        k: Neighbours of each query.
        keys: Keys of stored patches, whose IHC latents are the queries. A patch is left out of its own answer; of a
            key that several parts have, each patch is a query of its own.
        splits: Search these splits of the index only.
        labels: Search patches with these labels only: classes, such as `["2+", "3+"]`, or ranges of values with both
            ends, such as `["10:20", "90:"]`.
        levels: The same by its old name.
        exclude_same_slide: Leave out patches of the query's slide, and of unknown slides, since they may be of it.
        slides: A CSV with columns key (file name without suffix) and slide: the slides of the images. By default a
            query's slide is that of the stored patch of this key.
        mpp: The scale of the images, as for `predict`.
        teacher: Whose latents are compared, where `store` is a folder; by default those of the student's first teacher.
        keep_going: Give an image that cannot be used an answer that is not `usable`, rather than raise.

    Returns:
        An answer for each query: its neighbours, nearest first, and the vote of their labels. An index with a bias
        against hubs (`latents.bias`) gives another order; the answer then has a note.

    Raises:
        ConfigError: For what cannot be asked.
        DataError: For a store without a fitting index, a student of another teacher, an image that cannot be used, an
            unknown key or slide, and filters that leave nothing.

    Example:
        >>> (answer,) = lgd.query("runs/demo/student", "runs/demo/latents", "he.png", k=5, labels=["2+", "3+"])
        >>> answer.neighbours[0].key, answer.neighbours[0].distance, answer.vote.label
    """
    sources = list_sources(images)
    require(k >= 1, f"-k is {k}: ask for at least 1 neighbour")
    require(
        not (sources and keys),
        "distances of an image and of a stored latent do not compare: give images or --key, not both",
    )
    require(bool(sources or keys), "nothing is asked: give H&E images, or --key KEY of stored patches")
    require(exclude_same_slide or not slides, "--slides is used by --exclude-same-slide only: give both, or neither")
    require(labels is None or levels is None, "labels and levels are the same: give labels")
    student, of = None, ""
    if sources:
        if scorer is None:
            raise ConfigError("an image needs a student to hallucinate its latent: give one, such as --model DIR")
        student = scorer if isinstance(scorer, Scorer) else load_scorer(scorer)
    opened = store if isinstance(store, Store) else open_for(student, store, teacher)
    if student is not None:
        of = check_pair(student, opened)
    searcher = Searcher(opened)
    note = note_bias(searcher.document, student)
    labels = levels if labels is None else labels
    filtered = splits is not None or labels is not None
    allowed = find_allowed(searcher, splits, labels) if filtered else None
    taken, stored = take_images(sources), find_stored(opened, keys)
    excluded = _find_own_slides(opened, taken, stored, slides) if exclude_same_slide else None
    answers, vectors = [], []
    # Last, because it takes the longest.
    for prediction, values in score_images(student, taken, mpp, keep_going=keep_going) if student else ():
        answers.append(make_answer(prediction, opened, note))
        vectors.append(choose_latents(values, of) if values else np.empty(0))
    for patch in stored:
        answers.append(Answer(known=opened.target, stored=patch))
        vectors.append(np.asarray(opened.parts[patch.part].array("pooled")[patch.row, 0], np.float32))
    return find_neighbours(searcher, answers, vectors, k, allowed, excluded, biased=note == BIASED)


def make_answer(prediction: Prediction, store: Store, note: str, stored: Stored | None = None) -> Answer:
    """An answer without neighbours yet; `note` is on what a student asks (`note_bias`), and `stored` the patch that the
    image is of.
    """
    # What was asked for are neighbours, and no sets.
    names = [one.name for one in dataclasses.fields(prediction) if one.name != "label_set"]
    fields = {name: getattr(prediction, name) for name in names}
    answer = Answer(known=store.target, stored=stored, **fields)
    return replace(answer, notes=[*prediction.notes, note]) if note and prediction.usable else answer


def _find_own_slides(
    store: Store, images: Sequence[OneImage], stored: Sequence[Stored], slides: str | Location | None
) -> Sequence[frozenset[str]]:
    """The slides of each query, whose patches it is left without."""
    table = as_location(slides) if slides else None
    if table:
        require_names(table, images)
    return find_slides(store, [safe_key(one.stem) for one in images] or [patch.key for patch in stored], table)


def search(
    searcher: Searcher,
    vectors_nD: np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    own: Sequence[Stored | None] | None = None,
    biased: bool = False,
) -> list[list[Hit]]:
    """The k nearest stored latents of each vector, nearest first, in one search.

    `allowed`, bool over the index's table, leaves rows out; `own` names the row that each query is left without;
    `biased` adds the bias of the index to the order.
    """
    # One more than asked for, so that k are left without the query's own row.
    distance_nk, position_nk = searcher.search(vectors_nD, k if own is None else k + 1, allowed, biased)
    found = []
    for number, (distance_k, position_k) in enumerate(zip(distance_nk, position_nk, strict=True)):
        kept = position_k >= 0
        if own is not None and (out := own[number]):
            entries = searcher.table[position_k]
            kept &= (searcher.parts[entries["part"]] != out.part) | (entries["row"] != out.row)
        kept = np.flatnonzero(kept)[:k]
        found.append(_hits(searcher, distance_k[kept], position_k[kept]))
    return found


def _hits(searcher: Searcher, distance_k: np.ndarray, position_k: np.ndarray) -> list[Hit]:
    entries, target = searcher.table[position_k], searcher.store.target
    keys = [bytes(key).decode() for key in entries["key"]]
    twins = near_duplicates(keys, distance_k, searcher.vectors(position_k), choose_near(searcher.document))
    parts = searcher.parts[entries["part"]].tolist()
    return [
        Hit(
            key=key,
            slide=bytes(entry["slide"]).decode() or None,
            split=searcher.store.parts[part].split,
            label=target.name_label(label),
            part=part,
            row=int(entry["row"]),
            distance=float(distance),
            duplicate_of=twin,
        )
        for key, entry, part, label, distance, twin in zip(
            keys, entries, parts, as_labels(entries["label"], target).tolist(), distance_k, twins, strict=True
        )
    ]


def find_neighbours(
    searcher: Searcher,
    answers: Sequence[Answer],
    vectors: Sequence[np.ndarray],
    k: int,
    allowed: np.ndarray | None,
    excluded: Sequence[frozenset[str]] | None,
    biased: bool,
) -> list[Answer]:
    """The answers with their neighbours, by one search for all of the same filter: one for each slide left out.

    `vectors` has the latent of each, `allowed` leaves rows of the index's table out for all, `excluded` the slides that
    each is left without. The patch that an answer is of is left out. Raises `DataError` where one finds nothing.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for number, answer in enumerate(answers):
        if answer.usable:
            groups.setdefault(excluded[number] if excluded else frozenset(), []).append(number)
    found = list(answers)
    for slides, numbers in groups.items():
        allowed_m = allowed
        if slides:
            other_m = searcher.find_other_slides(slides)
            allowed_m = other_m if allowed is None else allowed & other_m
        own = [answers[number].stored for number in numbers] if answers[0].stored else None
        vectors_nD = np.stack([vectors[number] for number in numbers])
        for number, hits in zip(numbers, search(searcher, vectors_nD, k, allowed_m, own, biased), strict=True):
            found[number] = replace(answers[number], neighbours=hits)
    lacking = [answer.name for answer in found if answer.usable and not answer.neighbours]
    if lacking:
        why = "once its own row is left out"
        if excluded is not None:
            why += ", and the rows of its slide and of unknown slides"
        raise DataError(f"nothing is left to find for {lacking[0]} {why}: query with fewer filters")
    return found
