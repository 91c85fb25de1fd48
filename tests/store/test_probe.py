"""A probe reads levels off stored latents: what it fits, how its ridge is chosen, and of which rows it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.cli import main
from lgd.cli.contents import check
from lgd.cli.facts import as_lines, describe
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_all, read_labels
from lgd.store.probe import (
    ProbeDocument,
    find_probe,
    fit_probe,
    lacks_probe,
    probe_path,
)
from lgd.store.regression import RIDGES, UNSEEN, regress_labels
from lgd.store.store import Store

HER2 = find_target("her2")


def draw_latents(levels, slides=24, rows=20, dim=12, noise=1.0, seed=0):
    """Latents of slides, each of one level that shifts them, and their level and slide."""
    dice = np.random.default_rng(seed)
    level_n = np.repeat(np.resize(levels, slides), rows)
    slide_n = np.repeat(np.arange(slides), rows)
    latent_nD = dice.normal(size=(len(level_n), dim)) * noise + dice.normal(size=(4, dim))[level_n]
    # Scales that differ, as those of networks do, and a number that never changes.
    latent_nD *= np.logspace(-2, 2, dim)
    latent_nD[:, 3] = 0.25
    return latent_nD, level_n, slide_n


def probabilities(latent_nD, weight_4D, bias_4):
    return torch.from_numpy(latent_nD @ weight_4D.T + bias_4).softmax(dim=1).numpy()


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [0, 2], [1, 2, 3]])
def test_it_is_the_regression_of_standardised_latents(levels):
    latent_nD, level_n, slide_n = draw_latents(levels)
    weight_4D, bias_4, ridge, losses = regress_labels(latent_nD, level_n, slide_n, HER2)
    naive = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (ridge * len(level_n)), max_iter=5000, tol=1e-8))
    naive.fit(latent_nD, level_n)
    found_n4 = probabilities(latent_nD, weight_4D, bias_4)
    np.testing.assert_allclose(found_n4[:, levels], naive.predict_proba(latent_nD), atol=1e-3)
    absent = [level for level in range(4) if level not in levels]
    assert (found_n4[:, absent] == 0).all() and (bias_4[absent] == UNSEEN).all()
    assert [*losses] == [*RIDGES] and losses[ridge] == min(losses.values())
    again = regress_labels(latent_nD, level_n, slide_n, HER2)
    assert np.array_equal(weight_4D, again[0]) and np.array_equal(bias_4, again[1]) and ridge == again[2]


def test_its_ridge_is_chosen_on_slides_that_it_did_not_see():
    """Latents that tell slides apart fit their patches well: rows left out, and not slides, would ask for no ridge."""
    latent_nD, level_n, slide_n = draw_latents([0, 1, 2, 3], slides=16, rows=10, dim=24, noise=0.3)
    latent_nD = latent_nD / np.logspace(-2, 2, 24) + 2 * np.random.default_rng(1).normal(size=(16, 24))[slide_n]
    of_slides = regress_labels(latent_nD, level_n, slide_n, HER2)
    of_rows = regress_labels(latent_nD, level_n, np.arange(len(level_n)), HER2)
    assert of_slides[2] > 10 * of_rows[2]


def test_where_no_slide_can_be_left_out_the_ridge_is_the_strongest():
    for slides, rows in ((2, 8), (2, 1)):
        latent_nD, level_n, slide_n = draw_latents([1, 3], slides=slides, rows=rows)
        *_, ridge, losses = regress_labels(latent_nD, level_n, slide_n, HER2)
        assert ridge == RIDGES[0] and losses == {}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=30))
@settings(max_examples=30)
def test_any_labels_of_two_levels_or_more_give_finite_numbers(rows):
    level_n, slide_n = (np.array(column) for column in zip(*rows, strict=True))
    level_n[:2] = 0, 3
    latent_nD = np.random.default_rng(0).normal(size=(len(rows), 5))
    weight_4D, bias_4, _, losses = regress_labels(latent_nD, level_n, slide_n, HER2)
    assert np.isfinite(weight_4D).all() and np.isfinite(bias_4).all() and np.isfinite([*losses.values()]).all()
    chosen_n = probabilities(latent_nD, weight_4D, bias_4).argmax(axis=1)
    assert {*chosen_n} <= {*level_n}


@pytest.fixture
def store(copy_of):
    return Store(copy_of.latents.dir)


@pytest.fixture
def training(copy_of):
    return ShardSet.open(copy_of.shard_dirs).of_split("train")


def test_a_store_s_probe_is_of_the_training_split_s_labelled_rows(store, training):
    assert lacks_probe(store, training)
    with pytest.raises(DataError, match=r"probe/teacher.json is missing.*run lgd cache-latents"):
        find_probe(store, training)
    made = fit_probe(store, training)
    assert find_probe(store, training) == made == ProbeDocument.read(probe_path(store))
    parts = store.parts_of(training)
    level_n, pooled_nD = read_labels(parts), read_all(parts, "pooled")[:, 0].astype(np.float64)
    assert sum(made.patches.values()) == (level_n >= 0).sum() and made.slides == len({*read_all(parts, "slide")})
    naive, *_ = regress_labels(pooled_nD, level_n, read_all(parts, "slide"), HER2)
    np.testing.assert_allclose(made.weight, naive)
    logits_n4 = made.network().logits_of(torch.from_numpy(pooled_nD).float()).double().numpy()
    np.testing.assert_allclose(logits_n4, pooled_nD @ naive.T + made.bias, atol=1e-3)


def test_a_probe_of_other_rows_is_not_taken(store, training):
    fit_probe(store, training)
    assert lacks_probe(store, training[:-1])
    with pytest.raises(DataError, match="of other rows than the training split: run lgd cache-latents"):
        find_probe(store, training[:-1])
    # Of one level, or of no shard, there is none to be had, and none is asked for.
    one_level = [one for one in training if len({*read_labels(store.parts_of([one]))}) == 1][:1]
    assert one_level and find_probe(store, one_level) is None and find_probe(store, []) is None


def test_verify_and_info_know_it(store, copy_of, training, capsys):
    before = describe(store.folder)
    assert "probe_of_teacher" not in before and check(store.folder)[1] == []
    made = fit_probe(store, training)
    assert check(store.folder)[1] == []
    (line,) = [line for line in as_lines(describe(store.folder)) if line.startswith("probe of teacher")]
    assert f"{sum(made.patches.values())} labelled training patches of {made.slides} slides" in line
    path = Path(probe_path(store))
    whole = path.read_text()
    path.write_text(whole.replace(f'"slides": {made.slides}', f'"slides": {made.slides + 1}'))
    assert path.read_text() != whole
    (problem,) = check(store.folder)[1]
    assert str(path) in problem and "edited or damaged" in problem
    made.model_copy(update={"parts": (*made.parts, "0" * 64)}).write(path)
    (problem,) = check(store.folder)[1]
    assert "is of rows that the store does not have: run lgd cache-latents" in problem
    assert main(["verify", str(store.folder)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", [[0.0]] * 3), ("weight", [[0.0]] * 3 + [[]]), ("patches", {"0": 3}), ("x", 1)],
)
def test_an_odd_probe_is_refused_by_its_field(store, training, field, value):
    from lgd.io.digests import digest_of

    fit_probe(store, training)
    path = Path(probe_path(store))
    fields = {name: old for name, old in json.loads(path.read_text()).items() if name != "digest"} | {field: value}
    path.write_text(json.dumps(fields | {"digest": digest_of(fields)}))
    with pytest.raises(DataError, match=f"teacher.json: .*{field}.*run lgd cache-latents again"):
        find_probe(store, training)
