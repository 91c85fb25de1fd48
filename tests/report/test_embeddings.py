import numpy as np
import pytest

from lgd.metrics import Predictions
from lgd.report.embeddings import Embedding, explained_by_levels, he_only, measure, ridge


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
