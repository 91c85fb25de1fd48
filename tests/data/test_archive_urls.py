"""Shards behind a url: read and verified through the cache, which keeps no bad index."""

import functools
import http.server
import shutil
import threading

import pytest

from lgd.data.archive import read_sample
from lgd.data.manifest import open_shards
from lgd.data.verify import verify
from lgd.errors import DataError


@pytest.fixture(scope="module")
def ours(tissue_config):
    """Shards of 48 pairs, and what we read from them: [(key, KEY.json, H&E bytes, IHC bytes)]."""
    shards = open_shards(tissue_config.shard_dirs[0])[1]
    found = []
    for shard in shards:
        file, index = shard.open()
        with file:
            for row in range(shard.samples):
                meta, contents = read_sample(file, index, row, shard, ("he", "ihc"))
                found.append((meta["key"], meta, bytes(contents["he"]), bytes(contents["ihc"])))
    assert len(found) == 48
    return shards, found


@pytest.fixture
def served(tissue_config, tmp_path, monkeypatch):
    """A copy of the shards, and its url."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tissue_config.shard_dirs[0], tmp_path / "out")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path / "out", f"http://127.0.0.1:{server.server_port}/out"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_read_and_verified_through_the_cache(served, ours):
    folder, url = served
    shards = open_shards(url)[1]
    file, index = shards[0].open()
    with file:
        meta, contents = read_sample(file, index, 0, shards[0], ("he",))
    assert (meta, bytes(contents["he"])) == (ours[1][0][1], ours[1][0][2])
    assert verify(url) == []
    (folder / f"{shards[1].name}.tar").unlink()
    copies = [path for path in (folder.parent / "cache").iterdir() if path.suffix == ".tar"]
    assert verify(url) == [], "the copies are still there"
    for copy in copies:
        copy.unlink()
    problems = verify(url)
    assert len(problems) == 1 and f"{url}/{shards[1].name}.tar is missing" in problems[0]


def test_damage_to_a_copy_is_told_with_its_place(served, tmp_path):
    _, url = served
    shard = open_shards(url)[1][0]
    file, index = shard.open()
    content = bytearray(open(file.name, "rb").read())
    content[int(index["offset"][0, 1]) + 9] ^= 1
    with open(file.name, "r+b") as stream:
        stream.write(content)
    with pytest.raises(DataError) as caught:
        read_sample(file, index, 0, shard, ("he",))
    file.close()
    assert str(shard.path) in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


@pytest.mark.parametrize("content", [b"junk", "another"])
def test_a_bad_index_does_not_stay_in_the_cache(served, content):
    """The manifest holds no digest of it, so that only its content can tell."""
    folder, url = served
    path, other = folder / "train-000000.idx", folder / "test-000000.idx"
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes()[:-48] + bytes(48) if content == "another" else content)
    shard = open_shards(url)[1][0]
    with pytest.raises(DataError, match="train-000000"):
        shard.open()
    path.write_bytes(whole)
    shard.open()[0].close()
