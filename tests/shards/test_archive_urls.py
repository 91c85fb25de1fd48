"""Shards behind a url: read and verified through the cache, which keeps no bad index."""

import functools
import http.server
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forging import forge, with_content

from lgd.base.errors import DataError
from lgd.shards.archive import read_sample
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify
from lgd.stream.reader import Reader


@pytest.fixture(scope="module")
def ours(tissue_config):
    """Shards of 48 pairs, and what we read from them: [(key, KEY.json, H&E bytes, IHC bytes)]."""
    shards = ShardFolder.open(tissue_config.shard_dirs[0]).shards
    found = []
    for shard in shards:
        file, index = shard.open()
        with file:
            for row in range(shard.samples):
                meta, contents = read_sample(file, index, row, shard, ("he", "ihc"))
                found.append((meta.key, meta, bytes(contents["he"]), bytes(contents["ihc"])))
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
    shards = ShardFolder.open(url).shards
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
    shard = ShardFolder.open(url).shards[0]
    file, index = shard.open()
    content = bytearray(Path(file.name).read_bytes())
    content[int(index["offset"][0, 1]) + 9] ^= 1
    with Path(file.name).open("r+b") as stream:
        stream.write(content)
    with pytest.raises(DataError) as caught:
        read_sample(file, index, 0, shard, ("he",))
    file.close()
    assert str(shard.path) in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


@pytest.mark.parametrize("content", [b"junk", "another"])
def test_a_bad_index_does_not_stay_in_the_cache(served, content):
    folder, url = served
    path, other = folder / "train-000000.idx", folder / "test-000000.idx"
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes()[:-48] + bytes(48) if content == "another" else content)
    shard = ShardFolder.open(url).shards[0]
    with pytest.raises(DataError, match="train-000000"):
        shard.open()
    path.write_bytes(whole)
    shard.open()[0].close()


def damage(path, place):
    with path.open("r+b") as stream:
        stream.seek(place, 2 if place < 0 else 0)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("suffix, place", [(".tar", 2000), (".tar", -1), (".idx", -1), (".idx", 20), (".npy", -1)])
def test_a_copy_that_is_damaged_in_the_cache_is_fetched_again(served, ours, suffix, place):
    folder, url = served
    shards = ShardFolder.open(url).shards
    assert verify(url) == []
    copies = [path for path in (folder.parent / "cache").iterdir() if path.suffix == suffix]
    for read_all in (False, True):
        for path in copies:
            damage(path, place)
        if read_all:
            assert verify(url) == []
            continue
        reader = Reader(shards, ("he", "ihc"), None)
        assert [reader.read(number).meta for number in range(reader.total)] == [row[1] for row in ours[1]]
        ShardFolder.read(url).read_patches()
    assert len([path for path in (folder.parent / "cache").iterdir() if path.suffix == suffix]) == len(copies)


def test_a_copy_that_is_damaged_while_threads_read_it_is_fetched_once(served, ours):
    folder, url = served
    shards = ShardFolder.open(url).shards
    reader = Reader(shards, ("he", "ihc"), None)
    for number in reader.first[:-1].tolist():
        reader.read(number)
    for path in (folder.parent / "cache").glob("*.tar"):
        damage(path, 3000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.read, list(range(reader.total)) * 2))
    assert [sample.meta for sample in found] == [row[1] for row in ours[1]] * 2


def test_a_damaged_sample_of_a_whole_set_is_not_fetched_again_and_again(served):
    """Its tar is as the manifest says: nothing better can come."""
    folder, url = served
    forge(folder, with_content(1, b"no image"))
    shard = ShardFolder.open(url).shards[0]
    reader = Reader([shard], ("he",), None)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{shard.name}.tar.* row 0, .*he: is no jpg image"):
            reader.read(0)
    copy = next((folder.parent / "cache").glob(f"*{shard.sha256}*"))
    before = copy.stat().st_ino
    with pytest.raises(DataError):
        reader.read(0)
    assert copy.stat().st_ino == before
