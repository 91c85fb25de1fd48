import functools
import io
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from filling import RECIPE
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.io.digests import digest_of, xxh3
from lgd.io.files import read_json
from lgd.io.locks import TakenError, exclusive
from lgd.ray_jobs.cluster import disconnect
from lgd.retrieval import index, search
from lgd.retrieval.bias import Bank
from lgd.retrieval.factory import EXACT_ROWS, UnitVectors, choose_factory, measure_recall, nearest, unit
from lgd.retrieval.index import build_index, measure_searcher
from lgd.retrieval.index_files import BiasSource, cells_of
from lgd.retrieval.search import Searcher, index_folder, problems
from lgd.shards.archive import Shard
from lgd.store.commit import commit
from lgd.store.store import Store
from lgd.store.writer import shard_writer

SHARD = {"bytes": 1, "idx_sha256": "0" * 64, "extensions": {}, "keeps_files": True, "target": find_target("her2")}
SHARDS = (("train", 150), ("val", 20), ("train", 130))
KINDS = ("Flat", "IVF10,Flat", "IVF10,SQfp16", "IVF10,SQ8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of 280 training rows around 20 centres, and 20 of val."""
    folder = tmp_path_factory.mktemp("store")
    random = np.random.default_rng(0)
    centres = random.standard_normal((20, 16))
    shards = []
    for number, (split, rows) in enumerate(SHARDS):
        name = f"{split}-{number:06d}"
        shard = Shard(
            path=folder / f"{name}.tar",
            name=name,
            split=split,
            samples=rows,
            sha256=f"{number:064x}",
            **SHARD,
        )
        vectors = centres[random.integers(0, 20, rows)] + 0.3 * random.standard_normal((rows, 16))
        arrays = {
            "pooled": vectors[:, None].astype(np.float16),
            "key": np.array([f"{number}-{row:03d}" for row in range(rows)], "S8"),
            "label": random.integers(0, 4, rows).astype(np.float32),
            "slide": np.array([f"slide-{row // 30}" if row % 7 else "" for row in range(rows)], "S"),
        }
        with shard_writer(folder / "s", shard, RECIPE) as writer:
            writer.add(arrays)
        shards.append(shard)
    return commit(folder / "s", RECIPE, shards)


def shards_of(store):
    """What stands for the shards of a store."""
    return [
        Shard(
            path=store.folder,
            name=part.name[:-13],
            split=part.split,
            samples=part.rows,
            sha256=part.tar_sha256,
            **SHARD,
        )
        for part in store.parts
    ]


def build(store, *asked, **options):
    """Index all shards of a store."""
    return build_index(store, shards_of(store), *asked, **options)


def file_of(store, suffix):
    """A file of the index."""
    (path,) = (store.folder / "index" / "teacher").glob(f"*{suffix}")
    return path


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "s")
    return Store(tmp_path / "s")


@pytest.fixture(scope="module")
def indexed(made, tmp_path_factory):
    """A store with an index of each kind; no test may change it."""
    stores = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("indexed") / "s"
        shutil.copytree(made.folder, folder)
        stores[kind] = Store(folder)
        build(stores[kind], kind, ["train"], recall=0.9, seed=0)
    return stores


QUERIES = np.random.default_rng(7).standard_normal((9, 16)).astype(np.float32)


def gallery(store):
    """Vectors and keys of the training rows, in double precision."""
    parts = [store.parts[0], store.parts[2]]
    vectors = np.concatenate([np.asarray(part.array("pooled")[:, 0], np.float64) for part in parts])
    return vectors, np.concatenate([part.array("key") for part in parts])


def test_flat_answers_are_those_of_brute_force(store):
    document, new = build(store, "auto", ["train"], recall=0.99, seed=0)
    assert new and (document.factory, document.rows, document.nprobe) == ("Flat", 280, 0)
    assert document.recall_at_10 == 1 and document.queries == "20 latents of val"
    assert "exact search" in document.why
    searcher = Searcher(store)
    distances, positions = searcher.search(QUERIES, 7)
    assert (distances.dtype, positions.dtype) == (np.float32, np.int64)
    vectors, keys = gallery(store)
    for query, row, near in zip(QUERIES.astype(np.float64), positions, distances, strict=True):
        cosine = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosine)[:7]
        assert searcher.table["key"][row].tolist() == keys[best].tolist()
        np.testing.assert_allclose(near, 1 - cosine[best], atol=1e-6)
        assert (np.diff(near) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_table_and_vectors_are_those_of_the_stored_rows(indexed, kind):
    store = indexed[kind]
    searcher = Searcher(store)
    assert len(searcher.table) == 280
    assert len({(entry["part"], entry["row"]) for entry in searcher.table}) == 280
    for entry in searcher.table:
        part = store.parts[searcher.parts[entry["part"]]]
        for name in ("key", "label", "slide"):
            assert part.array(name)[entry["row"]] == entry[name]
    positions = np.array([279, 0, 17, 17, 140])
    entries = searcher.table[positions]
    stored = np.stack(
        [store.parts[searcher.parts[entry["part"]]].array("pooled")[entry["row"], 0] for entry in entries]
    )
    np.testing.assert_allclose(searcher.vectors(positions), unit(stored), atol=0.02 if kind.endswith("8") else 1e-3)
    for wrong in ([280], [-1]):
        with pytest.raises(IndexError, match="positions are 0 to 279"):
            searcher.vectors(np.array(wrong))


def whiten_naively(store, split, components):
    """Training rows whitened by the singular value decomposition of those of a split, and how."""
    latents = np.concatenate([part.array("pooled")[:, 0] for part in store.parts if part.split == split]).astype(float)
    mean = latents.mean(0)
    _, spread, axes = np.linalg.svd(latents - mean, full_matrices=False)
    return lambda some: (some.astype(float) - mean) @ axes[:components].T / spread[:components]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [1, 5, 16, 99])
def test_whitened_answers_are_those_of_brute_force(store, kind, components):
    document, new = build(store, kind, ["train"], recall=0.3, seed=0, components=components)
    assert new and (document.dim, document.latent_dim) == (min(components, 16), 16)
    assert not build(store, kind, ["train"], recall=0.3, seed=0, components=components)[1]
    assert problems(store) == []
    vectors, keys = gallery(store)
    whiten = whiten_naively(store, "train", min(components, 16))
    white, queries = whiten(vectors), whiten(QUERIES)
    searcher = Searcher(store)
    distances, positions = searcher.search(QUERIES, 280)
    for query, row, near in zip(queries, positions, distances, strict=True):
        cosine = white @ query / np.linalg.norm(white, axis=1) / np.linalg.norm(query)
        of_key = dict(zip(keys.tolist(), (1 - cosine).tolist(), strict=True))
        found = [of_key[key] for key in searcher.table["key"][row].tolist()]
        np.testing.assert_allclose(near, found, atol=0.03 if kind.endswith("8") else 2e-3)
        assert kind != "Flat" or (np.diff(found) >= -1e-5).all()


def test_the_whitening_is_of_the_training_rows_of_the_gallery(store):
    vectors, _ = gallery(store)
    cases = ((["train", "val"], "train"), (["val"], "val"), (["train"], "train"))
    for splits, split in cases:
        build(store, "Flat", splits, recall=0.99, seed=0, components=3)
        found, expected = Searcher(store).whitening.apply(vectors), whiten_naively(store, split, 3)(vectors)
        cosines = (found * expected).sum(0) / np.linalg.norm(found, axis=0) / np.linalg.norm(expected, axis=0)
        np.testing.assert_allclose(abs(cosines), 1, atol=1e-4)
    assert len([*(store.folder / "index" / "teacher").glob("*.axes")]) == 1, "those of the indexes before are gone"
    build(store, "Flat", ["train"], recall=0.99, seed=0)
    assert not [*(store.folder / "index" / "teacher").glob("*.axes")] and Searcher(store).whitening is None


@pytest.mark.faults
def test_axes_that_are_damaged_or_forged_are_refused(store):
    build(store, "Flat", ["train"], recall=0.99, seed=0, components=3)
    path = file_of(store, ".axes")
    content = path.read_bytes()
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(wrong)
        with pytest.raises(
            DataError, match="axes (does not match its digest|has .* bytes instead of .*): run lgd build"
        ):
            Searcher(store)
    path.write_bytes(content)
    for wrong in (content[:-4], content + b"1234", np.full(64, np.nan, "<f4").tobytes()):
        forge(store, ".axes", wrong)
        with pytest.raises(DataError, match="axes is not the index that index.json describes"):
            Searcher(store)
    file_of(store, ".axes").unlink()
    with pytest.raises(DataError, match="lacks a file that index.json names.*run lgd build-index"):
        Searcher(store)


def test_a_gallery_is_its_splits_only(store):
    build(store, "auto", ["val"], recall=0.99, seed=0)
    searcher = Searcher(store)
    assert {bytes(key)[:1] for key in searcher.table["key"]} == {b"1"}
    distances, positions = searcher.search(QUERIES, 50)
    assert (positions[:, :20] >= 0).all() and np.isfinite(distances[:, :20]).all()
    assert (positions[:, 20:] == -1).all() and (distances[:, 20:] == np.inf).all(), "no more than there are"


def test_without_other_splits_the_queries_are_moved_latents(store):
    document, _ = build(store, "auto", ["train", "val"], recall=0.99, seed=0)
    assert document.queries == "300 latents of the gallery, moved by a tenth of their length"


def keys_found(store, vectors=QUERIES):
    searcher = Searcher(store)
    return searcher.table["key"][searcher.search(vectors, 10)[1]]


def test_ivf_probes_until_it_reaches_the_recall(store):
    few, _ = build(store, "IVF10,Flat", ["train"], recall=0.4, seed=0)
    document, _ = build(store, "IVF10,Flat", ["train"], recall=1.0, seed=0)
    assert document.recall_at_10 == 1 and few.nprobe < document.nprobe <= 10
    assert Searcher(store).index.nprobe == document.nprobe
    held_out = store.parts[1].array("pooled")[:, 0]
    found = keys_found(store, held_out)
    build(store, "Flat", ["train"], recall=0.99, seed=0)
    assert np.array_equal(np.sort(keys_found(store, held_out)), np.sort(found))


def add_alike(store):
    """A store of 60 directions alone, and of each 24 latents, 1 to 24 times as long."""
    drawn = np.random.default_rng(3).integers(-9, 10, (60, 16))
    shards = []
    for number in range(2):
        name, factors = f"train-{number + 8:06d}", 1 + np.arange(12) + 12 * number
        rows = 60 * len(factors)
        shard = Shard(path=store.folder, name=name, split="train", samples=rows, sha256=f"{number + 8}" * 64, **SHARD)
        keys = np.array([f"{number}-{row:04d}" for row in range(rows)], "S6")
        pooled = (factors[:, None, None] * drawn).reshape(rows, 1, 16).astype(np.float16)
        arrays = {"pooled": pooled, "key": keys, "label": np.zeros(rows, np.float32), "slide": np.full(rows, b"")}
        with shard_writer(store.folder, shard, RECIPE) as writer:
            writer.add(arrays)
        shards.append(shard)
    return commit(store.folder, RECIPE, shards, prune=True)


@pytest.mark.parametrize("components", [0, 4])
def test_recall_of_other_queries_is_that_of_brute_force(store, components):
    """Of an index that looks into one cell of ten, for queries that are no stored latents."""
    build(store, "IVF10,Flat", ["train"], recall=0.01, seed=0, components=components)
    searcher = Searcher(store)
    assert searcher.index.nprobe == 1
    queries_nD = np.random.default_rng(3).normal(size=(50, searcher.document.latent_dim)).astype(np.float32)
    whiten = searcher.whitening.apply if components else np.asarray
    rows_mD = np.concatenate([part.array("pooled")[:, 0] for part in store.parts if part.split == "train"])
    cosine_nm = unit(whiten(queries_nD)) @ unit(whiten(rows_mD.astype(np.float32))).T
    least_n = np.sort(cosine_nm, axis=1)[:, -10]
    distance_nk, position_nk = searcher.search(queries_nD, 10)
    naive = ((1 - distance_nk >= least_n[:, None] - 1e-6) & (position_nk >= 0)).mean()
    assert measure_searcher(searcher, queries_nD) == pytest.approx(naive) and 0.05 < naive < 0.95


@pytest.mark.parametrize("kind", KINDS[:3])
def test_latents_of_one_cosine_do_not_lower_the_recall(store, kind):
    # Of 24 that are nearest any ten are the ten nearest.
    store = add_alike(store)
    document, _ = build(store, kind, ["train"], recall=1.0, seed=0)
    assert document.recall_at_10 == 1


def test_an_answer_counts_by_its_cosine(store):
    latents = UnitVectors(add_alike(store).parts)
    queries = unit(QUERIES)
    truth = nearest(latents, queries, 3)
    # The same directions come again every 60 rows.
    alike = (truth + 60) % latents.rows
    assert measure_recall(latents, queries, truth, truth) == measure_recall(latents, queries, truth, alike) == 1
    # Another latent, or no answer, does not count.
    for other in ((truth[:, 0] + 1) % latents.rows, np.full(len(truth), -1)):
        found = np.column_stack([other, truth[:, 1:]])
        assert measure_recall(latents, queries, truth, found) == pytest.approx(2 / 3)


def test_an_index_below_the_recall_is_refused(store):
    with pytest.raises(
        DataError, match=r"IVF10,SQ8 reaches recall@10 0\.\d+ with all its cells, below latents.recall 1"
    ):
        build(store, "IVF10,SQ8", ["train"], recall=1, seed=0)
    assert problems(store) == [
        f"{store.folder}/index/teacher/index.json is missing: there is no index; run lgd build-index"
    ]


@pytest.mark.parametrize("factory", ["Flatt", "IVF", "PQ8", "IVF10", "IVF0,Flat", "IVF10,PQ64x4fsr,RFlat", "Flat\n"])
def test_a_factory_string_that_is_not_built_is_told(store, factory):
    with pytest.raises(DataError, match="latents.index '.*' is not built: use auto, Flat, or IVFn"):
        build(store, factory, ["train"], recall=0.99, seed=0)


def test_more_cells_than_latents_are_told(store):
    with pytest.raises(DataError, match="'IVF1000,Flat' has more cells than there are latents .280.: use auto"):
        build(store, "IVF1000,Flat", ["train"], recall=0.99, seed=0)


def test_many_empty_cells_are_no_fault(store):
    # More than half: FAISS then writes the others' sizes in another form.
    random = np.random.default_rng(0)
    alike = np.repeat(random.standard_normal((3, 16)), 20, axis=0).astype(np.float16)
    shard = Shard(path=store.folder, name="train-000009", split="train", samples=60, sha256="9" * 64, **SHARD)
    keys = np.array([f"{row:03d}" for row in range(60)], "S3")
    arrays = {"pooled": alike[:, None], "key": keys, "label": np.zeros(60, np.float32), "slide": np.full(60, b"")}
    with shard_writer(store.folder, shard, RECIPE) as writer:
        writer.add(arrays)
    few = commit(store.folder, RECIPE, [shard], prune=True)
    document, _ = build(few, "IVF40,SQfp16", ["train"], recall=0.01, seed=0)
    assert problems(few) == [] and document.rows == 60
    assert (Searcher(few).search(alike[:1], 60)[1] >= 0).all()


def test_latents_that_are_not_finite_are_refused(store, indexed):
    for kind in KINDS:
        for value in (np.nan, np.inf):
            wrong = np.repeat(QUERIES, 4, axis=0)
            wrong[3, 5] = value
            with pytest.raises(DataError, match="a latent is not finite"):
                Searcher(indexed[kind]).search(wrong, 10)
            with pytest.raises(DataError, match="a latent is not finite"):
                Searcher(indexed[kind]).search(wrong[3:4], 10)


def test_queries_of_another_length_are_refused(indexed):
    with pytest.raises(DataError, match=r"vectors of shape \(9, 15\), and the index has 16 dimensions"):
        Searcher(indexed["Flat"]).search(QUERIES[:, :15], 3)
    assert Searcher(indexed["Flat"]).search(QUERIES[:0], 3)[1].shape == (0, 3)


@pytest.fixture(scope="module")
def opened(indexed):
    return {kind: Searcher(indexed[kind]) for kind in KINDS}


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 300),
    share=st.sampled_from([0, 0.005, 0.05, 0.5, 1]),
    seed=st.integers(0, 9),
)
def test_a_filter_loses_no_neighbours(opened, kind, k, share, seed):
    searcher = opened[kind]
    allowed = np.random.default_rng(seed).random(len(searcher.table)) < share
    distances, positions = searcher.search(QUERIES, k, allowed)
    most = min(k, int(allowed.sum()))
    assert positions.shape == distances.shape == (9, k)
    assert (positions[:, most:] == -1).all() and (distances[:, most:] == np.inf).all()
    found = positions[:, :most]
    assert (found >= 0).all() and allowed[found].all()
    assert all(len(set(row)) == most for row in found.tolist())
    assert (np.diff(distances[:, :most]) >= 0).all()
    if kind == "Flat" and most:
        vectors = unit(searcher.vectors(np.flatnonzero(allowed)))
        wanted = np.sort(1 - unit(QUERIES) @ vectors.T, axis=1)[:, :most]
        np.testing.assert_allclose(distances[:, :most], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_more_neighbours_than_the_probed_cells_hold_are_found(opened, kind):
    assert opened[kind].document.nprobe < 10
    assert all(sorted(row) == list(range(280)) for row in opened[kind].search(QUERIES, 280)[1].tolist())


def bank_of(latents, sharpness=5.0, student="5" * 64):
    """A bank of known latents."""
    source = BiasSource(sharpness=sharpness, student=student, split="val", shards=("7" * 64,))
    return Bank(source=source, make_latents=lambda: latents)


@pytest.mark.parametrize("bank", [None, bank_of(QUERIES)])
def test_workers_give_the_same_index(store, monkeypatch, bank):
    digests, options = set(), {"components": 8, "bank": bank}
    monkeypatch.setattr(index, "_ALONE_ROWS", 0)
    for workers in (0, 2):
        document, _ = build(store, "IVF10,SQfp16", ["train"], recall=0.5, seed=0, workers=workers, **options)
        digests.add(f"{document.faiss} {document.table}")
        (store.folder / "index" / "teacher" / "index.json").unlink()
    disconnect()
    # Ray gives the parts as they come.
    monkeypatch.setattr(index, "map_with", lambda make, parts, **_: map(make(), parts[::-1]))
    document, _ = build(store, "IVF10,SQfp16", ["train"], recall=0.5, seed=0, **options)
    assert digests == {f"{document.faiss} {document.table}"}


def test_a_store_at_a_url_is_indexed_and_searched_there(s3_server, store, indexed, tmp_path, monkeypatch):
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    s3_server.create_bucket(Bucket="index")
    for path in store.folder.rglob("*"):
        if path.is_file():
            s3_server.upload_file(str(path), "index", f"s/{path.relative_to(store.folder)}")
    there = Store("s3://index/s")
    assert problems(there) == [
        "s3://index/s/index/teacher/index.json is missing: there is no index; run lgd build-index"
    ]
    assert build(there, "IVF10,SQfp16", ["train"], recall=0.9, seed=0)[1]
    assert not build(there, "IVF10,SQfp16", ["train"], recall=0.9, seed=0)[1]
    assert keys_found(there).tolist() == keys_found(indexed["IVF10,SQfp16"]).tolist()
    assert build(there, "Flat", ["train"], recall=0.9, seed=0)[1]
    names = [entry["Key"] for entry in s3_server.list_objects_v2(Bucket="index", Prefix="s/index/")["Contents"]]
    assert len(names) == 3, "the files of the index before are gone"
    (name,) = (name for name in names if name.endswith(".faiss"))
    s3_server.put_object(Bucket="index", Key=name, Body=b"other")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="faiss has 5 bytes instead of"):
        Searcher(there)


def test_exact_search_in_blocks_is_exact(store, monkeypatch):
    latents = UnitVectors(store.parts)
    vectors = np.concatenate([unit(part.array("pooled")[:, 0]) for part in store.parts])
    wanted = np.argsort(-(unit(QUERIES) @ vectors.T), axis=1)[:, :12]
    for block in (7, 150, 1000):
        monkeypatch.setattr("lgd.retrieval.factory._BLOCK", block)
        assert np.array_equal(np.concatenate([found for _, found in latents.blocks()]), vectors)
        assert nearest(latents, unit(QUERIES), 12).tolist() == wanted.tolist()
    rows = np.array([0, 149, 150, 169, 170, 299])
    assert np.array_equal(latents.at(rows), vectors[rows])


def test_an_empty_gallery_is_told(store):
    with pytest.raises(DataError, match="no split test to search, only train, val: set latents.gallery"):
        build(store, "auto", ["test"], recall=0.99, seed=0)


def test_the_same_index_is_reused_and_another_is_built(store):
    assert build(store, "auto", ["train"], recall=0.99, seed=0)[1]
    assert not build(store, "auto", ["train"], recall=0.99, seed=0)[1]
    assert build(store, "auto", ["train", "val"], recall=0.99, seed=0)[1]
    file_of(store, ".npy").unlink()
    assert build(store, "auto", ["train", "val"], recall=0.99, seed=0)[1]
    assert problems(store) == []


def test_one_process_at_a_time_builds_an_index(store):
    asked = {"gallery": ["train"], "recall": 0.99, "seed": 0}
    first, _ = build(store, "auto", **asked)
    with exclusive(index_folder(store), "building an index"):
        assert build(store, "auto", **asked) == (first, False), "what is there is only read"
        with pytest.raises(TakenError, match=r"is building an index there, .*: wait until it is done, or end it"):
            build(store, "IVF10,Flat", **asked)
    assert build(store, "IVF10,Flat", **asked)[1]


def test_an_index_of_parts_that_are_gone_is_refused(store):
    build(store, "auto", ["train"], recall=0.99, seed=0)
    smaller = commit(store.folder, RECIPE, shards_of(store)[:2], prune=True)
    with pytest.raises(DataError, match="was built from another state of the store: run lgd build-index"):
        Searcher(smaller)


def test_an_index_stays_when_the_store_grows(store, made):
    build_index(store, shards_of(store)[2:], "auto", ["train"], recall=0.99, seed=0)
    before = keys_found(store)
    smaller = commit(store.folder, RECIPE, shards_of(store)[1:], prune=True)
    assert keys_found(smaller).tolist() == before.tolist()
    with shard_writer(store.folder, shards_of(made)[0], RECIPE) as writer:
        names = ("pooled", "key", "label", "slide")
        writer.add({name: np.array(made.parts[0].array(name)) for name in names})
    grown = commit(store.folder, RECIPE, shards_of(made)[:1])
    assert [part.split for part in grown.parts] == ["val", "train", "train"]
    assert keys_found(grown).tolist() == before.tolist()


def test_an_index_can_be_read_while_it_is_replaced(store):
    """Readers in threads meet the old index or the new one, never a mixture or a gap."""
    build(store, "Flat", ["train"], recall=0.9, seed=0)
    kinds, ended, wrong = [], threading.Event(), []

    def read():
        while not ended.is_set():
            try:
                searcher = Searcher(Store(store.folder))
                searcher.search(QUERIES, 5)
                kinds.append(searcher.document.factory)
            except Exception as error:  # noqa: BLE001 - asserted by the main thread
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(12):
        build(store, ("IVF10,SQfp16", "Flat")[number % 2], ["train"], recall=0.9, seed=0)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong and len(set(kinds)) == 2, (wrong, kinds)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["Flat", "IVF10,SQfp16"])
@pytest.mark.parametrize("suffix", [".faiss", ".npy"])
def test_a_flipped_bit_or_a_lost_byte_is_refused_before_faiss_reads(indexed, kind, suffix, tmp_path, monkeypatch):
    store = copied(indexed[kind], tmp_path)
    path = file_of(store, suffix)
    content = bytearray(path.read_bytes())

    def no_faiss():
        raise AssertionError("FAISS was asked")

    monkeypatch.setattr(search, "import_faiss", no_faiss)
    content[len(content) // 2] ^= 4
    for wrong in (content, content[:-1], b""):
        path.write_bytes(wrong)
        with pytest.raises(
            DataError, match=f"{path.name} (does not match its digest|has .* bytes instead of .*): run lgd build-index"
        ):
            Searcher(store)
        assert len(problems(store)) == 1
    path.unlink()
    with pytest.raises(DataError, match="lacks a file that index.json names.*run lgd build-index"):
        Searcher(store)


@pytest.mark.faults
def test_every_flipped_bit_of_the_document_is_noticed(indexed, tmp_path):
    store = copied(indexed["IVF10,SQfp16"], tmp_path)
    path = store.folder / "index" / "teacher" / "index.json"
    content, document = path.read_bytes(), read_json(path)
    for bit in range(0, 8 * len(content), 7):
        wrong = bytearray(content)
        wrong[bit // 8] ^= 1 << bit % 8
        path.write_bytes(wrong)
        if not problems(store):
            # A blank may become another one.
            assert read_json(path) == document


def copied(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    return Store(tmp_path / "copy")


def forge(store, suffix, content, **changes):
    """Write a file of the index, or change index.json, and make all digests right again."""
    folder = store.folder / "index" / "teacher"
    document = {key: value for key, value in read_json(folder / "index.json").items() if key != "digest"} | changes
    if suffix:
        file_of(store, suffix).unlink()
        digest = xxh3(io.BytesIO(content))
        (folder / f"{digest}{suffix}").write_bytes(content)
        document[{".faiss": "faiss", ".npy": "table", ".axes": "whitening"}[suffix]] = {
            "bytes": len(content),
            "xxh3": digest,
        }
    (folder / "index.json").write_text(json.dumps(document | {"digest": digest_of(document)}))


@pytest.mark.faults
@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 281},
        {"rows": 2**41},
        {"rows": -1},
        {"rows": 280.0},
        {"dim": 8},
        {"nprobe": 0},
        {"nprobe": 11},
        {"factory": "IVF10,Flat"},
        {"factory": "IVF11,SQfp16"},
        {"factory": "Flat"},
        {"factory": "PQ8"},
        {"factory": None},
        {"format": "lgd-index/2"},
        {"parts": []},
        {"parts": ["../x"]},
        {"faiss": {"bytes": 1, "xxh3": "../victim/x"}},
        {"recall_at_10": float("nan")},
        {"latent_dim": 17},
        {"components": 4},
        {"components": 4, "dim": 4},
        {"whitening": {"bytes": 1, "xxh3": "0" * 32}},
        {"bias": {"sharpness": 3.0, "student": "5" * 64, "split": "val", "shards": ["7" * 64]}},
        {"bias": {"sharpness": 0.0, "student": "5" * 64, "split": "val", "shards": ["7" * 64]}},
        {"bias": {}},
        {"whitening": {"bytes": 1, "xxh3": "0" * 32}, "components": 16},
    ],
)
def test_a_forged_document_is_refused(indexed, changes, tmp_path):
    store = copied(indexed["IVF10,SQfp16"], tmp_path)
    forge(store, "", b"", **changes)
    assert problems(store)
    with pytest.raises(DataError, match="run lgd build-index"):
        Searcher(store)


@pytest.mark.faults
def test_a_forged_table_is_refused(indexed, tmp_path):
    store = copied(indexed["Flat"], tmp_path)
    table = np.load(file_of(store, ".npy"))
    wrong = {name: table.copy() for name in ("part", "row")}
    wrong["part"]["part"][5] = 3
    wrong["row"]["row"][-1] = 150
    for name, value in {"key": b"\xff\xfe", "slide": b"\xff", "label": 99, "more": np.inf, "less": 1.5}.items():
        column = name if name in table.dtype.names else "label"
        wrong[name] = table.copy()
        wrong[name][column][7] = value
    for array in (*wrong.values(), table[:-1], table["row"], np.array([{}], object)):
        content = io.BytesIO()
        np.save(content, array, allow_pickle=True)
        forge(store, ".npy", content.getvalue())
        with pytest.raises(DataError, match=r"npy is not the index that index.json describes"):
            Searcher(store)
    for content in (b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff{"):
        forge(store, ".npy", content)
        with pytest.raises(DataError, match="run lgd build-index"):
            Searcher(store)


SWEEP = """
import sys
import numpy as np
from lgd.base.errors import DataError
from lgd.io.files import read_json, write_json
from lgd.io.digests import digest_of, xxh3
from lgd.store.store import Store
from lgd.retrieval.search import Searcher
sys.path[:0] = sys.argv[1].split(":")
from test_index import QUERIES, file_of, forge
store, faults, seed = Store(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
content, random = file_of(store, ".faiss").read_bytes(), np.random.default_rng(seed)
refused = answered = 0
for number in range(faults):
    wrong = bytearray(content)
    # Half of the flips are in the structure at the beginning, and one fault in four cuts or lengthens the file.
    at = int(random.integers(0, 1200 if number % 2 else len(content)))
    if number % 4 == 3:
        wrong = wrong[:at] + bytes(int(random.integers(0, 2)) * len(wrong))
    else:
        wrong[at % len(wrong)] ^= 1 << int(random.integers(0, 8))
    forge(store, ".faiss", bytes(wrong))
    try:
        searcher = Searcher(store)
    except DataError:
        refused += 1
        continue
    for allowed in (None, np.arange(280) % 3 == 0):
        distance, position = searcher.search(QUERIES, 10, allowed)
        assert ((position >= -1) & (position < 280)).all()
    assert searcher.vectors(np.arange(280)).shape == (280, 16)
    answered += 1
print(refused, answered)
"""


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_index_is_refused_or_harmless(indexed, kind, tmp_path, fault_count):
    store = copied(indexed[kind], tmp_path)
    faults = fault_count(400)
    command = [sys.executable, "-c", SWEEP, ":".join(sys.path), store.folder, faults, 0]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, answered = map(int, done.stdout.split())
    # What passes is another number in a vector.
    assert refused + answered == faults and refused >= faults // 4


def test_an_opened_index_outlives_its_files(store):
    build(store, "IVF10,SQfp16", ["train"], recall=0.9, seed=0)
    searcher = Searcher(store)
    before = searcher.search(QUERIES, 10)
    build(store, "Flat", ["val"], recall=0.9, seed=0)
    shutil.rmtree(store.folder)
    for array, other in zip(before, searcher.search(QUERIES, 10), strict=True):
        assert np.array_equal(array, other)


def test_unit_vectors_have_length_1_and_zeros_stay():
    vectors = unit(np.array([[3, 4], [0, 0]], np.float16))
    assert vectors.dtype == np.float32 and vectors.tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]


def test_auto_is_exact_until_it_is_large_and_compresses_for_memory_only():
    decide = functools.partial(choose_factory, dim=512, memory=24 * 2**30)
    assert decide(EXACT_ROWS)[0] == "Flat" and decide(EXACT_ROWS + 1)[0].startswith("IVF")
    for dim in (16, 32, 128, 1024):
        assert decide(EXACT_ROWS * 512 // dim, dim=dim)[0] == "Flat"
        assert decide(EXACT_ROWS * 512 // dim + 1, dim=dim)[0].startswith("IVF")
    assert decide(1_000_000)[0] == "IVF4000,SQfp16"
    assert decide(12 * 2**20)[0] == "IVF14189,SQfp16"
    factory, why = decide(12 * 2**20 + 1)
    assert factory == "IVF14189,SQ8" and "12.9 GB, more than half of this machine's 25.8 GB" in why
    assert cells_of(decide(10**9)[0]) == 126491
