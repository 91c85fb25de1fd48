"""The bias of an index against hubs, beside its formula and in queries of a run."""

# Fixtures of test_index are imported: a parameter has the name of one.
# ruff: noqa: F401, F811

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_index import KINDS, QUERIES, SHARDS, bank_of, build, forge, gallery, made, store, whiten_naively

from lgd import pipeline
from lgd.base.errors import DataError
from lgd.cli import main
from lgd.cli.facts import describe
from lgd.io.files import read_json
from lgd.io.location import as_location
from lgd.retrieval import bias as bias_module
from lgd.retrieval.bias import learn_bias, open_bank
from lgd.retrieval.factory import unit
from lgd.retrieval.index_files import IndexDocument
from lgd.retrieval.queries import BIASED, OTHER_STUDENT, query
from lgd.retrieval.search import Searcher, problems
from lgd.scoring.predict import load_scorer, score_images, score_shards
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store

BANK = np.random.default_rng(3).standard_normal((40, 16)).astype(np.float32) + 0.5


def bias_naively(vectors, bank, sharpness):
    """The formula, with all similarities."""
    bias = -logsumexp(sharpness * vectors.astype(float) @ bank.astype(float).T, axis=1) / sharpness
    return bias - bias.mean()


@settings(max_examples=60, deadline=None)
@given(
    sharpness=st.floats(1e-4, 1000),
    rows=st.integers(1, 60),
    bank=st.integers(1, 30),
    parts=st.integers(1, 5),
    block=st.sampled_from([7, 1024]),
    seed=st.integers(0, 99),
)
def test_it_is_that_of_its_naive_twin_however_the_gallery_comes(sharpness, rows, bank, parts, block, seed):
    random = np.random.default_rng(seed)
    vectors, queries = (unit(random.standard_normal((count, 5))) for count in (rows, bank))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bias_module, "_BLOCK", block)
        found = learn_bias(np.array_split(vectors, parts), queries, sharpness)
    assert found.dtype == np.float32 and found.shape == (rows,) and abs(found.mean()) < 1e-6
    np.testing.assert_allclose(found, bias_naively(vectors, queries, sharpness), atol=1e-6)


def test_at_its_ends_it_is_the_mean_and_the_greatest_cosine():
    vectors, queries = unit(QUERIES), unit(BANK)
    cosine = vectors @ queries.T
    for sharpness, expected in ((1e-300, -cosine.mean(1)), (1e300, -cosine.max(1))):
        np.testing.assert_allclose(learn_bias([vectors], queries, sharpness), expected - expected.mean(), atol=1e-6)
    assert learn_bias([], queries, 3.0).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [0, 5])
def test_answers_are_those_of_brute_force_with_and_without_bias(store, kind, components):
    document, new = build(store, kind, ["train"], recall=0.3, seed=0, components=components, bank=bank_of(BANK))
    assert (
        new and problems(store) == [] and (document.width, document.dim) == ((components or 16) + 1, components or 16)
    )
    assert document.queries == "20 latents of val, with and without bias"
    vectors, keys = gallery(store)
    whiten = whiten_naively(store, "train", components) if components else lambda some: some.astype(float)
    white, queries, bank = map(unit, map(whiten, (vectors, QUERIES, BANK)))
    searcher, exact = Searcher(store), not kind.endswith("8")
    bias = bias_naively(white, bank, 5.0)
    assert bias.std() > 0.01
    allowed = np.arange(280) % 3 == 0
    for biased in (True, False):
        for some in (None, allowed):
            distances, positions = searcher.search(QUERIES, 280, some, biased)
            found = positions >= 0
            assert found.sum(1).tolist() == [280 if some is None else allowed.sum()] * 9
            for query_D, row, near in zip(queries, positions, distances, strict=True):
                cosine = dict(zip(keys.tolist(), white @ query_D, strict=True))
                push = dict(zip(keys.tolist(), bias * biased, strict=True))
                names = searcher.table["key"][row[row >= 0]].tolist()
                np.testing.assert_allclose(near[row >= 0], [1 - cosine[n] for n in names], atol=2e-3 if exact else 0.04)
                scores = np.array([cosine[name] + push[name] for name in names])
                assert (np.diff(scores) <= (2e-3 if exact else 0.08)).all(), "in the order of cosine and bias"
            assert (distances[~found] == np.inf).all()
    assert searcher.vectors(np.arange(280)).shape == (280, document.dim)
    np.testing.assert_allclose(np.linalg.norm(searcher.vectors(np.arange(280)), axis=1), 1, atol=0.02)


def test_it_pulls_hubs_down(store):
    """Queries that all lie near one direction find the same few rows; the bias of such a bank spreads them."""
    random = np.random.default_rng(5)
    bank, queries = (QUERIES[0] + 0.7 * random.standard_normal((200, 16)).astype(np.float32) for _ in range(2))
    build(store, "Flat", ["train"], recall=0.99, seed=0, bank=bank_of(bank, 20.0))
    searcher = Searcher(store)
    found = {biased: len(np.unique(searcher.search(queries, 5, None, biased)[1])) for biased in (True, False)}
    assert found[True] > 1.5 * found[False]


def test_an_index_of_another_bank_is_another_index(store):
    asked = {"recall": 0.9, "seed": 0, "components": 4}
    plain, _ = build(store, "Flat", ["train"], **asked)
    first, new = build(store, "Flat", ["train"], bank=bank_of(BANK), **asked)
    assert new and first.faiss != plain.faiss and first.table == plain.table
    lazy = replace(bank_of(BANK), make_latents=lambda: pytest.fail("the H&E was scored again"))
    assert build(store, "Flat", ["train"], bank=lazy, **asked) == (first, False)
    for other in (bank_of(BANK, 6.0), bank_of(BANK, student="6" * 64)):
        assert build(store, "Flat", ["train"], bank=other, **asked)[1]
    assert build(store, "Flat", ["train"], **asked)[1]
    said = "lgd-index/5"
    assert read_json(store.folder / "index" / "teacher" / "index.json")["format"] == said == IndexDocument.FORMAT


@pytest.mark.faults
def test_a_bias_that_the_document_denies_is_refused(store):
    build(store, "IVF10,SQfp16", ["train"], recall=0.5, seed=0, bank=bank_of(BANK))
    forge(store, "", b"", bias=None)
    with pytest.raises(DataError, match="faiss is not the index that index.json describes"):
        Searcher(store)


@pytest.fixture(scope="module")
def biased_run(tissue_run, change, tmp_path_factory):
    """`tissue_run` with a store of its own, whose index has a bias."""
    folder = tmp_path_factory.mktemp("biased") / "latents"
    shutil.copytree(tissue_run.latents.dir, folder)
    run = {"dir": str(folder.parent / "run")}
    config = change(tissue_run, run=run, latents={"dir": str(folder), "bias": 20.0, "components": 4})
    pipeline.build_index(config)
    return config


def rank_naively(config, images, sharpness):
    """The keys of the training rows by the formula, of each H&E, and their distances."""
    store, shards = Store(config.latents.dir), ShardSet.open(config.shard_dirs)
    scorer = load_scorer(config.student.dir)
    whiten = whiten_naively(store, "train", config.latents.components)
    parts = [part for part in store.parts if part.split == "train"]
    gallery = unit(whiten(np.concatenate([part.array("pooled")[:, 0] for part in parts])))
    keys = np.concatenate([part.array("key") for part in parts])
    bank = unit(whiten(score_shards(scorer, shards.of_split("val"), threads=1)[1]["query"]))
    bias = bias_naively(gallery, bank, sharpness) if sharpness else 0
    for _, values in score_images(scorer, images):
        cosine = gallery @ unit(whiten(values["query"][None]))[0]
        order = np.argsort(-(cosine + bias))
        yield [bytes(key).decode() for key in keys[order]], 1 - cosine[order]


@pytest.fixture(scope="module")
def images(tissue):
    return sorted((tissue / "HE" / "test").iterdir())[:5]


def test_a_query_by_he_meets_the_bias_and_its_answer_says_so(biased_run, images, capsys):
    command = ["query", "--model", biased_run.student.dir, "--store", biased_run.latents.dir, "-k", "20"]
    assert main([*command, "--json", *map(str, images)]) == 0
    out, err = capsys.readouterr()
    assert f"5 of 5 queries: {BIASED}" in err.splitlines()
    risen = []
    for answer, (keys, distances) in zip(json.loads(out), rank_naively(biased_run, images, 20.0), strict=True):
        assert BIASED in answer["notes"]
        np.testing.assert_allclose([hit["distance"] for hit in answer["neighbours"]], distances, atol=1e-3)
        assert [hit["key"] for hit in answer["neighbours"]] == keys
        risen.append((np.diff(distances) >= 0).all())
    assert not all(risen), "the bias is seen"


def test_a_stored_ihc_asks_without_the_bias(biased_run, tissue_run, change):
    plain = Store(biased_run.latents.dir)
    key = bytes(plain.parts[0].array("key")[0]).decode()
    (answer,) = query(None, plain, keys=[key], k=19)
    distances = [hit.distance for hit in answer.neighbours]
    assert distances == sorted(distances) and list(answer.notes) == []


def test_another_student_asks_without_the_bias_and_is_told(biased_run, images, tmp_path):
    shutil.copytree(biased_run.latents.dir, tmp_path / "latents")
    store = Store(tmp_path / "latents")
    said = read_json(store.folder / "index" / "teacher" / "index.json")["bias"]
    forge(store, "", b"", bias=said | {"student": "6" * 64})
    answers = query(biased_run.student.dir, store, images, 20)
    for answer, (keys, distances) in zip(answers, rank_naively(biased_run, images, 0), strict=True):
        assert OTHER_STUDENT in answer.notes and BIASED not in answer.notes
        np.testing.assert_allclose([hit.distance for hit in answer.neighbours], distances, atol=1e-3)
        assert [hit.key for hit in answer.neighbours] == keys


def test_info_and_verify_know_the_bias(biased_run):
    facts = describe(as_location(biased_run.latents.dir))
    student = load_scorer(biased_run.student.dir).config.weights_sha256
    assert facts["index_of_teacher"].endswith(f", bias 20 of student {student[:12]}")
    assert problems(Store(biased_run.latents.dir)) == []


def test_without_a_student_the_remedy_is_named(biased_run, change, tmp_path, caplog):
    with pytest.raises(DataError) as error:
        pipeline.build_index(change(biased_run, student={"dir": str(tmp_path / "none")}))
    assert str(error.value) == (
        f"latents.bias is 20, which is learnt from what the student makes of H&E: {tmp_path}/none/config.json is "
        "missing: it holds no trained student; run lgd train first (or set latents.bias to 0; after lgd train, run lgd "
        "build-index)"
    )
    assert problems(Store(biased_run.latents.dir)) == [], "the index before is still there"


def test_without_a_split_val_the_bank_is_the_training_split(tissue_run, caplog):
    shards = ShardSet.open(tissue_run.shard_dirs)
    scorer = load_scorer(tissue_run.student.dir)
    with caplog.at_level(logging.WARNING, "lgd"):
        bank = open_bank(scorer, "", shards, 3.0, threads=1)
    assert not caplog.messages and bank.source.split == "val" and len(bank.make_latents()) == 8
    few = ShardSet(tuple(replace(one, shards=[s for s in one.shards if s.split != "val"]) for one in shards.folders))
    with caplog.at_level(logging.WARNING, "lgd"):
        bank = open_bank(scorer, "", few, 3.0, threads=1)
    assert len(caplog.messages) == 1 and "there is no split val" in caplog.messages[0]
    assert bank.source.split == "train" and len(bank.make_latents()) == 20
    assert bank.source.student == scorer.config.weights_sha256
    none = ShardSet(tuple(replace(one, shards=[]) for one in shards.folders))
    with pytest.raises(DataError, match="latents.bias is learnt from split val or 'train' has no patches"):
        open_bank(scorer, "", none, 3.0, threads=1)


def test_a_large_bank_is_thinned_evenly(tissue_run, monkeypatch):
    shards, scorer = ShardSet.open(tissue_run.shard_dirs), load_scorer(tissue_run.student.dir)
    every = open_bank(scorer, "", shards, 3.0, threads=1).make_latents()
    monkeypatch.setattr(bias_module, "_BANK_ROWS", 3)
    some = open_bank(scorer, "", shards, 3.0, threads=1).make_latents()
    np.testing.assert_array_equal(some, every[[0, 4, 7]])


def test_a_run_learns_the_bias_after_its_student(tissue_config, change, tmp_path):
    """The teacher and the store are those of the shared run's recipe, made here anew: nothing of it is changed."""
    folders = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "student", "report", "latents")}
    config = change(tissue_config, **folders)
    config = change(config, teacher={"epochs": 0.5}, student={"epochs": 0.5}, latents={"bias": 3.0})
    config = change(config, report={"queries": 4})
    pipeline.run(config)
    store = Store(config.latents.dir)
    said = Searcher(store).document.bias
    assert said is not None and said.student == load_scorer(config.student.dir).config.weights_sha256
    names = [row["name"] for row in read_json(tmp_path / "report" / "metrics.json")["retrieval"]["embeddings"]]
    assert names[:2] == ["LGD-Net, mapped latents, whitened, with bias", "LGD-Net, mapped latents, whitened"]
