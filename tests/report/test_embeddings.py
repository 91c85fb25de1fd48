import itertools
from collections import Counter

import numpy as np
import pytest
from drawn_answers import HER2, HSCORE, KI67, SUBTYPE, draw_answers
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.report.biased import add_bias
from lgd.report.embeddings import (
    Embedding,
    explained_by_labels,
    he_only,
    measure,
    measure_hubs,
    own_pair,
    own_ranks,
    ridge,
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
    train, scored = (
        draw_answers(HER2, "H&E-only", label=level[rows], groups=groups[rows]) for rows in (slice(60), slice(60, 80))
    )
    return train, scored, features, latents


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
        found = explained_by_labels(latents[:300], soft[:300], latents[300:], soft[300:])
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
    found = measure([own, mapped], scored, train.label, 20, 0)
    assert found.gallery_rows == 60 and found.at == 10
    first, second = found.embeddings
    assert first.own_pair is None
    assert second.own_pair.median_rank < 3 < second.own_pair.chance_median_rank
    assert first.by_level["overall"].value > first.by_level["overall"].chance + 0.1


def test_a_training_split_of_one_slide_has_no_ridge(made):
    train, _, features, latents = made
    single = draw_answers(HER2, label=train.label, groups=["s"] * 60)
    assert len(he_only("H&E-only", features[60:], features[:60], single, latents[:60], latents[60:])) == 1


def test_a_perfect_embedding_is_measured_as_one(made):
    train, scored, _, latents = made
    corners = np.eye(4)
    perfect = Embedding(
        name="levels",
        gallery="levels",
        queries_nD=corners[scored.label],
        train_mD=corners[train.label],
        own_nD=latents[60:, :4],
    )
    (row,) = measure([perfect], scored, train.label, 20, 0).embeddings
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


@pytest.mark.parametrize("target", [KI67, HSCORE], ids=lambda target: target.name)
def test_values_of_neighbours_are_compared_with_that_of_the_query(target):
    random = np.random.default_rng(0)
    train, scored = (draw_answers(target, slides=slides, each=4) for slides in (20, 8))
    turned, _ = np.linalg.qr(random.normal(size=(2, 2)))

    def place(some):
        """On a quarter of a circle, in the order of the values."""
        angle = some.label / 300
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) @ turned

    told = Embedding("values", place(scored), place(train))
    blind = Embedding("blind", random.normal(size=(32, 5)), random.normal(size=(80, 5)))
    found = measure([told, blind], scored, train.label, 50, 0)
    first, second = (row.by_value for row in found.embeddings)
    assert all(row.by_level == {} for row in found.embeddings) and first.queries == 32
    assert first.value == pytest.approx(first.best) and first.low <= first.value <= first.high
    assert second.value == pytest.approx(first.chance, rel=0.25) and first.chance == second.chance > 3 * first.best
    assert "The gallery of the values" in found.caveats[0] and "differences by value" in found.caveats[2]


def test_how_much_of_the_latents_values_explain():
    value = np.random.default_rng(0).uniform(0, 1, (60, 1))
    latents = np.column_stack([np.cos(value), np.sin(value)])
    assert explained_by_labels(latents[:40], value[:40], latents[40:], value[40:]) > 0.95


def test_neighbours_of_other_classes_are_counted_by_class():
    train, scored = (draw_answers(SUBTYPE, slides=slides, each=4) for slides in (9, 6))
    corners = np.eye(3)
    found = measure([Embedding("a", corners[scored.label], corners[train.label])], scored, train.label, 20, 0)
    assert [*found.embeddings[0].by_level] == ["overall", *SUBTYPE.classes] and found.embeddings[0].by_value is None
    assert {one.value for one in found.embeddings[0].by_level.values()} == {1.0}
    assert "of the precisions by label" in found.caveats[2]
