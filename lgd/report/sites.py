"""Scores by center and by scanner, and how far the label goes with them.

Where the slides of one center are mostly of one label, a network can learn the look of that center in place of the
tissue, and the scores over all centers do not show it; those within each center do.

Shapes: S slides, C centers or scanners, K classes (1 of values).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lgd.base.labels import Labels, find_known
from lgd.base.target import Target
from lgd.labels.predictions import Predictions, score_with_intervals
from lgd.metrics import Floats, Ints
from lgd.report.caveats import FEW_GROUPS
from lgd.report.colour import Colours
from lgd.report.results import Association, AtSite, BySite
from lgd.shards.manifest import Values
from lgd.shards.shard_set import ShardSet

_DRAWS = 999
_SURE = 0.05
"""Below this chance of slides without any such link, the label is said to go with a site."""
_STATISTICS = {"cramers_v": "Cramér's V", "eta_squared": "eta squared"}
_MOST = 10
"""Sites that a sentence names."""


class Taught(NamedTuple):
    """What is known of the training patches."""

    values: Values | None
    """Where labels are values."""
    sites: Mapping[str, Sequence[str]] | None
    """Their centers and scanners; None where they were not looked at."""
    links: Mapping[str, Association]
    """Center or scanner -> how far the label goes with it, where that can be said."""


NOTHING_TAUGHT = Taught(None, None, {})


def describe_training(shards: ShardSet, colours: Colours, seed: int) -> Taught:
    """What is known of the training patches that the colour-only row is fitted on."""
    target, sites = shards.target, colours.read_sites()
    groups, label_n = [meta.group for meta in colours.metas], colours.read_labels(target)
    links = {kind: associate(target, groups, label_n, site_n, seed) for kind, site_n in sites.items()}
    known = {kind: link for kind, link in links.items() if link is not None}
    return Taught(shards.summarise_values("train"), sites if colours.metas else None, known)


def measure_sites(scored: Sequence[Predictions], taught: Taught, resamples: int, seed: int) -> list[BySite]:
    """How each model scores the labelled patches of each center and of each scanner, where two of them are known."""
    found = []
    for kind, site_n in scored[0].labelled().sites.items():
        names = sorted({*site_n} - {""})
        if len(names) < 2:
            continue
        rows = []
        for site in [*names, *[""] * ("" in site_n)]:
            chosen = np.array([row for row, name in enumerate(site_n) if name == site], np.int64)
            # One that was taught no labels has no answers.
            for one in (predictions.labelled() for predictions in scored if predictions.known.any()):
                some = one.select(chosen)
                metrics = score_with_intervals(some, resamples, seed, [*one.measures.headline])
                groups = len(set(some.groups))
                rows.append(AtSite(site=site, model=one.name, scored=len(some.keys), groups=groups, metrics=metrics))
        trained = None if taught.sites is None else sorted({*taught.sites.get(kind, ())} - {""})
        student = scored[0]
        link = associate(student.target, student.groups, student.label, student.sites[kind], seed)
        found.append(BySite.model_validate({"kind": kind, "rows": rows, "association": link, "trained": trained}))
    return found


def associate(
    target: Target, groups: Sequence[str], label_n: Labels, site_n: Sequence[str], seed: int
) -> Association | None:
    """How far the label goes with the center, or the scanner, over slides that have both.

    Cramér's V of classes and eta squared of values; a slide with patches of several labels counts for each of them in
    part, or by the mean of its values. The test draws anew which slide is of which site. None where no two slides share
    a site, or all labels are alike.
    """
    of_group: dict[str, set[str]] = {}
    known = np.flatnonzero(find_known(label_n)).tolist()
    for row in known:
        of_group.setdefault(groups[row], set()).add(site_n[row])
    slides = sorted(group for group, sites in of_group.items() if len(sites) == 1 and "" not in sites)
    place = {slide: number for number, slide in enumerate(slides)}
    rows = [row for row in known if groups[row] in place]
    names, site_S = np.unique([next(iter(of_group[slide])) for slide in slides], return_inverse=True)
    if not 1 < len(names) < len(slides):
        return None
    slide_n, label_n = np.array([place[groups[row]] for row in rows]), label_n[rows]
    part_nK = label_n[:, None] if target.is_number else np.eye(target.width)[label_n.astype(np.int64)]
    label_SK = np.zeros((len(slides), part_nK.shape[1]))
    np.add.at(label_SK, slide_n, part_nK)
    label_SK /= np.bincount(slide_n, minlength=len(slides))[:, None]
    measure = _eta_squared if target.is_number else _cramers_v
    value = measure(label_SK, site_S, len(names))
    if np.isnan(value):
        return None
    random = np.random.default_rng(seed)
    drawn = np.array([measure(label_SK, random.permutation(site_S), len(names)) for _ in range(_DRAWS)])
    return Association(
        statistic="eta_squared" if target.is_number else "cramers_v",
        value=value,
        chance=float(drawn.mean()),
        # Rounding moves draws that are the true one.
        p=float((1 + (drawn >= value - 1e-9).sum()) / (1 + _DRAWS)),
        slides=len(slides),
    )


def _cramers_v(label_SK: Floats, site_S: Ints, sites: int) -> float:
    table_CK = np.zeros((sites, label_SK.shape[1]))
    np.add.at(table_CK, site_S, label_SK)
    table_CK = table_CK[:, table_CK.sum(0) > 0]
    total, least = table_CK.sum(), min(table_CK.shape) - 1
    if least < 1:
        return np.nan
    expected_CK = table_CK.sum(1, keepdims=True) * table_CK.sum(0) / total
    return float(np.sqrt(((table_CK - expected_CK) ** 2 / expected_CK).sum() / (total * least)))


def _eta_squared(value_S1: Floats, site_S: Ints, sites: int) -> float:
    value_S = value_S1[:, 0] - value_S1.mean()
    whole = (value_S**2).sum()
    if whole <= 1e-12 * (value_S1**2).sum():
        return np.nan
    sums_C, count_C = np.bincount(site_S, value_S, sites), np.bincount(site_S, minlength=sites)
    return float((sums_C**2 / count_C).sum() / whole)


def find_site_caveats(predictions: Predictions, sites: Sequence[BySite], taught: Taught) -> list[str]:
    """What must be known of the centers and scanners of the scored patches, where any is known."""
    found, known, word = [], predictions.labelled(), predictions.target.label_word
    found += [
        f"In training the {word} goes with the {kind}: {_describe(link)}. A network can learn the look of a {kind} in "
        "place of the tissue, and loses that at another one."
        for kind, link in taught.links.items()
        if link.p < _SURE
    ]
    found += [
        f"The {word} goes with the {by.kind}: {_describe(by.association)}. A network that knows the {by.kind} by its "
        f"look gains from that; scores within each {by.kind} do not."
        for by in sites
        if by.association is not None and by.association.p < _SURE
    ]
    for kind, site_n in known.sites.items():
        slides = {
            site: {group for group, of in zip(known.groups, site_n, strict=True) if of == site} for site in site_n
        }
        names = sorted({*slides} - {""})
        if not names:
            continue
        if few := [f"{name} ({len(slides[name])})" for name in names if len(slides[name]) < FEW_GROUPS]:
            found.append(
                f"{kind.capitalize()}s with few slides or source patches: {_list(few)}. Their scores mean little."
            )
        if not (trained := {*(taught.sites or {}).get(kind, ())} - {""}):
            continue
        new = [name for name in names if name not in trained]
        if not new:
            found.append(
                f"Every {kind} of this split was in training: nothing here says how the networks do on slides of "
                "another one."
            )
        else:
            found.append(f"{kind.capitalize()}s of this split that were not in training: {_list(new)}.")
    return found


def _describe(link: Association) -> str:
    measured = f"{_STATISTICS[link.statistic]} {link.value:.2f} over {link.slides} slides"
    return f"{measured} ({link.chance:.2f} by chance, p = {link.p:.3f})"


def _list(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _MOST} more"] if len(names) > _MOST else []
    return ", ".join([*names[:_MOST], *more])
