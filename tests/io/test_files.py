import hashlib
import os
import subprocess
import sys
import threading

import pytest

from lgd.base.errors import DataError
from lgd.io.digests import digest_of, may_have_sha256, sha256
from lgd.io.documents import Document
from lgd.io.files import (
    exists,
    list_folder,
    peek_kind,
    publish,
    read_json,
    try_writing,
    write_bytes,
    write_json,
)
from lgd.io.location import RemoteError, as_location


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError), publish(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        raise RuntimeError
    assert list(path.parent.iterdir()) == []

    with publish(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_bytes() == b"whole"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_reads_back_and_names_the_broken_file(tmp_path):
    path = tmp_path / "a.json"
    document = {"level": "1+", "µm": [0.46, None]}
    write_json(path, document)
    assert read_json(path) == document
    path.write_text('{"level": ')
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_digests_are_of_content_only(tmp_path):
    write_bytes(tmp_path / "x", b"abc")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_folder_is_listed_by_kind(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").touch()
    (tmp_path / "c").symlink_to("nowhere")
    assert list(list_folder(tmp_path).items()) == [("a", "file"), ("b", "folder"), ("c", "other")]
    assert list_folder(tmp_path / "x") == {} == list_folder(tmp_path / "a")


@pytest.mark.faults
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys\n"
        "from lgd.base.errors import DataError\n"
        "from lgd.io.files import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(sys.argv[1], bytes(2000))\n"
        "except DataError as error: print(error)\n"
    )
    for path in (str(tmp_path / "a.bin"), "s3://data/a.bin"):
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", code, path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert "a.bin cannot be written, no space is left" in done.stdout, done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bucket(s3_server):
    s3_server.create_bucket(Bucket="files")
    return as_location("s3://files/set")


def test_what_lies_here_is_looked_up_and_a_url_is_believed(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    found = [peek_kind(tmp_path / name, "folder") for name in (".", "file", "pipe", "link", "gone")]
    assert found == ["folder", "file", "other", None, None]
    # There is no such bucket, and nobody asks.
    assert [peek_kind(as_location("s3://none/x"), kind) for kind in ("file", "folder")] == ["file", "folder"]


def test_only_a_local_file_is_read_for_its_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert may_have_sha256(tmp_path / "x", hashlib.sha256(b"abc").hexdigest())
    assert not may_have_sha256(tmp_path / "x", "0" * 64) and may_have_sha256(as_location("s3://none/x"), "0" * 64)


def test_a_wrong_document_is_read_again_from_a_url_only(tmp_path, bucket):
    class Cut(Document):
        @classmethod
        def parse(cls, content, name):
            seen.append(content)
            if len(seen) == 1:
                raise DataError("cut")
            return content

    for folder in (tmp_path, bucket):
        write_bytes(folder / "a", b"abc")
    seen = []
    with pytest.raises(DataError, match="^cut$"):
        Cut.read(tmp_path / "a")
    assert Cut.read(tmp_path / "a") == b"abc"
    seen = []
    assert Cut.read(bucket / "a") == b"abc" and seen == [b"abc"] * 2


def test_a_url_that_cannot_be_written_to_is_told_early(tmp_path, bucket):
    try_writing(bucket / ".probe")
    assert not exists(bucket / ".probe")
    with pytest.raises(RemoteError, match="its bucket does not exist"):
        try_writing(as_location("s3://nowhere/.probe"))
    try_writing(tmp_path / "new" / ".probe")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_is_none_or_a_folder(tmp_path):
    path, ended = tmp_path / "there", threading.Event()

    def come_and_go():
        while not ended.is_set():
            path.mkdir()
            path.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {peek_kind(path, "folder") for _ in range(20_000)} <= {"folder", None}
    finally:
        ended.set()
        thread.join()
