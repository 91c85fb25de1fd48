"""A store at a url: an S3 server on loopback, over the wire."""

from pathlib import Path

import numpy as np
import pytest
from filling import contents_of

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.store.store import Rows, Store

URL = "s3://stores/latents"


@pytest.fixture(scope="module")
def s3(s3_server):
    s3_server.create_bucket(Bucket="stores")
    return s3_server


@pytest.fixture(scope="module")
def remote(s3, small_parts, change):
    """The run of `small_parts` with its store in a bucket."""
    config = change(small_parts, latents={"dir": URL})
    assert cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)[1] == len(
        ShardSet.open(config.shard_dirs).shards
    )
    return config


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """The local cache."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(s3):
    return {entry["Key"] for entry in s3.list_objects_v2(Bucket="stores")["Contents"]}


def test_a_store_in_a_bucket_is_the_local_one(remote, small_parts, s3, copies):
    store, local = Store(URL), Store(small_parts.latents.dir)
    assert store.digest == local.digest and store.verify() == []
    for part, other in zip(store.parts, local.parts, strict=True):
        assert np.array_equal(part.array("pooled"), other.array("pooled"))
    shards = ShardSet.open(remote.shard_dirs).shards
    keys = [part.array("key")[0].decode() for part in store.parts_of(shards)]
    rows = Rows(store.parts_of(shards)).read(list(range(len(shards))), [0] * len(shards), keys)
    assert rows["pooled"].shape[0] == len(shards)
    # Read through copies, checked when they were taken.
    assert len(list(copies.glob("*.h5"))) == 2 * len(store.parts)
    there = {name.partition("/parts/")[2] for name in names(s3) if "/parts/" in name}
    assert set(contents_of(Path(local.folder))) == there


def test_caching_into_a_bucket_goes_on_by_parts_and_removes_others_when_asked(remote, change, s3):
    shards = ShardSet.open(remote.shard_dirs).shards
    assert cache_latents(remote, shards, workers=0)[1] == 0
    victim = sorted(name for name in names(s3) if name.endswith(".json") and "/parts/" in name)[3]
    s3.delete_object(Bucket="stores", Key=victim)
    assert cache_latents(remote, shards, workers=0)[1] == 1
    fewer, computed, pruned = cache_latents(remote, shards[:-2], workers=0, prune=True)
    assert (computed, pruned) == (0, 2) and len(fewer.parts) == len(shards) - 2
    assert sum("/parts/" in name for name in names(s3)) == 4 * len(fewer.parts)
    assert cache_latents(remote, shards, workers=0)[1] == 2


def test_another_recipe_is_refused_there_too(remote, change):
    with pytest.raises(DataError, match="teacher.map: 2 in the store, 4 asked for"):
        cache_latents(change(remote, latents={"map": 4}), ShardSet.open(remote.shard_dirs).shards, workers=0)


@pytest.mark.faults
def test_a_damaged_object_is_named_and_never_kept(remote, s3, copies, capsys):
    part = Store(URL).parts[2]
    key = f"latents/parts/teacher/{part.name}.h5"
    whole = s3.get_object(Bucket="stores", Key=key)["Body"].read()
    s3.put_object(Bucket="stores", Key=key, Body=whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(DataError, match=rf"{part.name}\.h5 does not match its digest"):
            part.array("pooled")
        assert not list(copies.glob("*.h5"))
        assert main(["verify", URL]) == 1
        told = capsys.readouterr().err
        assert "has 1 problem(s)" in told and part.name in told
        s3.delete_object(Bucket="stores", Key=key)
        with pytest.raises(DataError, match=rf"{part.name}\.h5 is missing"):
            part.array("pooled")
    finally:
        s3.put_object(Bucket="stores", Key=key, Body=whole)
    assert part.array("pooled").shape[0] == part.rows
    assert main(["verify", URL]) == 0


def test_what_is_no_store_is_told(s3, remote):
    with pytest.raises(DataError, match=r"s3://stores/nothing/store.json is missing: it is no finished feature store"):
        Store("s3://stores/nothing")
