"""The folder of copies: what is the cache's, and what is the user's."""

import contextlib
import hashlib
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web import Web, fetch

from lgd.base.errors import DataError
from lgd.io.download_cache import copy_path
from lgd.io.remote import open_file

DIGEST = "5" * 64


@pytest.fixture
def web():
    with Web() as served:
        yield served


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with files of the user's, which LGD_CACHE names by accident; there is room for one copy."""
    home = tmp_path / "home"
    names = [
        "thesis.doc",
        "a.tar",
        "a.tmp",
        "5.tmp",
        ".room.lock",
        f"{DIGEST}.tar",
        f"{'5' * 32}.jpg",
        f".{DIGEST}.tar.5.tmp",
        f".{DIGEST}.tar.lock",
        f"lgd-{DIGEST}.tar.gz",
        f"lgd-{DIGEST}-backup",
        f"lgd-{DIGEST[:-1]}.tar",
        f"lgd-{DIGEST.replace('5', 'A')}.tar",
        f"lgd-{DIGEST}.tar\n",
        f".lgd-{DIGEST}.tar.five.tmp",
        f".lgd-{DIGEST}.tar..tmp",
        f"deep/lgd-{DIGEST}.tar",
        f"lgd-{'6' * 64}.tar/precious",
        f".lgd-{'6' * 64}.tar.5.tmp/precious",
    ]
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"precious" * 1000)
        os.utime(home / name, (0, 0))
    (tmp_path / "elsewhere").write_bytes(b"precious" * 1000)
    for name in (f"lgd-{'7' * 64}.tar", f".lgd-{'7' * 64}.tar.5.tmp", f"lgd-{'8' * 64}"):
        (home / name).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("LGD_CACHE", str(home))
    monkeypatch.setenv("LGD_CACHE_GB", "0.000005")
    return home


def everything(folder):
    """Path, kind and content of all that lies in a folder and beside it."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in sorted(folder.parent.rglob("*"))
    }


def test_a_cache_in_a_folder_of_the_users_costs_him_nothing(web, home):
    before = everything(home)
    copies = [fetch(*web.put(f"{number}.tar", os.urandom(4000))) for number in range(3)]
    assert [copy.exists() for copy in copies] == [False, False, True]
    after = everything(home)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {copies[-1].name}


@pytest.mark.parametrize("name", [f"lgd-{'6' * 64}.tar", f"lgd-{'7' * 64}.tar", f"lgd-{'8' * 64}"])
def test_links_and_folders_are_never_followed(web, home, name):
    before = everything(home)
    url, _, _ = web.put(f"a{Path(name).suffix}", b"content")
    with pytest.raises(DataError, match=f"{name} is no file, so lgd did not put it there"):
        fetch(url, re.findall("[678]+", name)[0])
    assert everything(home) == before and not web.sent


@pytest.mark.parametrize("name", [f".lgd-{'7' * 64}.tar.7.tmp", ".lgd-room.lock", f".lgd-{'7' * 64}.tar.lock"])
def test_a_link_in_the_place_of_a_download_is_not_written_through(web, tmp_path, monkeypatch, name):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "cache" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match="cannot hold a copy of .*a.tar|is no plain file"):
        fetch(web.put("a.tar", b"content")[0], "7" * 64)
    assert (tmp_path / "victim").read_text() == "precious"


@given(st.sampled_from(["5" * 32, "af" * 32]), st.text(max_size=20) | st.text("." + string.ascii_letters, max_size=20))
def test_a_copy_lies_in_the_folder_whatever_the_url_ends_with(digest, suffix):
    path = copy_path(Path("/cache"), digest, suffix)
    assert path.parent == Path("/cache") and re.fullmatch(rf"lgd-{digest}(\.[A-Za-z0-9]+)?", path.name)


def test_a_cache_that_cannot_be_is_told(web, tmp_path, monkeypatch):
    given = web.put("a.tar", b"content")
    (tmp_path / "file").touch()
    for value, reason in {
        str(tmp_path / "file"): "cannot be made",
        "~nobody-here/cache": "cannot be made .*name another folder in LGD_CACHE",
        "s3://bucket/cache": "set it to a folder on a disk",
        "/proc": "no file can be made there: name a folder .* in LGD_CACHE",
    }.items():
        monkeypatch.setenv("LGD_CACHE", value)
        with pytest.raises(DataError, match=reason):
            fetch(*given)


_READER = """
import hashlib, random, sys
from lgd.io.remote import open_file
url, seed, *digests = sys.argv[1:]
dice = random.Random(seed)
for number in dice.sample(range(len(digests)), len(digests)):
    with open_file(f"{url}/{number}.tar", digests[number], 3000 if dice.random() < 0.5 else None) as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digests[number], number
print("right")
"""


def measure_disk(cache, pids):
    """Inode -> bytes of the copies and downloads that take room: with a name, or open or mapped without one."""
    sizes = {}
    held = [one for pid in pids for kind in ("fd", "map_files") for one in Path(f"/proc/{pid}/{kind}").glob("*")]
    for path in [*cache.glob("*lgd-*"), *held]:
        with contextlib.suppress(OSError):
            facts, name = path.stat(), str(path.readlink()) if path in held else str(path)
            if re.search(r"/\.?lgd-[0-9a-f]{32}[^/]*(tar|tmp)( \(deleted\))?$", name):
                sizes[facts.st_dev, facts.st_ino] = facts.st_size
    return sizes


@pytest.mark.faults
def test_processes_that_evict_each_others_copies_read_what_is_right(web, tmp_path, monkeypatch, fault_count):
    """Room for two copies, and four processes: each copy is evicted as soon as it is there."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LGD_CACHE_GB", "0.000006")
    digests = [web.put(f"{number}.tar", random.Random(number).randbytes(3000))[1] for number in range(fault_count(200))]
    readers = [
        subprocess.Popen([sys.executable, "-c", _READER, web.url, str(seed), *digests], stdout=subprocess.PIPE)
        for seed in range(4)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, sum(measure_disk(tmp_path / "cache", [reader.pid for reader in readers]).values()))
    assert 3000 <= most <= 6000
    assert [reader.communicate(timeout=300)[0] for reader in readers] == [b"right\n"] * 4
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 6000
    # And once more with threads of one process, which share the locks' names.
    with open_file(f"{web.url}/0.tar", digests[0]) as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digests[0]
