"""Predictions as CSV: every one, and readable again."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from drawn_answers import ALL, HER2, KI67, draw_answers

from lgd.io.tables import read_csv, unescape_cell
from lgd.labels.conformal import Conformal, Threshold
from lgd.report.listing import BY_PATCH, BY_SLIDE, write_predictions
from lgd.report.slides import by_slide


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: unescape_cell(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_every_answer_is_listed(target, tmp_path):
    scored = [draw_answers(target, sites={"center": ["A"] * 30 + ["=B"] * 30}), draw_answers(target, "H&E-only")]
    write_predictions(tmp_path, scored)
    slides = [by_slide(one) for one in scored]
    for name, some, own in ((BY_PATCH, scored, ("key", "group")), (BY_SLIDE, slides, ("slide",))):
        rows = read(tmp_path / name)
        sets = "interval" if target.is_number else "label_set"
        assert [*rows[0]] == ["model", *own, "label", "predicted", *target.classes, sets, "center", "scanner"]
        assert {row[sets] for row in rows} == {""}, "nothing calibrated any"
        assert [(row["model"], row[own[0]]) for row in rows] == [(one.name, key) for one in some for key in one.keys]
        said = [pair for one in some for pair in zip(one.label.tolist(), one.answer.tolist(), strict=True)]
        for row, (label, answer) in zip(rows, said, strict=True):
            if target.is_number:
                # Six digits of each.
                assert float(row["label"]) == pytest.approx(label, rel=1e-5)
                assert float(row["predicted"]) == pytest.approx(answer, rel=1e-5)
            else:
                assert (row["label"], row["predicted"]) == (target.classes[label], target.classes[answer])
        output = np.concatenate([one.output for one in some])
        for number, column in enumerate(target.classes):
            np.testing.assert_allclose([float(row[column]) for row in rows], output[:, number], rtol=1e-5)
        assert {row["scanner"] for row in rows} == {""} and {row["center"] for row in rows} == {"A", "=B", ""}


def test_what_is_unknown_is_empty(tmp_path):
    write_predictions(tmp_path, [draw_answers(HER2, label=[-1, 2], groups="aa")])
    assert [row["label"] for row in read(tmp_path / BY_PATCH)] == ["", "2+"]
    write_predictions(tmp_path, [draw_answers(KI67, label=[np.nan] * 2)])
    assert [(row["label"], row["predicted"]) for row in read(tmp_path / BY_PATCH)] == [("", "")] * 2


def test_any_text_is_only_text(tmp_path):
    names = ["=1+1", "a\nb", "x,y", '"', "ü漢"]
    sites = {"center": names, "scanner": names[::-1]}
    write_predictions(tmp_path, [draw_answers(HER2, names[0], label=[0] * 5, groups=names, sites=sites)])
    rows = [row for _, row in read_csv(tmp_path / BY_PATCH, ["model", "group"])]
    assert [row["group"] for row in rows] == [row["center"] for row in rows] == names
    assert not (tmp_path / BY_SLIDE).exists(), "every slide is a single patch"


@pytest.mark.parametrize(("target", "cell"), [(HER2, "0,1+,2+,3+"), (KI67, "0.0 to 100.0")], ids=["classes", "number"])
def test_sets_are_listed_where_a_model_has_them(target, cell, tmp_path):
    wide = Threshold(highest=1000.0, slides=30)
    conformal = Conformal(coverage=0.9, kind=target.kind, patch=wide, slide=None)
    write_predictions(tmp_path, [replace(draw_answers(target), conformal=conformal)])
    name = "interval" if target.is_number else "label_set"
    assert {row[name] for row in read(tmp_path / BY_PATCH)} == {cell}
    assert {row[name] for row in read(tmp_path / BY_SLIDE)} == {""}
