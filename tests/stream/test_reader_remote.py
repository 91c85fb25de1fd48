"""Streaming from a url: over the wire, from an S3 server on loopback."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs

from lgd.base.errors import DataError
from lgd.io.files import read_json
from lgd.io.location import RemoteError
from lgd.shards.shard_set import ShardFolder
from lgd.stream.reader import Reader, in_batches, stream
from lgd.train.launch import train_under


@pytest.fixture
def bucket(s3_server, tissue_config, tmp_path, monkeypatch):
    """The url of a copy of the shards, and a client; the cache is empty."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    name = f"lgd-{time.time_ns()}"
    s3_server.create_bucket(Bucket=name)
    for path in sorted(Path(tissue_config.shard_dirs[0]).iterdir()):
        s3_server.upload_file(str(path), name, f"sets/tissue/{path.name}")
    return f"s3://{name}/sets/tissue", s3_server


def cached(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".idx"))


def test_samples_of_a_url_are_those_of_the_files(bucket, tissue_config, tmp_path):
    url, client = bucket
    here = Reader(ShardFolder.open(tissue_config.shard_dirs[0]).shards, ("he", "ihc"), 64)
    shards = ShardFolder.open(url).shards
    numbers = np.random.default_rng(0).permutation(here.total)
    found = list(stream(Reader(shards, ("he", "ihc"), 64), in_batches(numbers, 7), threads=3))
    assert [row.number for samples in found for row in samples.rows] == numbers.tolist()
    for row in (row for samples in found for row in samples.rows):
        local = here.read(row.number)
        assert (row.key, row.meta) == (local.key, local.meta)
        assert all(np.array_equal(row.images[role], local.images[role]) for role in ("he", "ihc"))
    # Each shard was fetched once, and is not asked for again.
    assert len(cached(tmp_path)) == 2 * len(shards)
    name = url.split("/")[2]
    for entry in client.list_objects_v2(Bucket=name)["Contents"]:
        client.delete_object(Bucket=name, Key=entry["Key"])
    again = list(stream(Reader(shards, ("he",), 64), in_batches(numbers, 7), threads=2))
    assert sum(len(samples.rows) for samples in again) == here.total


def test_shards_are_fetched_before_they_are_needed(bucket, tmp_path):
    url, _ = bucket
    shards = ShardFolder.open(url).shards
    batches = stream(Reader(shards, ("he",), 64), in_batches(range(48), 4), threads=1, prefetch=0)
    next(batches)
    deadline = time.monotonic() + 20
    while len(cached(tmp_path)) < 2 * len(shards) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(cached(tmp_path)) == 2 * len(shards)
    batches.close()


@pytest.mark.faults
def test_a_shard_that_is_gone_or_damaged_is_named(bucket, tissue_config):
    url, client = bucket
    shards = ShardFolder.open(url).shards
    name, _, folder = url.removeprefix("s3://").partition("/")
    tar = (Path(tissue_config.shard_dirs[0]) / f"{shards[0].name}.tar").read_bytes()
    client.put_object(Bucket=name, Key=f"{folder}/{shards[0].name}.tar", Body=tar[:-1] + b"\1")
    client.delete_object(Bucket=name, Key=f"{folder}/{shards[1].name}.tar")
    reader = Reader(shards, ("he",), 64)
    for number, shard in ((0, shards[0]), (int(reader.first[1]), shards[1])):
        with pytest.raises(DataError, match=rf"s3://.*/{shard.name}\.tar"):
            reader.read(number)
    assert reader.read(int(reader.first[2])).shard == 2


@pytest.mark.faults
def test_threads_that_wait_for_one_shard_of_a_lost_store_fail_together(bucket, monkeypatch):
    url, _ = bucket
    reader = Reader(ShardFolder.open(url).shards, ("he",), 64)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception() for future in [pool.submit(reader.open, 0) for _ in range(4)]]
    assert all(isinstance(error, RemoteError) for error in errors)
    assert 1 <= time.monotonic() - began < 3, "one waits, and the others for it"
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    assert reader.open(0)


def test_training_from_a_url_gives_the_network_of_the_files(bucket, tissue_run, change, tmp_path):
    url, _ = bucket
    made = []
    for name, shards in (("files", tissue_run.shard_dirs), ("url", [url])):
        student = {"dir": str(tmp_path / name), "method": "lgd", "epochs": 1}
        assert train_under(change(tissue_run, data={"shards": shards}, student=student), "student")
        made.append(read_json(tmp_path / name / "config.json"))
    assert made[0]["weights_sha256"] == made[1]["weights_sha256"] and made[0]["inputs"] == made[1]["inputs"]
