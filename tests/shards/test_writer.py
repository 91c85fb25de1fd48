"""The folder of a build, and the requests of one with urls, over the wire against an S3 server on loopback.

`test_shards_remote.py` compares bytes and interrupts builds.
"""

import json
import logging
import os
import re
import urllib.request

import pytest
from test_builder import build_by, contents, make_bci

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.io.files import list_folder, read_bytes, write_bytes, write_json
from lgd.io.location import RemoteError, as_location
from lgd.io.tables import read_csv
from lgd.shards.builder import build
from lgd.shards.candidate import Problem, write_problems
from lgd.shards.options import ShardOptions
from lgd.shards.pairs import find_pairs
from lgd.shards.writer import check_chunk

PAIRS = 10


class Store:
    """An S3 server on loopback, and the requests that it answered."""

    def __init__(self, server):
        self.server = server
        host, port = server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.requests: list[str] = []

    def asked(self, pattern):
        """How many requests were like METHOD /PATH."""
        return sum(re.fullmatch(pattern, request) is not None for request in self.requests)

    def let_in(self, requests):
        """Answer so many requests more whatever the credentials, and none after them."""
        ask = urllib.request.Request(f"{self.url}/moto-api/reset-auth", str(requests).encode(), method="POST")
        ask.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(ask).close()


@pytest.fixture(scope="module")
def store():
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    kept = Store(server)

    class Listener(logging.Handler):
        def emit(self, record):
            found = re.search(r"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP", record.getMessage())
            if found:
                kept.requests.append(f"{found[1]} {found[2]}")

    logger, listener = logging.getLogger("werkzeug"), Listener()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(listener)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", kept.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # File systems are kept by fsspec; those of another server must not be taken.
        S3FileSystem.clear_instance_cache()
        as_location("s3://data/x").fs.mkdir("data")
        yield kept
        S3FileSystem.clear_instance_cache()
    logger.removeHandler(listener)
    logger.setLevel(before[0])
    logger.propagate = before[1]
    server.stop()


@pytest.fixture(scope="module")
def given(tmp_path_factory, store):
    """Pairs here and at s3://data/bci, and the shards that a local build makes of them."""
    folder = tmp_path_factory.mktemp("given")
    root = make_bci(folder / "bci", PAIRS)
    for path in root.rglob("*.png"):
        write_bytes(as_location("s3://data/bci") / path.relative_to(root).as_posix(), path.read_bytes())
    # What a store's console leaves for a folder, and what a Mac leaves in it.
    write_bytes("s3://data/bci/HE/train/._x.png", b"")
    as_location("s3://data/bci").fs.touch("data/bci/HE/train/")
    return root, folder / "out", build(options(root, folder / "out"))[0]


def options(root, out, **changes):
    return ShardOptions(**{"layout": "bci", "root": str(root), "out": str(out), "shard_size": 3, **changes})


def remote_contents(url):
    return {name: read_bytes(as_location(url) / name) for name in list_folder(url)}


def test_one_request_an_image_and_phase(given, store):
    root, whole, manifest = given
    store.requests.clear()
    assert build(options("s3://data/bci", "s3://data/a")) == (manifest, True)
    assert remote_contents("s3://data/a") == contents(whole)
    # One request an image and phase; the folders are listed, not the files asked for.
    assert store.asked(r"GET /data/bci/.*png") == 4 * PAIRS and store.asked(r"HEAD /data/bci/.*png") == 0
    assert store.asked(r"GET /data\?.*prefix=bci.*") <= 10
    store.requests.clear()
    assert build(options(root, "s3://data/a")) == (manifest, False)
    assert store.asked(r"(PUT|POST) /data/a/.*(tar|idx|json)") == 0 and store.asked(r"GET /data/a/.*tar") == 0
    with pytest.raises(DataError, match=r"s3://data/a already holds another shard set \(other options\)"):
        build(options(root, "s3://data/a", mpp=0.5))
    with pytest.raises(DataError, match="s3://data/bci already holds something else .HE, IHC"):
        build(options(root, "s3://data/bci"))


@pytest.mark.faults
def test_an_unreachable_store_is_not_a_bad_pair(given, store):
    """With --on-bad skip an outage would leave out good pairs."""
    root, _, _ = given
    pairs, _ = find_pairs("bci", "s3://data/bci", find_target("her2"))
    asked = options("s3://data/bci", "s3://data/e")
    store.let_in(3)
    try:
        with pytest.raises(RemoteError, match="access is denied .*set AWS_ACCESS_KEY_ID"):
            check_chunk(asked, pairs)
        with pytest.raises(RemoteError, match="s3://data/e cannot be listed: access is denied"):
            build(options(root, "s3://data/e"))
    finally:
        store.let_in("inf")


def test_a_source_that_changes_after_its_check_stops_the_build(given, store):
    name = "s3://data/bci/HE/train/00000_train_0.png"
    whole = read_bytes(name)

    def changed_between(function, jobs):
        yield from map(function, jobs)
        write_bytes(name, whole + b"\0")

    try:
        with pytest.raises(DataError, match="00000_train_0.png: changed while the shards were built"):
            build_by(changed_between, options("s3://data/bci", "s3://data/d"))
    finally:
        write_bytes(name, whole)


@pytest.mark.faults
def test_what_a_build_left_after_its_manifest_is_removed(given, tmp_path):
    root, _, manifest = given
    for out in ("s3://data/left", str(tmp_path / "left")):
        build(options(root, out))
        write_json(as_location(out) / ".building.json", {})
        write_json(as_location(out) / ".train-000000.json", {})
        assert build(options(root, out)) == (manifest, False)
        assert not [name for name in list_folder(out) if name.startswith(".")]
    write_json("s3://data/strange/.train-000000.json", json.loads("{}"))
    with pytest.raises(DataError, match="already holds something else"):
        build(options(root, "s3://data/strange"))


def test_what_was_left_out_is_no_formula_and_reads_back(tmp_path):
    given = {"key": "-1", "he": "=cmd|'/c calc'!A1.png", "ihc": "'=x\n\x1b[2J.png", "reason": "@a: b"}
    problem = Problem(given["he"], given["reason"], given["key"], given["he"], given["ihc"])
    write_problems(tmp_path / "rejected.csv", [problem])
    text = (tmp_path / "rejected.csv").read_text()
    assert text.splitlines()[1].startswith("'-1,'=cmd|'/c calc'!A1.png,") and "\x1b" not in text
    assert [row for _, row in read_csv(tmp_path / "rejected.csv", required=("key",))] == [given]
