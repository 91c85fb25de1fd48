import shutil

import numpy as np
import pytest

from lgd.config import DataError
from lgd.data.archive import Shard
from lgd.store import index
from lgd.store.index import Searcher, build_index, problems, unit
from lgd.store.latents import Store, commit
from lgd.store.writer import part_writer

RECIPE = {"teacher": "a" * 64}
SHARDS = (("train", 150), ("val", 20), ("train", 130))


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
            bytes=1,
            sha256=f"{number:064x}",
            extensions={},
        )
        vectors = centres[random.integers(0, 20, rows)] + 0.3 * random.standard_normal((rows, 16))
        arrays = {
            "pooled": vectors[:, None].astype(np.float16),
            "key": np.array([f"{number}-{row:03d}" for row in range(rows)], "S8"),
        }
        with part_writer(folder / "s", shard, RECIPE) as writer:
            writer.add(arrays)
        shards.append(shard)
    return commit(folder / "s", RECIPE, shards, {"shards": [], "teacher": ""})


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "s")
    return Store(tmp_path / "s")


QUERIES = np.random.default_rng(7).standard_normal((9, 16)).astype(np.float32)


def gallery(store):
    """Vectors and keys of the training rows, in double precision."""
    parts = [store.parts[0], store.parts[2]]
    vectors = np.concatenate([np.asarray(part.array("pooled")[:, 0], np.float64) for part in parts])
    return vectors, np.concatenate([part.array("key") for part in parts])


def test_flat_answers_are_those_of_brute_force(store):
    document, new = build_index(store, "auto", ["train"], recall=0.99, seed=0)
    assert new and (document["factory"], document["rows"], document["nprobe"]) == ("Flat", 280, 0)
    assert document["recall_at_10"] == 1
    searcher = Searcher(store)
    distances, positions = searcher.search(QUERIES, 7)
    vectors, keys = gallery(store)
    for query, row, near in zip(QUERIES.astype(np.float64), positions, distances, strict=True):
        cosine = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosine)[:7]
        assert searcher.table["key"][row].tolist() == keys[best].tolist()
        np.testing.assert_allclose(near, 1 - cosine[best], atol=1e-6)
        assert (np.diff(near) >= 0).all()


def test_the_table_leads_to_the_stored_row(store):
    build_index(store, "auto", ["val", "train"], recall=0.99, seed=0)
    table = Searcher(store).table
    assert len(table) == 300
    for entry in table[::17]:
        assert store.parts[entry["part"]].array("key")[entry["row"]] == entry["key"]


def test_a_gallery_is_its_splits_only(store):
    build_index(store, "auto", ["val"], recall=0.99, seed=0)
    searcher = Searcher(store)
    assert {bytes(key)[:1] for key in searcher.table["key"]} == {b"1"}
    assert searcher.search(QUERIES, 50)[1].shape == (9, 20), "no more than there are"


def test_ivf_probes_until_it_reaches_the_recall(store):
    document, _ = build_index(store, "IVF10,Flat", ["train"], recall=0.99, seed=0)
    assert document["recall_at_10"] >= 0.99 and 1 <= document["nprobe"] <= 10
    wanted, _ = build_index(store, "Flat", ["train"], recall=0.99, seed=0)
    assert wanted["factory"] == "Flat"
    exact = Searcher(store).search(QUERIES, 10)[1]
    build_index(store, "IVF10,Flat", ["train"], recall=1.0, seed=0)
    found = Searcher(store).search(QUERIES, 10)[1]
    overlap = [len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]
    assert np.mean(overlap) >= 9, "the probes are kept in the file"


def test_an_index_below_the_recall_is_refused(store):
    with pytest.raises(DataError, match=r"PQ2x2 reaches recall@10 0\.\d+, below latents.recall 0.99: choose another"):
        build_index(store, "PQ2x2", ["train"], recall=0.99, seed=0)
    assert problems(store) == [f"{store.folder / 'index'} holds no index: run lgd build-index"]


@pytest.mark.parametrize("factory", ["Flatt", "IVF", "PQ7", "IVF1000,Flat"])
def test_a_wrong_factory_string_is_told(store, factory):
    with pytest.raises(DataError, match=f"latents.index '{factory}' is no FAISS factory string for 280 vectors"):
        build_index(store, factory, ["train"], recall=0.99, seed=0)


def test_an_empty_gallery_is_told(store):
    with pytest.raises(DataError, match="no split test to search, only train, val: set latents.gallery"):
        build_index(store, "auto", ["test"], recall=0.99, seed=0)


def test_the_same_index_is_reused_and_another_is_built(store):
    assert build_index(store, "auto", ["train"], recall=0.99, seed=0)[1]
    assert not build_index(store, "auto", ["train"], recall=0.99, seed=0)[1]
    assert build_index(store, "auto", ["train", "val"], recall=0.99, seed=0)[1]
    (store.folder / "index" / "keys.npy").unlink()
    assert build_index(store, "auto", ["train", "val"], recall=0.99, seed=0)[1]
    assert problems(store) == []


def test_an_index_of_another_state_is_refused(store, made):
    build_index(store, "auto", ["train"], recall=0.99, seed=0)
    shards = [
        Shard(path=store.folder, name=p.name[:-13], split="", samples=0, bytes=0, sha256=p.tar_sha256, extensions={})
        for p in store.parts[:2]
    ]
    smaller = commit(store.folder, RECIPE, shards, {})
    with pytest.raises(DataError, match="was built from another state of the store: run lgd build-index"):
        Searcher(smaller)


@pytest.mark.parametrize("name", ["faiss.index", "keys.npy"])
@pytest.mark.faults
def test_a_flipped_bit_is_refused_before_faiss_reads(store, name, monkeypatch):
    build_index(store, "auto", ["train"], recall=0.99, seed=0)
    path = store.folder / "index" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    def no_faiss():
        raise AssertionError("FAISS was asked")

    monkeypatch.setattr(index, "_faiss", no_faiss)
    with pytest.raises(DataError, match=f"{name} is missing or does not match its digest"):
        Searcher(store)


def test_unit_vectors_have_length_1_and_zeros_stay():
    vectors = unit(np.array([[3, 4], [0, 0]], np.float16))
    assert vectors.dtype == np.float32 and vectors.tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]


def test_auto_is_exact_until_it_is_large():
    assert index._choose(index.EXACT_ROWS) == "Flat"
    assert index._choose(1_000_000) == "IVF4000,Flat"
