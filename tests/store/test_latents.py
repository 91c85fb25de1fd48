import json
import os
import shutil

import h5py
import numpy as np
import pytest

from lgd.data.archive import Shard
from lgd.errors import DataError
from lgd.files import digest_of, write_json
from lgd.store.latents import Rows, Store, commit, read_all
from lgd.store.sidecar import is_complete, part_name
from lgd.store.writer import part_writer

RECIPE = {"teacher": "a" * 64, "size": 64, "encoder": {"name": "resnet10"}, "views": 1}
SOURCES = {"shards": [], "teacher": ""}


def shard(tmp_path, number=0, samples=3, sha="b" * 64):
    name = f"train-{number:06d}"
    return Shard(
        path=tmp_path / f"{name}.tar",
        name=name,
        split="train",
        samples=samples,
        bytes=1,
        sha256=sha,
        extensions={"json": "json", "he": "png", "ihc": "png"},
    )


def arrays(samples=3, seed=0):
    random = np.random.default_rng(seed)
    return {
        "pooled": random.standard_normal((samples, 1, 5)).astype(np.float16),
        "map": random.standard_normal((samples, 1, 5, 2, 2)).astype(np.float16),
        "level": np.array([0, -1, 3], np.int8)[:samples],
        "key": np.array([b"a", b"bcd", b"ef"])[:samples],
    }


@pytest.fixture
def store(tmp_path):
    shards = [shard(tmp_path), shard(tmp_path, 1, sha="c" * 64)]
    for number, one in enumerate(shards):
        write_part(tmp_path / "store", one, arrays(seed=number))
    return commit(tmp_path / "store", RECIPE, shards, SOURCES)


def write_part(folder, shard, arrays):
    with part_writer(folder, shard, RECIPE) as writer:
        writer.add(arrays)


def flip_bit(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_parts_read_back_as_written(store):
    for number, part in enumerate(store.parts):
        assert part.rows == 3
        for name, array in arrays(seed=number).items():
            there = part.array(name)
            assert there.dtype == array.dtype and np.array_equal(there, array)
    assert store.rows == 6 and store.verify() == []
    assert np.array_equal(read_all(store.parts, "pooled"), np.concatenate([arrays(seed=n)["pooled"] for n in (0, 1)]))


def test_rows_by_address_are_those_of_a_loop(store):
    parts, rows = [1, 0, 1], [2, 0, 2]
    found = Rows(store.parts).read(parts, rows, ["ef", "a", None])
    for name in ("pooled", "map"):
        naive = np.stack([arrays(seed=p)[name][r, 0] for p, r in zip(parts, rows, strict=True)])
        assert found[name].dtype == np.float16 and np.array_equal(found[name], naive)


def test_rows_of_another_key_are_refused(store):
    with pytest.raises(DataError, match=r"train-000001-c+\.h5, row 2, is of ef, but the shard's sample is a: delete"):
        Rows(store.parts).read([0, 1], [0, 2], ["a", "a"])


def test_maps_are_read_only(store):
    with pytest.raises(ValueError, match="read-only"):
        store.parts[0].array("pooled")[0] = 0


def test_the_sidecar_agrees_with_hdf5(store):
    for part in store.parts:
        datasets = part.sidecar()["datasets"]
        with h5py.File(part.path) as file:
            assert set(file) == set(datasets)
            for name, entry in datasets.items():
                dataset = file[name]
                assert dataset.chunks is None and dataset.compression is None
                assert dataset.id.get_offset() == entry["offset"] and list(dataset.shape) == entry["shape"]
                assert np.array_equal(dataset[:], part.array(name))


def test_another_recipe_is_refused_field_by_field(store):
    other = RECIPE | {"teacher": "f" * 64, "views": 8, "dtype": "float16"}
    with pytest.raises(DataError) as caught:
        Store(store.folder, other)
    message = str(caught.value)
    assert f"  teacher: {'a' * 64} in the store, {'f' * 64} asked for" in message
    assert "  views: 1 in the store, 8 asked for" in message
    assert "  dtype: None in the store, float16 asked for" in message
    assert "size:" not in message and "latents.dir" in message
    assert Store(store.folder, dict(RECIPE)).rows == 6


@pytest.mark.parametrize("place", [0, 700, -1])
@pytest.mark.faults
def test_a_flipped_bit_is_found_at_first_use_and_by_verify(store, place):
    flip_bit(store.parts[1].path, place)
    opened = Store(store.folder)
    assert np.array_equal(opened.parts[0].array("key"), arrays()["key"])
    with pytest.raises(DataError, match=r"train-000001-c+\.h5 does not match its digest: delete it and run"):
        opened.parts[1].array("level")
    assert [problem for problem in opened.verify() if "train-000001" in problem]


@pytest.mark.faults
def test_a_truncated_part_is_found(store):
    path = store.parts[0].path
    size = path.stat().st_size
    os.truncate(path, size - 1)
    opened = Store(store.folder)
    with pytest.raises(DataError, match=f"has {size - 1} bytes and not {size}"):
        opened.parts[0].array("level")
    path.unlink()
    assert f"part {path} is missing: run lgd cache-latents again" in opened.verify()


def rewrite(path, change):
    """Change a store.json or a sidecar, and make its digest right again."""
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document | {"digest": digest_of({k: v for k, v in document.items() if k != "digest"})})
    return json.loads(path.read_text())


def test_a_tampered_store_json_is_refused(store):
    path = store.folder / "store.json"
    whole = path.read_text()
    path.write_text(whole.replace('"rows": 3', '"rows": 2', 1))
    with pytest.raises(DataError, match=r"store\.json cannot be used .it does not match its own digest.: delete it"):
        Store(store.folder)
    path.write_text(whole)
    rewrite(path, lambda document: document["parts"][0].update(digest="0" * 64))
    problems = Store(store.folder).verify()
    assert len(problems) == 1 and "train-000000" in problems[0] and "is not the one of store.json" in problems[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["datasets"]["pooled"].update(offset=d["bytes"]), "dataset 'pooled' of shape .* does not fit"),
        (lambda d: d["datasets"]["pooled"].update(offset=d["datasets"]["map"]["offset"]), "datasets overlap"),
        (lambda d: d["datasets"]["pooled"].update(offset=-8), "dataset 'pooled' is"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 2**40, 2]), "rows of shape"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 2**30, 2**20]), "does not fit the part"),
        (lambda d: d["datasets"]["pooled"].update(dtype="|O"), "dataset 'pooled' is"),
        (lambda d: d["datasets"].pop("key"), "no dataset key"),
        (lambda d: d.update(rows=2), "does not fit"),
        (lambda d: d.update(name="../train-000000"), "it is of part '../train"),
        (lambda d: d.update(datasets=[]), "cannot be used"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 1, 4]), "states other datasets than store.json"),
        (lambda d: d["datasets"]["pooled"].update(offset=d["datasets"]["pooled"]["offset"] - 2), "HDF5 finds other"),
    ],
)
def test_a_forged_sidecar_is_refused(store, change, told):
    """Sidecar and store.json agree with each other and with their digests."""
    sidecar = rewrite(store.parts[0].path.with_suffix(".json"), change)
    rewrite(store.folder / "store.json", lambda document: document["parts"][0].update(digest=sidecar["digest"]))
    part = Store(store.folder).parts[0]
    with pytest.raises(DataError, match=told):
        part.array("key")
    assert len(Store(store.folder).verify()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["parts"][0].update(name="../../etc/passwd"),
        lambda d: d["parts"][0].update(rows=-3),
        lambda d: d["parts"][0].update(digest=3),
        lambda d: d["parts"].append(7),
        lambda d: d.update(parts=None),
        lambda d: d["datasets"]["pooled"].update(dtype="|O"),
        lambda d: d["datasets"]["pooled"].update(shape=[2**60]),
        lambda d: d.pop("recipe"),
    ],
)
def test_a_forged_store_json_is_refused(store, change):
    rewrite(store.folder / "store.json", change)
    with pytest.raises(DataError, match=r"store\.json cannot be used .*: delete it"):
        Store(store.folder)


def test_a_missing_dataset_is_named(store):
    with pytest.raises(DataError, match="has no dataset 'nuclei'"):
        store.parts[0].array("nuclei")


def test_a_part_counts_only_with_its_file_recipe_and_tar(store, tmp_path):
    one = shard(tmp_path)
    assert is_complete(store.folder, one, RECIPE)
    assert not is_complete(store.folder, one, RECIPE | {"views": 8})
    assert not is_complete(store.folder, shard(tmp_path, sha="d" * 64), RECIPE)
    path = store.folder / "parts" / f"{part_name(one)}.h5"
    os.truncate(path, path.stat().st_size - 1)
    assert not is_complete(store.folder, one, RECIPE)
    path.unlink()
    assert not is_complete(store.folder, one, RECIPE)


@pytest.mark.faults
def test_a_killed_write_leaves_no_part(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(h5py.File, "flush", broken)
    with pytest.raises(RuntimeError, match="killed"):
        write_part(tmp_path / "store", shard(tmp_path), arrays())
    assert list((tmp_path / "store" / "parts").iterdir()) == []
    assert not is_complete(tmp_path / "store", shard(tmp_path), RECIPE)


def test_commit_removes_what_no_shard_has(store, tmp_path):
    write_part(store.folder, shard(tmp_path, 2), arrays())
    (store.folder / "parts" / ".train-000000.h5.1.tmp").write_bytes(b"half")
    left = commit(store.folder, RECIPE, [shard(tmp_path)], SOURCES)
    assert left.rows == 3 and left.digest != store.digest
    stem = part_name(shard(tmp_path))
    assert sorted(p.name for p in (store.folder / "parts").iterdir()) == [f"{stem}.h5", f"{stem}.json"]


def test_parts_of_shards_come_in_their_order(store, tmp_path):
    shards = [shard(tmp_path, 1, sha="c" * 64), shard(tmp_path)]
    assert [part.name[:12] for part in store.parts_of(shards)] == ["train-000001", "train-000000"]
    with pytest.raises(DataError, match=r"lacks 1 of 2 shards, .*train-000005\.tar: run lgd cache-latents"):
        store.parts_of([shards[0], shard(tmp_path, 5, sha="e" * 64)])


def test_folders_without_a_store_are_refused(tmp_path, store):
    with pytest.raises(DataError, match=r"no finished feature store .*store\.json is missing"):
        Store(tmp_path)
    shutil.copytree(store.folder, tmp_path / "other")
    (tmp_path / "other" / "store.json").write_text('{"format": "something/9"}')
    with pytest.raises(DataError, match="format lgd-latents/1"):
        Store(tmp_path / "other")
