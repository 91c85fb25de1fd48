"""What a run measures of retrieval, against what is worked out here from its files."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from lgd.base.errors import DataError
from lgd.report import evaluation, pictures
from lgd.report.embeddings import own_ranks
from lgd.report.grids import draw_grids
from lgd.report.neighbours import average_precision
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import as_labels, read_all
from lgd.store.store import Store
from lgd.stream.reader import Reader
from lgd.train.launch import train_under


@pytest.fixture(scope="module")
def he_only(tissue_run, change, tmp_path_factory):
    folder = tmp_path_factory.mktemp("he-only") / "he"
    config = change(tissue_run, student={"dir": str(folder), "method": "he-only", "epochs": 0.5})
    train_under(config, "student")
    return folder


def measured(config, scorers):
    shards = ShardSet.open(config.shard_dirs)
    training = shards.of_split("train") if config.report.split != "train" else []
    split = shards.of_split(config.report.split)
    scored = [evaluation.Network(one, *score_shards(one, split, threads=1)) for one in scorers]
    store = Store(config.latents.dir)
    return evaluation.measure_retrieval(config, store, training, split, scored[0], scored[1:-1], shards), scored


@pytest.fixture(scope="module")
def scorers(tissue_run, he_only):
    student, baseline = load_scorer(tissue_run.student.dir), load_scorer(he_only)
    return [student, baseline, load_scorer(tissue_run.teacher.dir, "teacher")]


def test_the_measures_are_those_of_the_stored_latents(tissue_run, scorers, caplog):
    with caplog.at_level(logging.INFO, "lgd"):
        found, scored = measured(tissue_run, scorers)
    names = [row.name.split(" (")[0] for row in found.embeddings]
    assert names == [
        "LGD-Net, mapped latents, whitened",
        "LGD-Net, hallucinated latents",
        "H&E-only, its features",
        "H&E-only, ridge to the whitened latents",
        "IHC teacher, true latents",
        "IHC teacher, true latents, whitened",
    ]
    assert [row.own_pair is None for row in found.embeddings] == [False, False, True, False, True, True]
    assert [row.hubs is None for row in found.embeddings] == [False, False, True, False, True, True]
    assert caplog.messages == ["[report] H&E-only: scoring 20 training patches, the gallery of its own features"]
    store = Store(tissue_run.latents.dir)
    train, test = ([part for part in store.parts if part.split == split] for split in ("train", "test"))
    gallery, own = read_all(train, "pooled")[:, 0], read_all(test, "pooled")[:, 0]
    predictions, vectors = scored[0].predictions, scored[0].vectors
    mean, axes = whiten_naively(gallery.astype(np.float64), tissue_run.latents.components)
    mapped, white_own, white_gallery = ((some - mean) @ axes for some in (vectors["query"], own, gallery))
    for row, queries, galleries in ((0, mapped, white_own), (1, vectors["pooled"], own)):
        assert found.embeddings[row].own_pair.median_rank == np.median(own_ranks(queries, galleries))
    levels = as_labels(read_all(train, "label"), store.target)
    rows = ((0, mapped, white_gallery), (1, vectors["pooled"], gallery), (4, own, gallery))
    for row, queries, galleries in (*rows, (5, white_own, white_gallery)):
        precision, chance = average_precision(queries, predictions.label, galleries, levels, 10, 4)
        overall = found.embeddings[row].by_level["overall"]
        assert overall.value == pytest.approx(np.nanmean(precision))
        assert overall.chance == pytest.approx(np.nanmean(chance))
    # The teacher reads the IHC itself, and scoring it gives what the store holds.
    np.testing.assert_allclose(scored[2].vectors["pooled"], own, atol=2e-3)


def whiten_naively(latents, components):
    """Mean and scaled principal axes of at most so many components, up to signs, which no cosine sees."""
    mean = latents.mean(0)
    _, spread, axes = np.linalg.svd(latents - mean, full_matrices=False)
    kept = [
        number for number in range(min(components, len(latents) - 1)) if spread[number] ** 2 > 1e-5 * spread[0] ** 2
    ]
    return mean, axes[kept].T / spread[kept]


def test_latents_are_compared_as_they_are_where_the_run_says_so(tissue_run, scorers, change):
    found, _ = measured(change(tissue_run, latents={"components": 0}), [scorers[0], scorers[2]])
    names = ["LGD-Net, mapped latents", "LGD-Net, hallucinated latents", "IHC teacher, true latents"]
    assert [row.name for row in found.embeddings] == names


def test_with_a_bias_it_is_measured_too(tissue_run, scorers, change):
    found, scored = measured(change(tissue_run, latents={"bias": 5.0}), [scorers[0], scorers[2]])
    biased, plain = found.embeddings[:2]
    assert (biased.name, plain.name) == (f"{plain.name}, with bias", "LGD-Net, mapped latents, whitened")
    store = Store(tissue_run.latents.dir)
    train, test = (read_all([p for p in store.parts if p.split == s], "pooled")[:, 0] for s in ("train", "test"))
    mean, axes = whiten_naively(train.astype(np.float64), tissue_run.latents.components)
    bank = score_shards(scorers[0], ShardSet.open(tissue_run.shard_dirs).of_split("val"), threads=1)[1]["query"]
    queries, own, bank = (
        white / np.linalg.norm(white, axis=1, keepdims=True)
        for white in ((some - mean) @ axes for some in (scored[0].vectors["query"], test, bank))
    )
    score = queries @ own.T - np.log(np.exp(5 * bank @ own.T).sum(0)) / 5
    ranks = 1 + (score > np.diag(score)[:, None]).sum(1)
    assert biased.own_pair.mean_rank.value == pytest.approx(ranks.mean())
    assert biased.own_pair.mean_rank.value != plain.own_pair.mean_rank.value


def test_features_of_he_alone_are_what_its_head_reads(scorers, tissue_run):
    baseline = scorers[1]
    shards = ShardSet.open(tissue_run.shard_dirs).of_split("val")
    predictions, vectors = score_shards(baseline, shards, threads=1)
    features = vectors["features"]
    weight, bias = (p.detach().numpy() for p in (baseline.model.head.weight, baseline.model.head.bias))
    logits = (features @ weight.T + bias) / baseline.config.temperature
    odds = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), predictions.output, atol=1e-5)


def test_a_scored_training_split_is_no_gallery(tissue_run, change, scorers, caplog):
    config = change(tissue_run, report={"split": "train"})
    with caplog.at_level(logging.INFO, "lgd"):
        found, _ = measured(config, scorers)
    assert found.gallery_rows == 0 and not caplog.messages
    assert [row.name for row in found.embeddings] == [
        "LGD-Net, mapped latents, whitened",
        "LGD-Net, hallucinated latents",
        "IHC teacher, true latents",
        "IHC teacher, true latents, whitened",
    ]
    assert found.embeddings[0].by_level["overall"].value is None
    assert found.embeddings[0].own_pair.queries == 20


def test_a_rival_of_another_teacher_has_no_row(tissue_run, scorers):
    student, _, teacher = scorers
    teachers = (student.config.teachers[0].model_copy(update={"weights_sha256": "f" * 64}),)
    stranger = dataclasses.replace(student, config=student.config.model_copy(update={"teachers": teachers}))
    found, _ = measured(tissue_run, [student, stranger, teacher])
    assert len(found.embeddings) == 4
    with pytest.raises(DataError, match="are of another teacher"):
        measured(tissue_run, [stranger, teacher])


def test_the_sheet_takes_the_levels_in_turn(tissue_run, scorers, change):
    config, shards = change(tissue_run, report={"queries": 4}), ShardSet.open(tissue_run.shard_dirs)
    store = Store(config.latents.dir)
    scored = evaluation.Network(scorers[0], *score_shards(scorers[0], shards.of_split("test"), threads=1))
    rows = pictures.read_queries(config, store, shards, scored)
    assert {store.target.classes.index(row.label) for row in rows} == set(scored.predictions.label.tolist()) and len(
        rows
    ) == 4
    assert all(
        len(row.answer.neighbours) == 4 and {hit.split for hit in row.answer.neighbours} == {"train"} for row in rows
    )
    assert pictures.read_queries(change(config, report={"queries": 0}), store, shards, scored) == []


def test_grids_are_those_of_the_store_beside_those_of_the_network(tissue_run, scorers, change, tmp_path):
    """Of a grid that training leaves out nothing is shown; nor of a student that predicts none."""
    shards, store = ShardSet.open(tissue_run.shard_dirs), Store(tissue_run.latents.dir)
    split = shards.of_split("test")
    student = evaluation.Network(scorers[0], *score_shards(scorers[0], split, threads=1))
    patches = pictures.read_grids(tissue_run, store, shards, student)
    rows = pictures.choose_rows(student.predictions, 4).tolist()
    assert len(patches) == len(rows) == 4
    reader, parts = Reader(split, ("he",), 64), [part for part in store.parts if part.split == "test"]
    for patch, row in zip(patches, rows, strict=True):
        with torch.no_grad():
            out = scorers[0].model(torch.from_numpy(reader.read(row).images["he"]).permute(2, 0, 1)[None])
        assert patch.title.startswith(f"{student.predictions.keys[row]}  slide slide-")
        assert patch.mpp == pytest.approx(0.46 * 128 / 300) and patch.he.shape == patch.ihc.shape == (300, 300, 3)
        assert np.array_equal(patch.measured["membrane"], read_all(parts, "membrane")[row])
        assert np.array_equal(patch.measured["nuclei"][..., 0], read_all(parts, "nuclei")[row])
        np.testing.assert_allclose(patch.predicted["membrane"], out["membrane"][0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(np.log1p(patch.predicted["nuclei"][..., 0]), out["nuclei"][0], rtol=1e-3, atol=1e-5)
    draw_grids(patches[:1], tmp_path / "grids.png")
    with Image.open(tmp_path / "grids.png") as picture:
        assert picture.width > 5 * 200 and picture.height > 2 * 200
    without = change(tissue_run, student={"nuclei_weight": 0.0})
    shown = pictures.read_grids(without, store, shards, student)
    assert {name for patch in shown for name in patch.measured} == {"membrane"}
    assert not pictures.read_grids(tissue_run, store, shards, student._replace(scorer=scorers[1]))


def test_a_student_that_saw_no_label_is_measured_without_scores(tissue_run, scorers):
    """By retrieval alone: its levels are none."""
    config = scorers[0].config
    training = config.training.model_copy(update={"labels": {}})
    untaught = dataclasses.replace(scorers[0], config=config.model_copy(update={"training": training}))
    retrieval, (scored, *_) = measured(tissue_run, [untaught, scorers[2]])
    predictions = scored.predictions
    assert not predictions.known.any() and np.isnan(predictions.output).all()
    results = evaluation.measure_results(
        [predictions], caveats=[], provenance={}, resamples=10, seed=0, retrieval=retrieval
    )
    assert results.labelled == 0 and results.models[0].by_patch.metrics["accuracy"].value is None
    assert results.retrieval.embeddings[0].own_pair.queries == len(predictions.keys)
