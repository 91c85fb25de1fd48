"""The builder with urls: from and to an S3 server and an HTTP server on loopback, over the wire."""

import collections
import csv
import functools
import http.server
import io
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.io import calls
from lgd.ray_jobs import cluster
from lgd.shards.builder import build
from lgd.shards.image import encode
from lgd.shards.options import ShardOptions
from lgd.shards.verify import verify

PAIRS = 30


@pytest.fixture(scope="module")
def s3(s3_server):
    """The client; buckets `data` and `versions`."""
    s3_server.create_bucket(Bucket="data")
    s3_server.create_bucket(Bucket="versions")
    s3_server.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    return s3_server


def forget_connections():
    """s3fs keeps the address and the keys of its first use, and a store that answered is waited for."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    calls._answered.clear()


@pytest.fixture(scope="module")
def root(s3, tmp_path_factory):
    """A folder in BCI's layout with a CSV of the same pairs; also in the bucket, as s3://data/bci."""
    folder = tmp_path_factory.mktemp("remote") / "bci"
    rows = []
    for number in range(PAIRS):
        split, level = ("test" if number % 5 == 4 else "train"), ("0", "1+", "2+", "3+")[number % 4]
        names = [f"{stain}/{split}/{number:05d}_{split}_{level}.png" for stain in ("HE", "IHC")]
        for stain, name in enumerate(names):
            pixels = np.random.default_rng([number, stain]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            content = encode(np.kron(pixels, np.ones((8, 8, 1), np.uint8)), "jpg")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        rows.append(f"{names[0]},{names[1]},{level},{split}\n")
    (folder / "pairs.csv").write_text("he,ihc,level,split\n" + "".join(rows))
    for path in folder.rglob("*.*"):
        s3.upload_file(str(path), "data", f"bci/{path.relative_to(folder).as_posix()}")
    return folder


def options(root, out, **changes):
    return ShardOptions(**{"layout": "bci", "root": str(root), "out": str(out), "shard_size": 7, **changes})


@pytest.fixture(scope="module")
def local(root):
    """The set of the local folder in a local folder, and its manifest."""
    out = root.parent / "out"
    return out, build(options(root, out))[0]


def stored(s3, folder, bucket="data"):
    """Name and content of all that lies in a folder of a bucket."""
    found = s3.list_objects_v2(Bucket=bucket, Prefix=f"{folder}/").get("Contents", [])
    keys = [entry["Key"] for entry in found]
    return {key[len(folder) + 1 :]: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_bytes_are_the_same_wherever_the_pairs_and_the_set_lie(s3, root, local, tmp_path, monkeypatch):
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    here, manifest = local
    assert build(options("s3://data/bci", tmp_path / "out")) == (manifest, True)
    assert contents(tmp_path / "out") == contents(here)
    assert build(options(root, "s3://data/from-local")) == (manifest, True)
    assert build(options("s3://data/bci/", "s3://data/from-s3/")) == (manifest, True)
    assert stored(s3, "from-local") == stored(s3, "from-s3") == contents(here)
    assert build(options("s3://data/bci", "s3://data/from-s3")) == (manifest, False)
    assert verify("s3://data/from-s3") == []
    # Tiles are read, cut and encoded in many threads; their order stays.
    tiled = {"tile": 16, "split": "group:0.6,0.2,0.2", "shard_size": 50}
    build(options(root, tmp_path / "tiles", **tiled))
    build(options("s3://data/bci", "s3://data/tiles", **tiled))
    assert stored(s3, "tiles") == contents(tmp_path / "tiles")


def test_workers_of_ray_read_and_write_urls(s3, root, local, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked = ["--layout", "bci", "--root", "s3://data/bci", "--out", "s3://data/ray", "--shard-size", "7"]
    try:
        assert main(["build-shards", *asked, "--workers", "2"]) == 0
    finally:
        cluster.disconnect()
    assert stored(s3, "ray") == contents(local[0])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["split", "samples", "0", "1+", "2+", "3+", "unknown", "shards", "MB"]
    assert lines[1][:2] == ["train", "24"] and lines[2][:2] == ["test", "6"] and lines[1][7] == "4"
    assert lines[3] == "built: s3://data/ray (from 30 pairs)".split()


@pytest.fixture
def web(root):
    """The url of a server of the folder; `web.broken` names a file that it cannot give now."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        broken = ""

        def do_GET(self):
            if self.broken and self.path.endswith(self.broken):
                return self.send_error(503)
            return super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.handler = Handler
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_csv_behind_http_gives_the_set_of_the_local_one(s3, root, web, tmp_path):
    manifest, _ = build(options(root / "pairs.csv", tmp_path / "here", layout="csv"))
    assert manifest.splits["train"].labels["0"] == 6
    for number, where in enumerate([f"{web.url}/pairs.csv", web.url, "s3://data/bci"]):
        assert build(options(where, tmp_path / str(number), layout="csv")) == (manifest, True)
        assert contents(tmp_path / str(number)) == contents(tmp_path / "here")
    with pytest.raises(DataError, match=r"cannot be listed: name the files in a CSV \(--layout csv\)"):
        build(options(web.url, tmp_path / "bci"))
    with pytest.raises(DataError, match="cannot be written to: give --out a folder, or a url such as s3://"):
        build(options(root, f"{web.url}/out"))


@pytest.mark.faults
def test_a_remote_that_fails_is_not_taken_for_a_bad_pair(s3, web, tmp_path):
    web.handler.broken = "HE/train/00007_train_3+.png"
    asked = options(f"{web.url}/pairs.csv", tmp_path / "out", layout="csv", on_bad="skip")
    with pytest.raises(DataError, match=r"HE/train/00007_train_3\+.png cannot be read .*503.*try again"):
        build(asked)
    web.handler.broken = ""
    assert build(asked)[0].sources.rejected == 0


@pytest.mark.faults
def test_bad_remote_pairs_stop_the_build_or_are_listed(s3, root, tmp_path):
    for path in root.glob("*/test/*"):
        s3.upload_file(str(path), "data", f"bad/{path.relative_to(root).as_posix()}")
    s3.put_object(Bucket="data", Key="bad/IHC/test/00009_test_1+.png", Body=b"\xff\xd8 not a JPEG")
    rows = [
        f"{stain}/test/{name}_test_{level}.png"
        for name, level in (("00004", "0"), ("00009", "1+"))
        for stain in ("HE", "IHC")
    ]
    text = f"he,ihc,split\n{rows[0]},{rows[1]},test\n{rows[2]},{rows[3]},test\nHE/gone.png,{rows[1]},test\n"
    s3.put_object(Bucket="data", Key="bad/few.csv", Body=text.encode())
    asked = {"root": "s3://data/bad/few.csv", "out": "s3://data/bad-out", "layout": "csv"}
    with pytest.raises(DataError, match="2 problems") as raised:
        build(options(**asked))
    assert "HE/gone.png: is missing" in str(raised.value) and "IHC/test/00009_test_1+.png: " in str(raised.value)
    assert stored(s3, "bad-out") == {}
    assert build(options(**asked, on_bad="skip"))[0].sources.rejected == 2
    left_out = csv.DictReader(io.StringIO(stored(s3, "bad-out")["rejected.csv"].decode()))
    assert [row["he"] for row in left_out] == ["HE/gone.png", rows[2]]


@pytest.mark.faults
@pytest.mark.parametrize("where", ["s3", "local"])
def test_a_killed_build_goes_on_where_it_stopped(s3, root, local, tmp_path, where):
    # A shard is soon done here, and takes 0.07 s there.
    small = {"shard_size": 1, "tile": 16 if where == "local" else 0}
    out = str(tmp_path / "set") if where == "local" else "s3://versions/set"
    reference, _ = build(options(root, tmp_path / "reference", **small))
    asked = [
        "--layout",
        "bci",
        "--root",
        "s3://data/bci",
        "--out",
        out,
        "--shard-size",
        "1",
        "--tile",
        str(small["tile"]),
    ]

    def names():
        if where == "local":
            return {path.name for path in Path(out).iterdir()} if Path(out).is_dir() else set()
        found = s3.list_objects_v2(Bucket="versions", Prefix="set/").get("Contents", [])
        return {entry["Key"].removeprefix("set/") for entry in found}

    def finished():
        # The last that is written of a shard.
        last = ".json"
        return {Path(name).stem.lstrip(".") for name in names() if name.endswith(last) and "-0" in name}

    child = subprocess.Popen([sys.executable, "-m", "lgd", "build-shards", *asked], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(finished()) < 3 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = finished()
    assert len(done) >= 3 and "manifest.json" not in names() and ".building.json" in names()
    before = {name: Path(out, f"{name}.tar").stat().st_mtime_ns for name in done} if where == "local" else {}
    with pytest.raises(DataError, match="unfinished build of something else"):
        build(options("s3://data/bci", out, **small | {"shard_size": 2}))
    assert build(options("s3://data/bci", out, **small)) == (reference, True)
    if where == "local":
        assert {name: Path(out, f"{name}.tar").stat().st_mtime_ns for name in done} == before
        assert contents(out) == contents(tmp_path / "reference")
        return
    assert stored(s3, "set", "versions") == contents(tmp_path / "reference")
    pages = s3.get_paginator("list_object_versions").paginate(Bucket="versions", Prefix="set/")
    written = collections.Counter(entry["Key"] for page in pages for entry in page["Versions"])
    assert {written[f"set/{name}.tar"] for name in done} == {1}, "finished shards are not written again"


class Denying(http.server.BaseHTTPRequestHandler):
    """An S3 that knows nobody: what a wrong key meets."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_GET

    def log_message(self, *_):
        pass


def test_what_cannot_be_reached_is_told_in_one_line(s3, root, tmp_path, capsys, monkeypatch):
    here, out = str(root), str(tmp_path / "out")

    def told(root, out):
        status = main(["build-shards", "--layout", "bci", "--root", root, "--out", out])
        message = capsys.readouterr().err.strip()
        assert status == 1 and message.startswith("lgd: ") and "\n" not in message, message
        return message

    assert "s3://nobody/bci cannot be listed: its bucket does not exist: create it" in told("s3://nobody/bci", out)
    assert "s3://nobody/out cannot be listed: its bucket does not exist: create it" in told(here, "s3://nobody/out")
    assert "s3://data/nowhere does not exist: give --root" in told("s3://data/nowhere", out)
    assert "urls of nope are not read or written: use s3://" in told("nope://data/bci", out)
    assert "pipe:cat x: is neither a path nor a url" in told("pipe:cat x", out)
    assert "pipe:cat x: is neither a path nor a url" in told(here, "pipe:cat x")
    denying = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denying)
    threading.Thread(target=denying.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{denying.server_address[1]}")
    forget_connections()
    refused = r"access is denied \(The key does not exist\): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert re.search(f"s3://data/bci cannot be listed: {refused}", told("s3://data/bci", out))
    assert re.search(f"s3://data/new cannot be listed: {refused}", told(here, "s3://data/new"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_connections()
    assert re.search(r"access is denied .*nobody.*: set AWS_ACCESS_KEY_ID", told("s3://data/bci", out))
    forget_connections()
    denying.shutdown()
    denying.server_close()
    assert not Path(out).exists()
