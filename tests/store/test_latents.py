import json
import os
import shutil

import h5py
import numpy as np
import pytest
from filling import RECIPE

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.io.digests import digest_of
from lgd.io.files import write_json
from lgd.shards.archive import Shard
from lgd.store import parts
from lgd.store.cache import is_complete
from lgd.store.commit import commit
from lgd.store.document import StoreDocument, part_name
from lgd.store.parts import read_all
from lgd.store.store import PATCHES, TEACHER, Rows, Store
from lgd.store.writer import shard_writer


def recipe_with(**changes):
    """The recipe with another teacher's."""
    return RECIPE.model_copy(update={"teacher": RECIPE.teacher.model_copy(update=changes)})


def complete(folder, shard, recipe=RECIPE):
    return [is_complete(folder, layer, shard, recipe) for layer in (PATCHES, TEACHER)]


def shard(tmp_path, number=0, samples=3, sha="b" * 64):
    name = f"train-{number:06d}"
    return Shard(
        path=tmp_path / f"{name}.tar",
        name=name,
        split="train",
        samples=samples,
        bytes=1,
        sha256=sha,
        idx_sha256="0" * 64,
        extensions={"json": "json", "he": "png", "ihc": "png"},
        keeps_files=True,
        target=find_target("her2"),
    )


def arrays(samples=3, seed=0):
    random = np.random.default_rng(seed)
    return {
        "pooled": random.standard_normal((samples, 1, 5)).astype(np.float16),
        "map": random.standard_normal((samples, 1, 5, 2, 2)).astype(np.float16),
        "label": np.array([0, 2, 3], np.float32)[:samples],
        "key": np.array([b"a", b"bcd", b"ef"])[:samples],
    }


@pytest.fixture
def store(tmp_path):
    shards = [shard(tmp_path), shard(tmp_path, 1, sha="c" * 64)]
    for number, one in enumerate(shards):
        write_part(tmp_path / "store", one, arrays(seed=number))
    return commit(tmp_path / "store", RECIPE, shards)


def write_part(folder, shard, arrays):
    with shard_writer(folder, shard, RECIPE) as writer:
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
    for name in ("parts/.DS_Store", "parts/patches/.nfs0001", "parts/patches/._a.h5"):
        (store.folder / name).touch()
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
    pairs = [(part, one) for part in store.parts for one in part.files.values()]
    for part, one in pairs:
        datasets = one.sidecar().datasets
        with h5py.File(one.path) as file:
            assert set(file) == set(datasets)
            for name, entry in datasets.items():
                dataset = file[name]
                assert dataset.chunks is None and dataset.compression is None
                assert dataset.id.get_offset() == entry.offset and dataset.shape == entry.shape
                assert np.array_equal(dataset[:], part.array(name))


def test_who_reads_pooled_latents_reads_nothing_else(store, monkeypatch):
    """Bytes whose digest is taken, which is all that the reader itself reads."""
    read = []
    digest = parts.xxhash.xxh3_128_hexdigest
    monkeypatch.setattr(
        parts.xxhash, "xxh3_128_hexdigest", lambda content: read.append(len(content)) or digest(content)
    )
    pooled = read_all(Store(store.folder).parts, "pooled")
    assert sum(read) == pooled.nbytes


def test_another_recipe_is_refused_field_by_field(store):
    other = recipe_with(weights_sha256="f" * 64, views=8, dtype="float32")
    with pytest.raises(DataError) as caught:
        Store(store.folder, other)
    message = str(caught.value)
    assert f"  teacher.weights_sha256: {'a' * 64} in the store, {'f' * 64} asked for" in message
    assert "  teacher.views: 1 in the store, 8 asked for" in message
    assert "  teacher.dtype: float16 in the store, float32 asked for" in message
    assert "size:" not in message and "latents.dir" in message
    assert Store(store.folder, RECIPE).rows == 6


@pytest.mark.parametrize("name", ["label", "key", "pooled", "map"])
@pytest.mark.faults
def test_a_flipped_bit_is_found_at_first_use_and_by_verify(store, name):
    file = store.parts[1].files[TEACHER if name in ("pooled", "map") else PATCHES]
    flip_bit(file.path, file.sidecar().datasets[name].offset)
    opened = Store(store.folder)
    assert np.array_equal(opened.parts[0].array("key"), arrays()["key"])
    with pytest.raises(DataError, match=rf"train-000001-c+\.h5 does not match its digest .dataset {name}.: delete it"):
        opened.parts[1].array(name)
    assert [problem for problem in opened.verify() if "train-000001" in problem]


def test_a_flipped_bit_between_the_datasets_is_found_by_verify(store):
    flip_bit(store.parts[1].path, 0)
    assert [problem for problem in Store(store.folder).verify() if "train-000001" in problem]


@pytest.mark.faults
def test_a_truncated_part_is_found(store):
    path = store.parts[0].path
    size = path.stat().st_size
    os.truncate(path, size - 1)
    opened = Store(store.folder)
    with pytest.raises(DataError, match=f"has {size - 1} bytes and not {size}"):
        opened.parts[0].array("label")
    path.unlink()
    assert f"part {path} is missing: run lgd cache-latents again" in opened.verify()


def test_a_part_that_is_replaced_while_it_is_verified_is_sound(store):
    """Or evicted from the cache of remote files: HDF5 opens no file by a name that it has not any more."""
    part = store.parts[0].files[PATCHES]
    sidecar = part.sidecar()
    with part.open(sidecar) as file:
        part.path.unlink()
        assert parts._check_hdf5(part.path, file, sidecar) is None


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
    with pytest.raises(DataError, match=r"store\.json: its digest is not that of its content.*: delete it"):
        Store(store.folder)
    path.write_text(whole)
    rewrite(path, lambda document: document["patches"]["parts"].__setitem__(0, "0" * 64))
    problems = Store(store.folder).verify()
    assert len(problems) == 1 and "train-000000" in problems[0] and "is not the one of store.json" in problems[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["datasets"]["pooled"].update(offset=d["bytes"]), "dataset 'pooled' of shape .* does not fit"),
        (lambda d: d["datasets"]["pooled"].update(offset=d["datasets"]["map"]["offset"]), "datasets overlap"),
        (lambda d: d["datasets"]["pooled"].update(offset=-8), "field 'datasets.pooled.offset'"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 2**40, 2]), "field 'datasets.pooled.shape.1'"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 2**30, 2**20]), "does not fit the part"),
        (lambda d: d["datasets"]["pooled"].update(dtype="|O"), "field 'datasets.pooled.dtype'"),
        (lambda d: d["datasets"].pop("key"), "no dataset key"),
        (lambda d: d.update(rows=2), "does not fit"),
        (lambda d: d.update(name="../train-000000"), "field 'name'"),
        (lambda d: d.update(name="train-000000"), "is of part train-000000 of teacher"),
        (lambda d: d.update(layer="patches"), "of patches"),
        (lambda d: d.update(datasets=[]), "field 'datasets'"),
        (lambda d: d["datasets"]["pooled"].update(shape=[3, 1, 4]), "states other datasets than store.json"),
        (
            lambda d: d["datasets"]["pooled"].update(offset=d["datasets"]["pooled"]["offset"] - 2),
            "does not match its digest .dataset pooled",
        ),
    ],
)
def test_a_forged_sidecar_is_refused(store, change, told):
    """Sidecar and store.json agree with each other and with their digests."""
    sidecar = rewrite(store.parts[0].files[TEACHER].path.with_suffix(".json"), change)

    def agree(document):
        document["teachers"][TEACHER]["parts"][0] = sidecar["digest"]

    rewrite(store.folder / "store.json", agree)
    part = Store(store.folder).parts[0]
    with pytest.raises(DataError, match=told):
        part.array("pooled")
    assert len(Store(store.folder).verify()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["entries"][0].update(name="../../etc/passwd"),
        lambda d: d["entries"][0].update(rows=-3),
        lambda d: d["entries"].append(d["entries"][0]),
        lambda d: d["entries"].append(7),
        lambda d: d.update(entries=[]),
        lambda d: d["patches"]["parts"].__setitem__(0, 3),
        lambda d: d["patches"]["parts"].pop(),
        lambda d: d["patches"].update(parts=None),
        lambda d: d["teachers"]["teacher"]["datasets"]["pooled"].update(dtype="|O"),
        lambda d: d["teachers"]["teacher"]["datasets"]["pooled"].update(shape=[2**60]),
        lambda d: d["teachers"]["teacher"].pop("recipe"),
        lambda d: d["teachers"].update({"../x": d["teachers"].pop("teacher")}),
        lambda d: d["teachers"].update(patches=d["teachers"]["teacher"]),
    ],
)
def test_a_forged_store_json_is_refused(store, change):
    rewrite(store.folder / "store.json", change)
    with pytest.raises(DataError, match=r"store\.json: .*: delete it"):
        Store(store.folder)


def test_a_missing_dataset_is_named(store):
    with pytest.raises(DataError, match="has no dataset 'nuclei'"):
        store.parts[0].array("nuclei")


def test_a_part_counts_only_with_its_file_recipe_and_tar(store, tmp_path):
    one = shard(tmp_path)
    assert complete(store.folder, one) == [True, True]
    assert complete(store.folder, one, recipe_with(views=8)) == [True, False]
    assert complete(store.folder, shard(tmp_path, sha="d" * 64)) == [False, False]
    path = store.folder / "parts" / TEACHER / f"{part_name(one)}.h5"
    os.truncate(path, path.stat().st_size - 1)
    assert complete(store.folder, one) == [True, False]
    path.unlink()
    assert complete(store.folder, one) == [True, False]


@pytest.mark.faults
def test_a_killed_write_leaves_no_part(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(h5py.File, "flush", broken)
    with pytest.raises(RuntimeError, match="killed"):
        write_part(tmp_path / "store", shard(tmp_path), arrays())
    assert not [path for path in (tmp_path / "store" / "parts").rglob("*") if path.is_file()]
    assert complete(tmp_path / "store", shard(tmp_path)) == [False, False]


def test_a_store_only_grows(store, tmp_path):
    mine = [shard(tmp_path), shard(tmp_path, 1, sha="c" * 64)]
    before, digest = [part.name for part in store.parts], store.digest_of(mine)
    write_part(store.folder, shard(tmp_path, 2, sha="d" * 64), arrays())
    grown = commit(store.folder, RECIPE, [shard(tmp_path, 2, sha="d" * 64)])
    assert [part.name for part in grown.parts][:2] == before and grown.rows == 9 and grown.verify() == []
    assert grown.digest != store.digest and grown.digest_of(mine) == digest
    assert commit(store.folder, RECIPE, mine).digest == grown.digest


def test_what_no_shard_of_the_run_has_is_removed_when_asked(store, tmp_path):
    write_part(store.folder, shard(tmp_path, 2), arrays())
    (store.folder / "parts" / PATCHES / ".train-000000.h5.1.tmp").write_bytes(b"half")
    left = commit(store.folder, RECIPE, [shard(tmp_path)], prune=True)
    assert left.rows == 3 and left.digest != store.digest
    stem = part_name(shard(tmp_path))
    for layer in (PATCHES, TEACHER):
        names = sorted(path.name for path in (store.folder / "parts" / layer).iterdir())
        assert names == [f"{stem}.h5", f"{stem}.json"]


def test_a_store_that_is_there_has_nothing_of_a_killed_process(store, tmp_path, monkeypatch):
    """Also where the next one was killed as soon as there was a store, which nobody tidies any more."""
    left = store.folder / "parts" / PATCHES / ".train-000000.h5.1.tmp"
    left.write_bytes(b"half")
    write = StoreDocument.write

    def write_and_die(self, path):
        write(self, path)
        raise RuntimeError("killed")

    monkeypatch.setattr(StoreDocument, "write", write_and_die)
    with pytest.raises(RuntimeError, match="killed"):
        commit(store.folder, RECIPE, [shard(tmp_path)])
    assert not left.exists() and Store(store.folder).verify() == []


def test_parts_of_shards_come_in_their_order(store, tmp_path):
    shards = [shard(tmp_path, 1, sha="c" * 64), shard(tmp_path)]
    assert [part.name[:12] for part in store.parts_of(shards)] == ["train-000001", "train-000000"]
    with pytest.raises(
        DataError, match=r"lacks latents of teacher for 1 of 2 shards, .*train-000005\.tar: run lgd cache-latents"
    ):
        store.parts_of([shards[0], shard(tmp_path, 5, sha="e" * 64)])


def test_folders_without_a_store_are_refused(tmp_path, store):
    with pytest.raises(DataError, match=r"store\.json is missing: it is no finished feature store; run lgd"):
        Store(tmp_path)
    shutil.copytree(store.folder, tmp_path / "other")
    (tmp_path / "other" / "store.json").write_text('{"format": "something/9"}')
    with pytest.raises(DataError, match="it should be lgd-latents/2"):
        Store(tmp_path / "other")
