"""Which rows of an index a query may find: those of some splits, and of some labels."""

import math
from collections.abc import Sequence

import numpy as np

from lgd.base.errors import ConfigError, DataError, require
from lgd.base.target import Target
from lgd.retrieval.search import Searcher


def find_allowed(searcher: Searcher, splits: Sequence[str] | None, labels: Sequence[str] | None) -> np.ndarray | None:
    """Which rows of the index's table the filters leave, or None for all."""
    store = searcher.store
    filters: dict[str, np.ndarray] = {}
    if splits is not None:
        split_of = np.array([store.parts[number].split for number in searcher.parts])
        split_m = split_of[searcher.table["part"]]
        there = np.unique(split_m).tolist()
        _check_names("--split", splits, there, " (those of the index: latents.gallery sets them for lgd build-index)")
        filters[f"split {' or '.join(splits)}"] = np.isin(split_m, list(splits))
    if labels is not None:
        name = f"{store.target.label_word} {' or '.join(labels)}"
        filters[name] = _match_labels(searcher.table["label"], labels, store.target)
    if not filters:
        return None
    allowed_m: np.ndarray = np.logical_and.reduce([*filters.values()])
    if not allowed_m.any():
        raise DataError(f"the index of {store.folder} holds no latent of {' and '.join(filters)}: widen the filters")
    return allowed_m


def _match_labels(label_m: np.ndarray, labels: Sequence[str], target: Target) -> np.ndarray:
    """Which of stored labels, float32, are of some classes, or in some ranges of values."""
    if not target.is_number:
        _check_names("--label", labels, target.classes, "")
        return np.isin(label_m, [target.classes.index(label) for label in labels])
    matched_m = np.zeros(len(label_m), bool)
    for text in labels:
        low, high = _parse_range(text, target)
        matched_m |= (label_m >= low) & (label_m <= high)
    return matched_m


def _parse_range(text: str, target: Target) -> tuple[np.float32, np.float32]:
    """The ends of a range, which belong to it, as numbers of the type that labels are stored in."""
    low, colon, high = text.partition(":")
    try:
        ends = float(low) if low.strip() else -math.inf, float(high) if high.strip() else math.inf
    except ValueError:
        ends = math.nan, math.nan
    if not colon or not ends[0] <= ends[1] or ends == (-math.inf, math.inf):
        raise ConfigError(
            f"--label {text}: {target.name} is {target.describe_labels()}; give ranges LOW:HIGH, such as 10:20, 10: or "
            ":20, the lower end first"
        )
    with np.errstate(over="ignore"):
        return np.float32(ends[0]), np.float32(ends[1])


def _check_names(option: str, given: Sequence[str], known: Sequence[str], more: str) -> None:
    unknown = [name for name in given if name not in known]
    require(bool(given) and not unknown, f"{option} {','.join(unknown)}: there are {', '.join(known)}{more}")
