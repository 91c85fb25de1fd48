"""H&E query -> hallucinated latent -> nearest teacher latents; or a stored IHC latent -> its nearest.

    store = Store("runs/demo/latents")
    answers = query(load_scorer("runs/demo/student"), store, [Path("he.png")], k=5, levels=["3+"])
    answers = query(None, store, keys=["00012_test_3+"], k=5, exclude_same_slide=True)
    answers[0].hits[0].key, answers[0].vote.level

`lgd query` prints what `lgd.evaluate.answer` makes of it; nothing is left on disk but the `--sheet`.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lgd.config import LEVEL_NAMES
from lgd.data.pairs import read_slides, safe_key
from lgd.errors import ConfigError, DataError
from lgd.evaluate.answer import Answer, Hit, Stored, near_duplicates
from lgd.evaluate.predict import ScoredImage, Scorer, as_level, require_names, score_files
from lgd.evaluate.scale import Mpp
from lgd.models.methods import METHODS, PROPOSED
from lgd.store.latents import Store, as_levels
from lgd.store.search import Searcher

_NEAR_IN_ORDER = 5


class _Question(NamedTuple):
    """A query before it is searched: an `Answer` without hits, and its latent."""

    image: Path | None
    prediction: dict[str, Any]
    stored: Stored | None
    vector_D: np.ndarray
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.stored.key if self.stored else str(self.image)


def check_pair(scorer: Scorer, store: Store) -> None:
    """Raise `DataError` unless the student hallucinates the latents of the teacher that made the store."""
    if scorer.method is None or scorer.method.retrieves_by != "latents":
        raise DataError(
            f"the student {scorer.folder} hallucinates no latents ({scorer.name}): query with one that does, such as "
            f"{METHODS[PROPOSED].title}"
        )
    there, asked = store.recipe.teacher.weights_sha256, scorer.config.teacher_sha256 or ""
    if there != asked:
        raise DataError(
            f"the store {store.folder} was made by another teacher ({there[:12]}) than the one that this student "
            f"hallucinates ({asked[:12]}): use the store that it was trained on, or cache and train again"
        )


def query(
    scorer: Scorer | None,
    store: Store,
    images: Sequence[Path] = (),
    k: int = 5,
    *,
    keys: Sequence[str] = (),
    splits: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
    exclude_same_slide: bool = False,
    slides: Path | None = None,
    mpp: Mpp = None,
    unread: list[ScoredImage] | None = None,
) -> list[Answer]:
    """The k nearest stored IHC latents of each H&E image, or of each stored patch of `keys`, which needs no scorer.

    A stored patch is left out of its own answer; of a key that several parts have, each patch is a query of its own.
    `splits` and `levels` (0, 1+, 2+, 3+) narrow what is searched. `exclude_same_slide` leaves out patches of the
    query's slide, and those whose slide is unknown, since they may be of it. The slide of a query is that of `slides`,
    a CSV with columns key (file name without suffix) and slide, or else that of the stored patch of this key. Images
    that cannot be used have no answer where there is a list for them, `unread`.

    Raises `ConfigError` for what cannot be asked, and `DataError` for a store without a fitting index, a student of
    another teacher, an image that cannot be read, an unknown key or slide, and filters that leave nothing.
    """
    if k < 1:
        raise ConfigError(f"-k is {k}: ask for at least 1 neighbour")
    if images and keys:
        raise ConfigError("distances of an image and of a stored latent do not compare: give images or --key, not both")
    if not images and not keys:
        raise ConfigError("nothing is asked: give H&E images, or --key KEY of stored patches")
    if images:
        if scorer is None:
            raise ConfigError("an image needs a student to hallucinate its latent: give one, such as --model DIR")
        check_pair(scorer, store)
    if slides and not exclude_same_slide:
        raise ConfigError("--slides is used by --exclude-same-slide only: give both, or neither")
    searcher = Searcher(store)
    allowed = _allowed(searcher, store, splits, levels)
    asked = [] if images else _by_key(store, keys)
    excluded = None
    if slides:
        require_names(slides, images)
    if exclude_same_slide:
        excluded = _slides_of(store, [safe_key(path.stem) for path in images] or [q.name for q in asked], slides)
    if images:
        # Last, because it takes the longest.
        assert scorer is not None
        scored = list(score_files(scorer, images, mpp, keep_going=unread is not None))
        if unread is not None:
            unread += [one for one in scored if not one.values]
        if excluded is not None:
            excluded = [slides for one, slides in zip(scored, excluded, strict=True) if one.values]
        asked = [
            _Question(one.path, as_level(one.values["probability"]), None, one.values["pooled"], one.notes)
            for one in scored
            if one.values
        ]
        if not asked:
            return []
    found = _search_all(searcher, store, asked, k, allowed, excluded)
    return [
        Answer(
            image=question.image,
            level=question.prediction.get("level"),
            probabilities=question.prediction.get("probabilities"),
            stored=question.stored,
            hits=hits,
            notes=question.notes,
        )
        for question, hits in zip(asked, found, strict=True)
    ]


def search(
    searcher: Searcher,
    store: Store,
    vectors_nD: np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    own: Sequence[Stored | None] | None = None,
) -> list[list[Hit]]:
    """The k nearest stored latents of each vector, nearest first, in one search.

    `allowed`, bool over the index's table, leaves rows out; `own` names the row that each query is left without.
    """
    if not np.isfinite(vectors_nD).all():
        raise DataError("a latent is not finite: the training of the student diverged, lower train.lr")
    # One more than asked for, so that k are left without the query's own row.
    distance_nk, position_nk = searcher.search(vectors_nD, k if own is None else k + 1, allowed)
    found = []
    for number, (distance_k, position_k) in enumerate(zip(distance_nk, position_nk, strict=True)):
        out = own[number] if own is not None else None
        kept = position_k >= 0
        if out is not None:
            entries = searcher.table[position_k]
            kept &= (searcher.parts[entries["part"]] != out.part) | (entries["row"] != out.row)
        kept = np.flatnonzero(kept)[:k]
        found.append(_hits(searcher, store, distance_k[kept], position_k[kept]))
    return found


def _hits(searcher: Searcher, store: Store, distance_k: np.ndarray, position_k: np.ndarray) -> list[Hit]:
    if not len(position_k):
        return []
    entries = searcher.table[position_k]
    keys = [bytes(key).decode() for key in entries["key"]]
    twins = near_duplicates(keys, distance_k, searcher.vectors(position_k))
    parts = searcher.parts[entries["part"]].tolist()
    return [
        Hit(
            key=key,
            slide=bytes(entry["slide"]).decode() or None,
            split=store.parts[part].split,
            level=_level(level),
            part=part,
            row=int(entry["row"]),
            distance=float(distance),
            duplicate_of=twin,
        )
        for key, entry, part, level, distance, twin in zip(
            keys, entries, parts, as_levels(entries["label"]).tolist(), distance_k, twins, strict=True
        )
    ]


def _level(level: int) -> str | None:
    return None if level < 0 else LEVEL_NAMES[level]


def _search_all(
    searcher: Searcher,
    store: Store,
    asked: Sequence[_Question],
    k: int,
    allowed: np.ndarray | None,
    excluded: Sequence[frozenset[str]] | None,
) -> list[list[Hit]]:
    """One search for all queries of the same filter: one in all, or one a distinct slide that is left out."""
    vectors_nD = np.stack([question.vector_D for question in asked])
    own = [question.stored for question in asked] if asked[0].stored else None
    if excluded is None:
        found = search(searcher, store, vectors_nD, k, allowed, own)
    else:
        found = [[] for _ in asked]
        names, slide_m = np.unique(searcher.table["slide"], return_inverse=True)
        for slides in dict.fromkeys(excluded):
            rows = [row for row, those in enumerate(excluded) if those == slides]
            other = ~np.isin(names, [b"", *(slide.encode() for slide in slides)])[slide_m]
            mine = [own[row] for row in rows] if own else None
            answers = search(searcher, store, vectors_nD[rows], k, other if allowed is None else allowed & other, mine)
            for row, hits in zip(rows, answers, strict=True):
                found[row] = hits
    lacking = [question.name for question, hits in zip(asked, found, strict=True) if not hits]
    if lacking:
        why = "once its own row is left out"
        if excluded is not None:
            why += ", and the rows of its slide and of unknown slides"
        raise DataError(f"nothing is left to find for {lacking[0]} {why}: query with fewer filters")
    return found


def _allowed(
    searcher: Searcher, store: Store, splits: Sequence[str] | None, levels: Sequence[str] | None
) -> np.ndarray | None:
    """Which rows of the index's table the filters leave, or None for all."""
    if not len(searcher.table):
        raise DataError(f"the index of {store.folder} holds no latent: set latents.gallery, and run lgd build-index")
    allowed_m = np.ones(len(searcher.table), bool)
    asked = []
    if splits is not None:
        split_of = np.array([store.parts[number].split for number in searcher.parts])
        split_m = split_of[searcher.table["part"]]
        there = np.unique(split_m).tolist()
        _check_names("--split", splits, there, " (those of the index: latents.gallery sets them for lgd build-index)")
        allowed_m &= np.isin(split_m, list(splits))
        asked.append(f"split {' or '.join(splits)}")
    if levels is not None:
        _check_names("--level", levels, LEVEL_NAMES, "")
        allowed_m &= np.isin(searcher.table["label"], [LEVEL_NAMES.index(level) for level in levels])
        asked.append(f"level {' or '.join(levels)}")
    if not asked:
        return None
    if not allowed_m.any():
        raise DataError(f"the index of {store.folder} holds no latent of {' and '.join(asked)}: widen the filters")
    return allowed_m


def _check_names(option: str, given: Sequence[str], known: Sequence[str], more: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ConfigError(f"{option} {','.join(unknown)}: there are {', '.join(known)}{more}")


def _by_key(store: Store, keys: Sequence[str]) -> list[_Question]:
    """A question for each stored patch of the keys, in the order of the parts."""
    questions = []
    for key in dict.fromkeys(keys):
        found = store.find(key)
        if not found:
            close = difflib.get_close_matches(key, _near_in_order(store, key), 3, 0.6)
            near = f"close to it are {', '.join(close)}" if close else "none of its keys is close"
            if safe_key(key) != key:
                near = "a key has no dots and no slashes, and images are named before --key"
            raise DataError(f"the store {store.folder} has no patch {key!r:.120}; {near}")
        for number, row in found:
            part = store.parts[number]
            vector_D = np.asarray(part.array("pooled")[row, 0], np.float32)
            level, slide = int(as_levels(part.array("label")[row])), bytes(part.array("slide")[row]).decode()
            stored = Stored(key=key, slide=slide or None, split=part.split, level=_level(level), part=number, row=row)
            questions.append(_Question(None, {}, stored, vector_D))
    return questions


def _near_in_order(store: Store, key: str) -> list[str]:
    """Keys that a mistyped one may mean: each part's first and last, and those beside its place in a part."""
    near: dict[str, None] = {}
    for part in store.parts:
        near |= dict.fromkeys((part.first, part.last))
        if part.first <= key <= part.last:
            keys = part.array("key")
            place = int(np.searchsorted(keys, key.encode()))
            beside = keys[max(0, place - _NEAR_IN_ORDER) : place + _NEAR_IN_ORDER]
            near |= dict.fromkeys(bytes(there).decode() for there in beside)
    return list(near)


def _slides_of(store: Store, keys: Sequence[str], path: Path | None) -> list[frozenset[str]]:
    """The slides of each key: of the CSV, or of every stored patch of this key."""
    named = read_slides(path) if path else {}
    found = []
    for key in keys:
        if key in named:
            found.append(frozenset([named[key]]))
            continue
        there = [bytes(store.parts[part].array("slide")[row]).decode() for part, row in store.find(key)]
        found.append(frozenset(there) if all(there) else frozenset())
    unknown = [key for key, slides in zip(keys, found, strict=True) if not slides]
    if unknown:
        raise DataError(
            f"the slide of {len(unknown)} of {len(keys)} queries is unknown, the first of them {unknown[0]}, and "
            f"--exclude-same-slide needs it: give --slides CSV (columns key,slide) with a row {unknown[0]},SLIDE"
        )
    return found
