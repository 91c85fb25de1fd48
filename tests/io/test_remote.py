"""Remote files through the cache, and http, over the wire against a server on loopback."""

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from web import Web, fetch

from lgd.base.errors import DataError
from lgd.io import download_cache
from lgd.io.files import exists, list_folder, read_bytes, read_json, write_json
from lgd.io.location import MissingError, RemoteError, as_location
from lgd.io.remote import drop_damaged, name_with_copy, open_checked, open_file


@pytest.fixture
def web():
    with Web() as served:
        yield served


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LGD_CACHE", str(folder))
    return folder


def copies(cache):
    """What the cache holds, hidden files too, but for the lock that stays."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".lgd-room.lock")


def test_http_is_read_and_its_errors_are_told(web):
    url, _, _ = web.put("a.json", b'{"a": 1}')
    assert read_json(url) == {"a": 1} and exists(url) and web.sent["a.json"] == 1
    assert not exists(f"{web.url}/b.json")
    with pytest.raises(FileNotFoundError, match="b.json is missing: correct the url"):
        read_bytes(f"{web.url}/b.json")
    with pytest.raises(DataError, match="b.json is missing"):
        read_json(f"{web.url}/b.json")
    with pytest.raises(RemoteError, match="http urls do not offer that: use s3://"):
        write_json(f"{web.url}/c.json", {})
    with pytest.raises(RemoteError, match="cannot be listed: name the files in a CSV"):
        list_folder(web.url)


def test_a_copy_is_checked_kept_and_found_again(web, cache, tmp_path):
    url, digest, size = web.put("a.tar", os.urandom(5000))
    local = fetch(url, digest, size)
    assert local.read_bytes() == web.files["a.tar"] and copies(cache) == [local.name] == [f"lgd-{digest}.tar"]
    assert fetch(url, digest) == fetch(f"{web.url}/moved.tar", digest, size) == local and web.sent["a.tar"] == 1
    # A copy that was cut is fetched again.
    os.truncate(local, 10)
    assert fetch(url, digest, size).stat().st_size == size
    # A local file is read where it lies.
    (tmp_path / "x").touch()
    assert fetch(tmp_path / "x", "0" * 64, 1) == tmp_path / "x"
    with pytest.raises(MissingError, match="b.tar is missing"):
        fetch(f"{web.url}/b.tar", "0" * 64)
    assert len(copies(cache)) == 1


@pytest.mark.parametrize(
    "digest",
    ["../victim/x", "", "0" * 63, "A" * 64, "0" * 64 + "\n", "é" * 32, None, 5, ["0"], b"0" * 64],
    ids=repr,
)
def test_a_digest_that_is_none_is_refused_before_anything_is_asked_or_made(web, cache, tmp_path, digest):
    url, _, _ = web.put("a.tar", b"content")
    (tmp_path / "victim").mkdir()
    for function in (fetch, open_file, lambda url, digest: open_checked(url, digest, None, "")):
        with pytest.raises(DataError, match=r"a.tar: its digest is stated as .* which is no SHA-256 .*get a whole"):
            function(url, digest)
    with pytest.raises(DataError, match="a.tar: its digest is stated as"):
        fetch(tmp_path / "a.tar", digest)
    assert not web.sent and not cache.exists() and not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize("size", [-1, "5", "../x", True, 5.0])
def test_a_size_that_is_none_is_refused(web, cache, size):
    url, digest, _ = web.put("a.tar", b"content")
    with pytest.raises(DataError, match="a.tar: its size is stated as .* which is no number of bytes"):
        fetch(url, digest, size)
    assert not web.sent and not cache.exists()


def test_a_suffix_that_is_not_plain_is_left_out(web, cache):
    for name in ("a.tar;x", "a.t-r", "a." + "t" * 17, "a..", "a.tar?b=c/../../d."):
        url, digest, _ = web.put(name, name.encode())
        assert fetch(url, digest) == cache / f"lgd-{digest}", name


def test_a_copy_that_is_damaged_in_the_cache_is_fetched_once_more(web, cache, tmp_path):
    url, digest, size = web.put("a.tar", os.urandom(5000))
    with open_checked(url, digest, size, "build it again") as file:
        assert file.read() == web.files["a.tar"] and not drop_damaged(url, digest, file)
    local = fetch(url, digest, size)
    local.write_bytes(bytes(size))
    with open_file(url, digest, size) as damaged:
        assert damaged.read() == bytes(size), "its size is right, and whoever opens it does not read all of it"
        assert drop_damaged(url, digest, damaged) and not local.exists()
        with open_file(url, digest, size) as again:
            # The one who reads the old copy must not drop the new one.
            assert drop_damaged(url, digest, damaged) and again.read() == web.files["a.tar"]
            assert not drop_damaged(url, digest, again)
    assert local.exists() and web.sent["a.tar"] == 2
    local.write_bytes(bytes(size))
    with open_checked(url, digest, size, "build it again") as file:
        assert file.read() == web.files["a.tar"]
    assert web.sent["a.tar"] == 3 and copies(cache) == [local.name]
    # Nothing is dropped here, and nothing better can be fetched.
    (tmp_path / "a.tar").write_bytes(bytes(size))
    with pytest.raises(DataError, match="/a.tar does not match its digest: build it again$"):
        open_checked(tmp_path / "a.tar", digest, size, "build it again")
    with (tmp_path / "a.tar").open("rb") as file:
        assert not drop_damaged(tmp_path / "a.tar", digest, file)
    for folder in (tmp_path, web.url):
        with pytest.raises(MissingError, match=r"/b.tar is missing or cannot be read \(.*\): build it again$"):
            open_checked(f"{folder}/b.tar", "1" * 64, size, "build it again")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\): build it again$"):
        open_checked(tmp_path, digest, size, "build it again")


def test_a_file_is_named_with_the_copy_that_is_read(web, cache, tmp_path):
    url, digest, size = web.put("a.tar", b"content")
    (tmp_path / "a.tar").write_bytes(b"content")
    with open_file(url, digest, size) as file:
        assert name_with_copy(as_location(url), file) == f"{url} (its copy {cache}/lgd-{digest}.tar)"
    with open_file(tmp_path / "a.tar", digest, size) as file:
        assert name_with_copy(tmp_path / "a.tar", file) == f"{tmp_path}/a.tar"


def test_threads_that_check_one_open_file_do_not_disturb_each_other(web, cache):
    url, digest, _ = web.put("a.tar", os.urandom(5 << 20))
    with open_file(url, digest) as file, ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: drop_damaged(url, digest, file), range(16)))


def test_a_server_that_sends_more_than_it_stated_does_not_fill_the_disk(web, cache, monkeypatch):
    monkeypatch.setenv("LGD_CACHE_GB", "0.00001")
    url, digest, _ = web.put("a.tar", os.urandom(30_000))
    web.stated["a.tar"] = 100
    with pytest.raises(DataError, match="a.tar sends more than 100 bytes, its stated size or the limit"):
        fetch(url, digest)
    assert copies(cache) == [] and web.sent["a.tar"] == 1


@pytest.mark.faults
def test_a_damaged_download_is_tried_once_more(web, cache):
    url, digest, size = web.put("a.tar", bytes(range(250)) * 20)
    flipped = bytes([1]) + web.files["a.tar"][1:]
    web.faults["a.tar"] = [flipped]
    assert fetch(url, digest, size).read_bytes() == web.files["a.tar"] and web.sent["a.tar"] == 2
    assert web.asked["a.tar"] == [None, "no-cache"], "a proxy would send again what it has"
    fetch(url, digest).unlink()
    web.faults["a.tar"] = [flipped, flipped]
    with pytest.raises(DataError, match="a.tar does not match its digest: it was damaged or replaced"):
        fetch(url, digest, size)
    with pytest.raises(DataError, match="a.tar sends more than 4 bytes, its stated size"):
        fetch(url, digest, 4)
    # The connection ends before the file does.
    web.faults["a.tar"] = [flipped[:3000]]
    assert fetch(url, digest, size).stat().st_size == size
    assert copies(cache) == [f"lgd-{digest}.tar"]


def test_the_least_recently_used_copies_make_room(web, cache, monkeypatch):
    monkeypatch.setenv("LGD_CACHE_GB", "0.00001")
    given = {name: web.put(f"{name}.tar", os.urandom(3000)) for name in "abcd"}
    for name in "abc":
        fetch(*given[name])
        time.sleep(0.01)
    opened = open_file(*given["b"])
    time.sleep(0.01)
    fetch(*given["a"])
    time.sleep(0.01)
    fetch(*given["d"])
    # c was used least recently.
    assert copies(cache) == sorted(f"lgd-{given[name][1]}.tar" for name in "abd")
    # Then b, which is open: its room would not be free.
    fetch(*given["c"])
    assert copies(cache) == sorted(f"lgd-{given[name][1]}.tar" for name in "bcd")
    assert opened.read() == web.files["b.tar"]
    opened.close()
    fetch(*given["a"])
    assert copies(cache) == sorted(f"lgd-{given[name][1]}.tar" for name in "acd")
    with pytest.raises(DataError, match=r"e.tar has 20000 bytes, more than .*raise LGD_CACHE_GB.*--shard-size"):
        fetch(*web.put("e.tar", bytes(20000)))
    assert len(copies(cache)) == 3
    for text in ("0", "much", "nan", "inf"):
        monkeypatch.setenv("LGD_CACHE_GB", text)
        with pytest.raises(DataError, match=f"LGD_CACHE_GB is '{text}'"):
            fetch(*given["a"])


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_read_fills_the_cache_until_it_is_closed(web, cache, monkeypatch, mapped):
    monkeypatch.setenv("LGD_CACHE_GB", "0.00001")
    monkeypatch.setattr(download_cache, "_LONGEST_WAIT", 0.5)
    files = [open_file(*web.put(f"{name}.tar", os.urandom(3000))) for name in "abc"]
    if mapped:
        maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]
        for file in files:
            file.close()
        files = maps
    wanted = web.put("d.tar", os.urandom(3000))
    with pytest.raises(DataError, match=r"cache has no room for 3000 bytes more.*limit \(10000.*raise LGD_CACHE_GB"):
        fetch(*wanted)
    assert len(copies(cache)) == 3, "nor is a temporary file left"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch, *wanted)
        time.sleep(0.1)
        assert not waiting.done()
        files[1].close()
        assert waiting.result().exists() and len(copies(cache)) == 3
    # What is dropped by the process itself is not waited for.
    monkeypatch.setattr(download_cache, "idle_maps", [files.pop().close])
    monkeypatch.setattr(download_cache, "_LONGEST_WAIT", 60)
    os.utime(waiting.result(), ns=(2**62, 2**62))
    with open_file(*wanted):
        fetch(*web.put("e.tar", os.urandom(3000)))
    for file in files:
        file.close()


def test_the_limit_holds_while_many_download_at_once(web, cache, monkeypatch):
    monkeypatch.setenv("LGD_CACHE_GB", "0.00001")
    given = [web.put(f"{number}.tar", os.urandom(4000)) for number in range(6)]
    largest = 0
    done = threading.Event()

    def watch():
        nonlocal largest
        while not done.is_set():
            sizes = []
            for path in cache.glob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            largest = max(largest, sum(sizes))

    cache.mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for name in ("0.tar", "1.tar", "2.tar"):
        web.faults[name] = [0.2]

    def read(which):
        with open_file(*given[which]) as stream:
            return stream.read()

    with ThreadPoolExecutor(6) as pool:
        contents = list(pool.map(read, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]))
    done.set()
    watcher.join()
    assert [hashlib.sha256(content).hexdigest() for content in contents[:6]] == [digest for _, digest, _ in given]
    assert 4000 <= largest <= 10000


def test_threads_and_processes_download_a_file_once(web, cache):
    url, digest, size = web.put("a.tar", os.urandom(5000))
    web.faults["a.tar"] = [0.7]
    code = f"from lgd.io.remote import open_file; print(open_file({url!r}, {digest!r}, {size}).name)"
    others = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: str(fetch(url, digest, size)), range(3)))
    found |= {other.communicate(timeout=30)[0].strip() for other in others}
    assert len(found) == 1 and web.sent["a.tar"] == 1 and copies(cache) == [f"lgd-{digest}.tar"]


@pytest.mark.faults
def test_what_a_killed_download_left_is_cleaned_up(web, cache):
    url, digest, size = web.put("a.tar", os.urandom(5000))
    web.faults["a.tar"] = [30.0]
    code = f"from lgd.io.remote import open_file; open_file({url!r}, {digest!r}, {size})"
    killed = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 30
    while not list(cache.glob(".*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    assert len(list(cache.glob(".*.tmp"))) == 1
    # As long as it lives its file is left alone.
    other = web.put("b.tar", b"b" * 100)
    fetch(*other)
    assert len(list(cache.glob(".*.tmp"))) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    fetch(*web.put("c.tar", b"c" * 100))
    assert len(copies(cache)) == 2
    # And the next download of the same file does not wait for it.
    assert fetch(url, digest, size).stat().st_size == size


@pytest.mark.faults
def test_a_full_disk_is_told_and_leaves_nothing(web, cache):
    url, digest, size = web.put("a.tar", os.urandom(200_000))
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from lgd.io.remote import open_file\n"
        "from lgd.base.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"try: open_file({url!r}, {digest!r}, {size})\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot hold a copy of" in done.stdout and "name another folder in LGD_CACHE" in done.stdout, done.stderr
    assert copies(cache) == [] and web.sent["a.tar"] == 1
