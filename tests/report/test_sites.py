"""Scores by center and scanner, on drawn answers whose labels go with them or do not."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from drawn_answers import ALL, HER2, KI67, SUBTYPE, draw_answers
from scipy import stats

from lgd.report.colour import Colours
from lgd.report.sites import NOTHING_TAUGHT, Taught, associate, describe_training, find_site_caveats, measure_sites
from lgd.shards.manifest import Manifest, PatchMeta
from lgd.shards.shard_set import ShardFolder, ShardSet

TARGETS = pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)


def place(predictions, center_of, kind="center"):
    """The same labels, each slide (s0, s1, ...) of the center that its number gives."""
    centers = [center_of(int(group[1:])) for group in predictions.groups]
    known = {"label": predictions.label, "groups": predictions.groups, "sites": {kind: centers}}
    return draw_answers(predictions.target, predictions.name, **known)


def link(predictions, seed=0):
    one = predictions
    return associate(one.target, one.groups, one.label, one.sites["center"], seed)


def order_by_label(target, slides=24):
    """Slides in the order of their labels."""
    label = np.sort(draw_answers(target, slides=slides, each=4).label)
    return draw_answers(target, label=label, groups=[f"s{row // 4}" for row in range(len(label))])


@TARGETS
def test_each_model_is_scored_on_the_patches_of_each_center(target):
    one = place(draw_answers(target), lambda slide: "AB"[slide % 2] if slide < 10 else "")
    other = draw_answers(target, "other", label=one.label, groups=one.groups)
    (by,) = measure_sites([one, other], NOTHING_TAUGHT, 30, 0)
    names = [(site, name) for site in ("A", "B", "") for name in ("LGD-Net", "other")]
    assert [(row.site, row.model) for row in by.rows] == names and (by.kind, by.trained) == ("center", None)
    assert [row.scored for row in by.rows[::2]] == [25, 25, 10] and by.rows[0].groups == 5
    of_a = one.select(np.array([row for row, center in enumerate(one.sites["center"]) if center == "A"]))
    values = one.measures.score(of_a.label, of_a.output)
    for name in one.measures.headline:
        assert by.rows[0].metrics[name].value == pytest.approx(values[name])


def test_one_center_or_none_has_no_table():
    for center_of in (lambda slide: "A", lambda slide: "", lambda slide: "A" if slide else ""):
        assert measure_sites([place(draw_answers(HER2), center_of)], NOTHING_TAUGHT, 10, 0) == []
    assert measure_sites([draw_answers(HER2)], NOTHING_TAUGHT, 10, 0) == []
    unknown = place(draw_answers(HER2), lambda slide: "AB"[slide % 2]).without_labels()
    assert measure_sites([unknown], NOTHING_TAUGHT, 10, 0) == []


def test_a_center_of_one_slide_has_no_interval():
    (by,) = measure_sites([place(draw_answers(KI67), lambda slide: "A" if slide else "B")], NOTHING_TAUGHT, 30, 0)
    alone = by.rows[1]
    assert (alone.site, alone.groups) == ("B", 1)
    assert alone.metrics["mae"].value is not None and alone.metrics["mae"].low is None


@TARGETS
def test_labels_that_go_with_a_center_are_noticed(target):
    linked = link(place(order_by_label(target), lambda slide: "AB"[slide >= 12]))
    blind = link(place(order_by_label(target), lambda slide: "AB"[slide % 2]))
    assert linked.statistic == ("eta_squared" if target.is_number else "cramers_v") and linked.slides == 24
    assert linked.value > 2 * linked.chance and linked.p < 0.004
    assert blind.value < 1.5 * blind.chance and blind.p > 0.2


def test_the_statistics_are_those_of_scipy():
    center = [(slide * 7) % 11 % 3 for slide in range(20)]
    drawn = place(draw_answers(SUBTYPE, slides=20, each=3), lambda slide: "ABC"[center[slide]])
    table = np.zeros((3, 3), int)
    np.add.at(table, (center, np.arange(20) % 3), 1)
    assert link(drawn).value == pytest.approx(stats.contingency.association(table, "cramer"))
    values = place(draw_answers(KI67, slides=20, each=3), lambda slide: "AB"[slide % 2])
    means = values.label.reshape(20, 3).mean(1)
    f = stats.f_oneway(means[::2], means[1::2]).statistic
    assert link(values).value == pytest.approx(f / (f + 18))


def test_false_alarms_are_rare():
    """In worlds whose centers have nothing to do with labels, p is below 0.05 in 5 % of them."""
    random, alarms, groups = np.random.default_rng(0), 0, [f"s{row}" for row in range(12)]
    for seed in range(25):
        center = ["AB"[one] for one in random.integers(0, 2, 12)]
        drawn = draw_answers(SUBTYPE, label=random.integers(0, 3, 12), groups=groups, sites={"center": center})
        found = link(drawn, seed)
        alarms += found is not None and found.p < 0.05
    assert alarms <= 4


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_measured_is_not():
    for center_of in (lambda slide: "A", lambda slide: f"C{slide}", lambda slide: ""):
        assert link(place(draw_answers(HER2, slides=8), center_of)) is None
    for target in (HER2, KI67):
        alike = draw_answers(target, label=[2] * 8, groups=[f"s{row}" for row in range(8)])
        assert link(place(alike, lambda slide: "AB"[slide % 2])) is None


def test_a_slide_of_two_labels_counts_for_each_in_part():
    """And one without one center is left out."""
    label, groups = [0, 1, 0, 0, 1, 1, 0, 1], ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]
    sites = {"center": ["A", "A", "A", "A", "B", "B", "A", "B"]}
    found = link(draw_answers(SUBTYPE, label=label, groups=groups, sites=sites))
    table = np.array([[1.5, 0.5], [0.0, 1.0]])
    expected = table.sum(1, keepdims=True) * table.sum(0) / 3
    assert found.slides == 3
    assert found.value == pytest.approx(np.sqrt(((table - expected) ** 2 / expected).sum() / 3))


def list_caveats(predictions, trained, links=None):
    taught = Taught(None, trained, links or {})
    return find_site_caveats(predictions, measure_sites([predictions], taught, 10, 0), taught)


def test_caveats_name_what_goes_with_a_center_and_what_training_lacked():
    linked = place(order_by_label(HER2), lambda slide: "AB"[slide >= 12])
    first, *others = list_caveats(linked, {"center": ["A", "B", ""]})
    assert first.startswith("The level goes with the center: Cramér's V ") and "over 24 slides" in first
    everywhere = (
        "Every center of this split was in training: nothing here says how the networks do on slides of another"
    )
    assert others == [f"{everywhere} one."]
    blind = place(order_by_label(KI67), lambda slide: "AB"[slide % 2])
    assert list_caveats(blind, {"center": ["A"]}) == ["Centers of this split that were not in training: B."]
    assert list_caveats(blind, {}) == list_caveats(blind, None) == [], "of training nothing is known"
    new = place(draw_answers(HER2), lambda slide: "new")
    assert list_caveats(new, {"center": ["A", "B"]}) == ["Centers of this split that were not in training: new."]


def test_caveats_name_centers_of_few_slides():
    few = place(draw_answers(HER2), lambda slide: "A" if slide < 10 else f"a center of slide {slide}", "scanner")
    said = "Scanners with few slides or source patches: a center of slide 10 (1), a center of slide 11 (1)."
    assert list_caveats(few, None)[-1] == f"{said} Their scores mean little."
    many = list_caveats(place(draw_answers(HER2, slides=40), lambda slide: f"C{slide // 2}"), None)
    assert many[-1].count("(2)") == 10 and "and 10 more" in many[-1]


@pytest.mark.parametrize("target", [HER2, KI67], ids=lambda target: target.name)
def test_what_training_could_learn_of_a_center_is_a_caveat(target):
    """Of the patches that the colour-only row is fitted on; those without a label tell nothing."""
    drawn = place(order_by_label(target), lambda slide: "AB"[slide >= 12])
    rows = [*zip(drawn.groups, drawn.label.tolist(), drawn.sites["center"], strict=True), ("s0", None, "B")]
    metas = [PatchMeta.model_construct(group=group, label=label, center=at, scanner=None) for group, label, at in rows]
    manifest = Manifest.model_construct(target=target, splits={})
    shards = ShardSet((ShardFolder(Path("shards"), manifest, (Namespace(target=target),)),))
    taught = describe_training(shards, Colours(metas, np.empty((len(metas), 9))), 0)
    assert (taught.values, {*taught.sites["center"]}, [*taught.links]) == (None, {"A", "B"}, ["center"])
    assert taught.links["center"] == link(drawn)
    scored = place(draw_answers(target, slides=24), lambda slide: "AB"[slide % 2])
    first = list_caveats(scored, taught.sites, taught.links)[0]
    assert first.startswith(f"In training the {target.label_word} goes with the center: ") and "24 slides" in first
    nothing = describe_training(shards, Colours([], np.empty((0, 9))), 0)
    assert nothing == NOTHING_TAUGHT
