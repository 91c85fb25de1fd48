"""Locks between real processes, on a file system that has none, and of hosts that are gone."""

import errno
import functools
import http.server
import json
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import flockless
import pytest

from lgd.base.errors import DataError
from lgd.io import locks
from lgd.io.location import as_location
from lgd.io.locks import LOCK, Owner, TakenError, exclusive, hold_lock, read_owner, try_lock
from tests.support.forks import FORKS

HOLD = """
import sys
from lgd.io.locks import exclusive
with exclusive(sys.argv[1], "digging"):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "x"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def test_one_process_at_a_time_works_on_a_folder(holder, tmp_path):
    message = rf"/x: process {holder.pid} on \S+ is digging there, for 0.\d minutes: wait until it is done, or end it$"
    with pytest.raises(TakenError, match=message), exclusive(tmp_path / "x", "digging"):
        pytest.fail("two are in")
    holder.kill()
    holder.wait()
    # Its name still lies there, and its lock does not.
    assert read_owner(tmp_path / "x" / LOCK).pid == holder.pid
    with exclusive(tmp_path / "x", "digging"):
        assert read_owner(tmp_path / "x" / LOCK).pid == os.getpid()


def test_a_holder_that_ends_leaves_nothing(holder, tmp_path):
    (tmp_path / "x" / "found.txt").write_text("mine")
    holder.communicate(b"\n", timeout=60)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["found.txt"]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(RuntimeError), exclusive(tmp_path / "a" / "b" / "c", "digging"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with exclusive(tmp_path / "kept", "digging"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"] and list((tmp_path / "kept").iterdir()) == []


def test_threads_exclude_each_other_too(tmp_path):
    def dig():
        with pytest.raises(TakenError), exclusive(tmp_path, "digging"):
            pytest.fail("two are in")

    with exclusive(tmp_path, "digging"):
        thread = threading.Thread(target=dig)
        thread.start()
        thread.join()


def count_up(path, times, barrier):
    barrier.wait()
    for _ in range(times):
        with hold_lock(path.with_suffix(".lock"), "counting"):
            path.write_text(str(int(path.read_text()) + 1))


def test_of_many_that_wait_one_is_in_at_a_time_though_each_removes_the_file(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    barrier = FORKS.Barrier(3)
    processes = [FORKS.Process(target=count_up, args=(path, 50, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert path.read_text() == "150" and list(tmp_path.iterdir()) == [path]


def test_a_lock_that_was_removed_while_held_is_another_ones(tmp_path):
    with exclusive(tmp_path, "digging"):
        (tmp_path / LOCK).unlink()
        descriptor = try_lock(tmp_path / LOCK)
        assert descriptor is not None
    assert (tmp_path / LOCK).exists(), "the first holder removes its own only"
    with pytest.raises(TakenError), exclusive(tmp_path, "digging"):
        pytest.fail("two are in")
    os.close(descriptor)


# ---- who holds it ----


def write_owner(path, **changes):
    owner = {"doing": "digging", "pid": os.getpid(), "host": platform.node(), "since": 0.0}
    path.write_text(json.dumps(owner | changes))


@pytest.mark.parametrize("changes", [{"host": "node17", "pid": 4242}, {"pid": 2**22 + 1}])
def test_the_lock_of_a_host_that_is_gone_can_be_told_and_removed(tmp_path, changes):
    path = tmp_path / LOCK
    with exclusive(tmp_path, "digging"):
        write_owner(path, **changes)
        message = rf"is digging there, for \S+ minutes: wait until it is done, or .*; if it is gone, .*remove {path}"
        with pytest.raises(TakenError, match=message), exclusive(tmp_path, "digging"):
            pytest.fail("two are in")
        # As an NFS server holds it for a client that vanished.
        path.unlink()
        with exclusive(tmp_path, "digging"):
            pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": 1}', '{"doing": "a\\u001b[2Jb", "pid": 1, "host": "h", "since": 0.0}']
)
def test_a_name_that_cannot_be_read_is_not_shown(tmp_path, content, monkeypatch):
    monkeypatch.setattr(locks, "_NAMING", 0.05)
    with exclusive(tmp_path, "digging"):
        (tmp_path / LOCK).write_text(content)
        message = f"{tmp_path}: another process works there: wait until it is done, or end it"
        with pytest.raises(TakenError, match=f"^{re.escape(message)}$"), exclusive(tmp_path, "digging"):
            pytest.fail("two are in")


def test_a_long_wait_is_logged_once(holder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(locks, "_QUIET_WAIT", 0.05)
    timer = threading.Timer(0.3, holder.kill)
    timer.start()
    with hold_lock(tmp_path / "x" / LOCK, "digging"):
        lines = caplog.messages
    assert len(lines) == 1 and lines[0].startswith(f"waiting for {tmp_path / 'x'}: process {holder.pid} on ")


def test_an_owner_states_the_minutes():
    owner = Owner(doing="training", pid=7, host="node17", since=4e9)
    assert owner.describe() == "process 7 on node17 is training there, for 0.0 minutes", "another clock may go ahead"


# ---- files and file systems that no lock can be on ----


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_plain_file_is_refused(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(DataError, match=r"\.lgd\.lock is no plain file.*: remove it"), exclusive(tmp_path, "digging"):
        pytest.fail("there is no lock")


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_no_link_leads_to_a_file_of_the_users(tmp_path, link):
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work")
    (tmp_path / "out").mkdir()
    link(tmp_path / "out" / LOCK, mine)
    with pytest.raises(DataError, match="no plain file"), exclusive(tmp_path / "out", "digging"):
        pytest.fail("there is no lock")
    assert mine.read_text() == "years of work"


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "a").write_text("mine")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(DataError, match="cannot be made, a file is in the way"), exclusive(folder, "digging"):
            pytest.fail("there is no folder")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has such a folder")
def test_a_folder_that_takes_no_files_is_told():
    with pytest.raises(DataError, match="/proc cannot hold locks, no file can be made there"), exclusive("/proc", "x"):
        pytest.fail("there is no lock")


def test_a_url_has_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with exclusive("s3://data/x", "digging"), exclusive("s3://data/x", "digging"):
        assert not list(tmp_path.iterdir())
    path = as_location("s3://data/x/.lock")
    with hold_lock(path, "digging"), hold_lock(path, "digging", wait=False):
        assert not list(tmp_path.iterdir())


NO_LOCKS = """
import sys
import flockless
from lgd.base.errors import DataError
from lgd.io.locks import exclusive
from lgd.io.remote import open_file

def work():
    with exclusive("x", "digging"):
        print("in")

for number in sys.argv[2:]:
    # Of several filters the last one answers.
    flockless.break_flock(int(number))
    for do in (work, lambda: open_file(sys.argv[1], "0" * 64)):
        try: do()
        except DataError as error: print(error)
"""


@pytest.mark.skipif(not flockless.is_possible(), reason="this kernel has no filter of system calls")
def test_a_file_system_without_locks_is_told_with_the_remedy(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"content")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    numbers = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/file.bin"
        done = subprocess.run(
            [sys.executable, "-c", NO_LOCKS, url, *map(str, numbers)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths, "LGD_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    for number, ours, cache in zip(numbers, lines[::2], lines[1::2], strict=True):
        reason = rf" lies on a file system without locks \(flock: {os.strerror(number)}\), so two processes could .*: "
        assert re.match("x" + reason + "use a folder on .* NFS 4, Lustre .*, or a url such as s3://$", ours), ours
        assert re.match(f"{tmp_path / 'cache'}" + reason + "name a folder .* in LGD_CACHE$", cache), cache
    assert not (tmp_path / "x").exists() and not list(tmp_path.rglob("*.lock"))
