import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lgd.base.errors import DataError
from lgd.metrics import Predictions
from lgd.report.biased import add_bias
from lgd.report.embeddings import (
    Embedding,
    average_precision,
    by_level,
    explained_by_levels,
    he_only,
    mean_with_interval,
    measure,
    measure_hubs,
    own_pair,
    own_ranks,
    ridge,
)


def predictions(level, groups):
    n = len(level)
    return Predictions(
        name="H&E-only",
        keys=[f"p{row}" for row in range(n)],
        groups=groups,
        level=np.asarray(level, np.int64),
        probability=np.full((n, 4), 0.25),
    )


@pytest.fixture
def made():
    """60 training and 20 scored patches: latents are linear in the features, and one direction is that of the level."""
    random = np.random.default_rng(0)
    level = random.integers(0, 4, 80)
    features = random.normal(size=(80, 6)) + 30
    features[:, 0] += 3 * level
    latents = (features - features.mean(0)) @ random.normal(size=(6, 5)) + 0.01 * random.normal(size=(80, 5))
    groups = [f"s{row // 4}" for row in range(80)]
    train = predictions(level[:60], groups[:60])
    return train, predictions(level[60:], groups[60:]), features, latents


def test_ridge_equals_its_normal_equations(made):
    train, _, features, latents = made
    mapped, alpha = ridge(features[:60], latents[:60], train.groups, features[60:])
    mean, scale = features[:60].mean(0), features[:60].std(0)
    x, queries = (features[:60] - mean) / scale, (features[60:] - mean) / scale
    weights = np.linalg.solve(x.T @ x + alpha * np.eye(6), x.T @ (latents[:60] - latents[:60].mean(0)))
    np.testing.assert_allclose(mapped, queries @ weights + latents[:60].mean(0), atol=1e-8)


def test_how_much_of_the_latents_the_levels_tell():
    random = np.random.default_rng(0)
    soft = random.dirichlet(np.ones(4), 400)
    turned, _ = np.linalg.qr(random.normal(size=(10, 10)))
    told = np.hstack([soft[:, :3], random.normal(size=(400, 7))])
    for noise, least, most in ((0, 0.99, 1.001), (0.05, 0.4, 0.95), (100, -0.2, 0.1)):
        latents = np.hstack([5 * np.ones((400, 1)), told[:, :3], noise * told[:, 3:9]]) @ turned
        found = explained_by_levels(latents[:300], soft[:300], latents[300:], soft[300:])
        assert least < found < most
        design, unit = np.hstack([soft, np.ones((400, 1))]), latents / np.linalg.norm(latents, axis=1, keepdims=True)
        fitted = design[300:] @ np.linalg.lstsq(design[:300], unit[:300], rcond=None)[0]
        spread = ((unit[300:] - unit[:300].mean(0)) ** 2).sum()
        assert found == pytest.approx(1 - ((unit[300:] - fitted) ** 2).sum() / spread, abs=1e-6)


def test_alpha_is_chosen_on_left_out_slides():
    """Features name the slide, and latents are of the slide: only within a slide does a small alpha pay."""
    random = np.random.default_rng(0)
    slide = np.repeat(np.arange(12), 10)
    features = np.eye(12)[slide] + 0.01 * random.normal(size=(120, 12))
    latents = random.normal(size=(12, 3))[slide]
    by_slide = ridge(features, latents, [str(s) for s in slide], features[:1])[1]
    by_patch = ridge(features, latents, [str(row) for row in range(120)], features[:1])[1]
    assert by_patch < by_slide


def test_he_alone_takes_part_by_its_features_and_through_the_ridge(made):
    train, scored, features, latents = made
    own, mapped = he_only("H&E-only", features[60:], features[:60], train, latents[:60], latents[60:])
    np.testing.assert_allclose(own.train_mD.mean(0), 0, atol=1e-12)
    assert own.own_nD is None and "H&E" in own.gallery
    found = measure([own, mapped], scored, train.level, 20, 0)
    assert found.gallery_rows == 60 and found.at == 10
    first, second = found.embeddings
    assert first.own_pair is None
    assert second.own_pair.median_rank < 3 < second.own_pair.chance_median_rank
    assert first.by_level["overall"].value > first.by_level["overall"].chance + 0.1


def test_a_training_split_of_one_slide_has_no_ridge(made):
    train, _, features, latents = made
    single = predictions(train.level, ["s"] * 60)
    assert len(he_only("H&E-only", features[60:], features[:60], single, latents[:60], latents[60:])) == 1


def test_a_perfect_embedding_is_measured_as_one(made):
    train, scored, _, latents = made
    corners = np.eye(4)
    perfect = Embedding(
        name="levels",
        gallery="levels",
        queries_nD=corners[scored.level],
        train_mD=corners[train.level],
        own_nD=latents[60:, :4],
    )
    (row,) = measure([perfect], scored, train.level, 20, 0).embeddings
    assert row.by_level["overall"].value == row.by_level["overall"].low == 1


def numbers(ranks, gallery):
    return own_pair(ranks, gallery, [str(row) for row in range(len(ranks))], 20, 0)


def test_own_ranks_equal_a_sort():
    random = np.random.default_rng(0)
    gallery = random.normal(size=(30, 5))
    queries = 0.7 * gallery[:12] + random.normal(size=(12, 5))
    expected = []
    for row, vector in enumerate(queries):
        cosine = [q @ vector / np.linalg.norm(q) for q in gallery]
        expected.append(sorted(cosine, reverse=True).index(cosine[row]) + 1)
    ranks = own_ranks(queries, gallery)
    assert ranks.tolist() == expected
    found = numbers(ranks, 30)
    assert found.median_rank == np.median(expected)
    for k in (1, 5, 10):
        entry = getattr(found, f"recall_at_{k}")
        assert entry.value == np.mean(np.array(expected) <= k)
        assert entry.low <= entry.value <= entry.high
        assert getattr(found, f"chance_recall_at_{k}") == k / 30
    assert 1 < found.median_rank < 15


def test_a_collapsed_network_ranks_like_chance():
    gallery = np.random.default_rng(0).normal(size=(21, 8))
    found = numbers(own_ranks(np.tile(gallery[:1], (21, 1)), gallery), 21)
    assert found.median_rank == found.chance_median_rank == 11
    flat = numbers(own_ranks(gallery, np.ones((21, 8))), 21)
    assert flat.median_rank == 11
    assert flat.recall_at_10.value == 0


def test_ranks_of_what_is_not_finite_are_refused():
    with pytest.raises(DataError, match="not finite"):
        own_ranks(np.full((1, 3), np.nan), np.ones((2, 3)))


def test_hubs_equal_a_count():
    """Of 250 rows three are a hundredth; vectors that share a direction make some of them hubs."""
    random = np.random.default_rng(0)
    queries, gallery = random.normal(size=(250, 6)) + 1, random.normal(size=(250, 6))
    groups = [f"s{row // 5}" for row in range(250)]
    found = measure_hubs(queries, gallery, groups, 50, 0)
    cosine = queries @ gallery.T / np.linalg.norm(gallery, axis=1)
    order = [sorted(range(250), key=lambda column: -row[column])[:10] for row in cosine.tolist()]
    first, ten = Counter(row[0] for row in order), Counter(itertools.chain(*order))
    assert found.hubs == 3
    assert found.first_answers.value == pytest.approx(sum(count for _, count in first.most_common(3)) / 250)
    assert found.answers.value == pytest.approx(sum(count for _, count in ten.most_common(3)) / 2500)
    assert found.never_found.value == pytest.approx(1 - len(ten) / 250)
    for one, chance in (
        (found.first_answers, found.chance_first_answers),
        (found.answers, found.chance_answers),
        (found.never_found, found.chance_never_found),
    ):
        assert one.low <= one.value <= one.high and one.value > chance
    even = measure_hubs(gallery, gallery, groups, 50, 0)
    assert even.first_answers.value == pytest.approx(3 / 250), "each finds itself first"
    one = measure_hubs(np.ones((20, 6)), gallery[:20], groups[:20], 50, 0)
    assert [one.first_answers.value, one.answers.value, one.never_found.value] == pytest.approx([1, 0.1, 0.5])


def naive(query, level, gallery, levels, k):
    """AP@k of one query, by the words of its definition."""
    rows = [row for row in range(len(levels)) if levels[row] >= 0]
    total = sum(levels[row] == level for row in rows)
    if level < 0 or not total:
        return math.nan
    rows.sort(key=lambda row: -(gallery[row] @ query) / np.linalg.norm(gallery[row]))
    relevant = [levels[row] == level for row in rows[:k]]
    return sum(np.mean(relevant[: i + 1]) for i in range(len(relevant)) if relevant[i]) / min(k, total, len(rows))


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_average_precision_equals_its_definition(k):
    random = np.random.default_rng(k)
    queries, gallery = random.normal(size=(40, 6)), random.normal(size=(35, 6))
    level, levels = random.integers(-1, 4, 40), random.integers(-1, 3, 35)
    found, _ = average_precision(queries, level, gallery, levels, k)
    expected = [naive(q, own, gallery, levels, k) for q, own in zip(queries, level, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(found[level == 3]).all() and np.isnan(found[level == -1]).all()


@given(levels=st.lists(st.integers(0, 1), min_size=1, max_size=6), k=st.integers(1, 7))
@settings(max_examples=40)
def test_chance_is_the_mean_over_all_rankings(levels, k):
    """Vectors on a circle, so that the similarity to the query falls from row to row, in every order of the levels."""
    angle = np.linspace(0.1, 1, len(levels))
    gallery = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    orders = [np.array(order) for order in itertools.permutations(levels)]
    query = np.array([[1.0, 0.0]])
    found = [average_precision(query, np.array([1]), gallery, order, k) for order in orders]
    chances = {round(float(chance[0]), 12) for _, chance in found}
    if 1 not in levels:
        assert math.isnan(found[0][0][0]) and math.isnan(found[0][1][0])
        return
    assert len(chances) == 1
    assert float(found[0][1][0]) == pytest.approx(np.mean([precision[0] for precision, _ in found]))


def test_ties_do_not_follow_the_order_of_the_gallery():
    levels = np.repeat([0, 1, 2, 3], 50)
    found, chance = average_precision(np.ones((4, 2)), np.arange(4), np.ones((200, 2)), levels, 200)
    assert found == pytest.approx(chance, abs=0.1)


def test_without_a_gallery_nothing_is_defined():
    empty = average_precision(np.ones((3, 2)), np.arange(3), np.empty((0, 2)), np.empty(0, np.int64), 10)
    assert np.isnan(empty).all()
    found = by_level(*empty, np.arange(3), ["a", "b", "c"], 10, 0)
    assert found["overall"].queries == 0
    assert found["overall"].value is found["overall"].low is found["overall"].chance is None


def test_means_by_level_leave_out_what_is_undefined():
    precision = np.array([1.0, 0.5, np.nan, 0.25])
    found = by_level(precision, np.full(4, 0.1), np.array([0, 0, 1, 2]), ["a", "b", "a", "b"], 50, 0)
    assert found["overall"].value == pytest.approx(1.75 / 3)
    assert found["0"].value == 0.75 and found["0"].low == 0.5 and found["0"].high == 1.0
    assert found["1+"].queries == 0 and found["1+"].value is None
    assert found["2+"].value == 0.25 and found["2+"].low is None, "one slide has no interval"
    assert [found[name].queries for name in found] == [3, 2, 0, 1, 0]


def test_the_interval_resamples_groups_as_a_loop_does():
    random = np.random.default_rng(0)
    values, groups = random.normal(size=30), [f"s{row % 15}" for row in range(30)]
    found = mean_with_interval(values, groups, 4000, 0)
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 15, 15)
        means.append(np.concatenate([values[s::15] for s in drawn]).mean())
    # Wider than from 2.5 to 97.5, as Student's t is of 15.
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, 14) * np.sqrt(15 / 14))
    low, high = np.percentile(means, [tail, 100 - tail])
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), scale=st.sampled_from([0.0, 0.05, 0.5, 3.0]), seed=st.integers(0, 99))
def test_cosines_of_vectors_with_a_bias_rank_as_cosine_plus_bias(rows, scale, seed):
    random = np.random.default_rng(seed)
    queries, gallery, bias = random.normal(size=(5, 4)), random.normal(size=(rows, 4)), scale * random.normal(size=rows)
    found_queries, found_gallery = add_bias(queries, gallery, bias)

    def cosines(a, b):
        return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)

    expected = cosines(queries, gallery) + bias
    found = cosines(found_queries, found_gallery)
    # Of one query all are scaled alike.
    np.testing.assert_allclose(found * np.sqrt(2 * (1 + (bias**2).max())), expected, atol=1e-12)
