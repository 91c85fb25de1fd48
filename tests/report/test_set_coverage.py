"""What a report says of label sets."""

from types import SimpleNamespace

import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.labels.conformal import calibrate
from lgd.labels.predictions import Predictions
from lgd.report.set_coverage import label_sets_section, measure_label_sets

HER2, KI67 = find_target("her2"), find_target("ki67")


def draw(target, slides=40, patches=6, seed=0, calibrated=30):
    """Answers of slides whose patches share a label and an error, with sets that other such slides calibrated."""
    dice, both = np.random.default_rng(seed), []
    for count in (calibrated, slides):
        groups = [f"s{number:03d}" for number in range(count) for _ in range(patches)]
        slide_n = np.repeat(np.arange(count), patches)
        if target.is_number:
            label = dice.uniform(10, 90, count)[slide_n]
            output = (label + dice.normal(0, 8, count)[slide_n] + dice.normal(0, 2, len(label)))[:, None]
        else:
            label = dice.integers(target.width, size=count)[slide_n]
            logits = 2 * np.eye(target.width)[label] + dice.normal(size=(count, target.width))[slide_n]
            output = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        both.append((label, output, groups))
    label, output, groups = both[0]
    conformal = calibrate(target.kind, output, label, groups)
    label, output, groups = both[1]
    keys = [f"k{row}" for row in range(len(label))]
    facts = {"keys": keys, "groups": groups, "label": label, "output": output}
    return Predictions(target=target, name="model", conformal=conformal, **facts)


@pytest.mark.parametrize("target", [HER2, KI67], ids=["classes", "number"])
def test_sets_are_measured_by_patch_and_by_slide(target):
    one = draw(target)
    (found,) = measure_label_sets([one], resamples=50, seed=0)
    for measured in (found.by_patch, found.by_slide):
        assert measured.coverage.low < 0.9 < 1.0001 and measured.coverage.value > 0.75
        assert len(measured.by_class) == (0 if target.is_number else 4)
    if not target.is_number:
        sets = one.conformal.find_sets(one.output)
        held = sets[np.arange(len(one.label)), one.label]
        assert found.by_patch.coverage.value == pytest.approx(held.mean())
        assert found.by_patch.size.value == pytest.approx(sets.sum(1).mean())
    results = SimpleNamespace(label_sets=(found,), provenance={"split": "val"})
    text = "\n".join(label_sets_section(results, target))
    assert "calibrated the sets, so that the coverage shows nothing" in text
    assert "in 90 % of new slides" in text and ("of 3+" in text) != target.is_number
    assert ("temperature" in text) == ("no single class" in text) != target.is_number
    assert ("width (%)" in text) == target.is_number and "| model | slide | 30 |" in text


def test_what_was_not_calibrated_is_left_out():
    few, none = draw(HER2, calibrated=5), draw(HER2)
    assert few.conformal.patch.highest is None
    assert measure_label_sets([few, none.without_labels()], resamples=5, seed=0) == []
    assert label_sets_section(SimpleNamespace(label_sets=None, provenance={}), HER2) == []
