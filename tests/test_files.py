import hashlib
import os
import subprocess
import sys

import pytest

from lgd.errors import DataError
from lgd.files import digest_of, list_folder, publish, read_json, sha256, write_bytes, write_json


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
        "from lgd.errors import DataError\n"
        "from lgd.files import write_bytes\n"
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
