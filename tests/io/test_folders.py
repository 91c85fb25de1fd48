"""Folders that are written here, and appear here or at a url."""

import os
import tempfile

import pytest

from lgd.base.errors import DataError
from lgd.io import folders
from lgd.io.files import is_litter, list_folder, read_bytes, write_bytes
from lgd.io.folders import WorkingFolder, discard_folder, list_local_sizes, publish_folder, refuse_foreign, walk_files
from lgd.io.location import as_location


@pytest.fixture(scope="module")
def bucket(s3_server):
    s3_server.create_bucket(Bucket="folders")
    return s3_server


@pytest.fixture(params=["here", "url"])
def folder(request, tmp_path, monkeypatch):
    """A folder that is not there yet; what is left in TMPDIR at the end is an error."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if request.param == "url":
        request.getfixturevalue("bucket")
    yield tmp_path / "in" / "x" if request.param == "here" else as_location(f"s3://folders/{tmp_path.name}/x")
    assert not list((tmp_path / "tmp").iterdir())


def content(folder):
    return {name: read_bytes(folder / name) for name in list_folder(folder)}


def fill(folder, files):
    with publish_folder(folder, "done") as temporary:
        for name, text in files.items():
            (temporary / name).write_bytes(text)
            assert name not in list_folder(folder) or content(folder)[name] != text


def test_a_folder_appears_whole_and_replaces_another(folder):
    fill(folder, {"done": b"1", "a": b"2", "z": b"3"})
    assert content(folder) == {"done": b"1", "a": b"2", "z": b"3"}
    fill(folder, {"done": b"4", "b": b"5"})
    assert content(folder) == {"done": b"4", "b": b"5"} and list(list_folder(folder.parent)) == ["x"]


def test_a_folder_that_fails_leaves_the_old_one(folder):
    fill(folder, {"done": b"1", "a": b"2"})
    with pytest.raises(RuntimeError), publish_folder(folder, "done") as temporary:
        (temporary / "done").write_bytes(b"3")
        raise RuntimeError
    assert content(folder) == {"done": b"1", "a": b"2"} and list(list_folder(folder.parent)) == ["x"]


def test_at_a_url_the_mark_goes_first_and_comes_last(bucket, tmp_path, monkeypatch):
    at = as_location(f"s3://folders/{tmp_path.name}/x")
    fill(at, {"done": b"1", "a": b"2", "z": b"3"})
    steps = []

    def spy(name, which):
        function = getattr(folders, name)
        monkeypatch.setattr(folders, name, lambda *args: steps.append((name, args[which].name)) or function(*args))

    spy("remove", 0), spy("remove_folder", 0), spy("upload", 1)
    fill(at, {"done": b"4", "a": b"5", "z": b"6"})
    removed = [("remove", "done"), ("remove_folder", "x")]
    assert steps == [*removed, ("upload", "a"), ("upload", "z"), ("upload", "done")]


def test_a_folder_is_discarded(folder):
    discard_folder(folder, "done")
    fill(folder, {"done": b"1", "a": b"2"})
    discard_folder(folder, "done")
    assert list_folder(folder) == {}


def test_what_knows_no_urls_writes_to_a_folder_here(folder):
    with WorkingFolder(folder) as working:
        (working.path / "deep").mkdir(parents=True)
        (working.path / "a").write_bytes(b"1")
        working.publish()
        assert read_bytes(folder / "a") == b"1"
        (working.path / "a").write_bytes(b"2")
        (working.path / "deep" / "b").write_bytes(b"3")
        working.publish()
        (working.path / "deep" / "c").write_bytes(b"4")
    assert read_bytes(folder / "a") == b"2" and read_bytes(folder / "deep" / "b") == b"3"
    # What is written after the last publication is in a local folder only.
    assert ("c" in list_folder(folder / "deep")) == isinstance(folder, os.PathLike)


def test_sizes_are_listed_here_only(folder):
    write_bytes(folder / "a", b"12345")
    write_bytes(folder / "deep" / "b", b"1")
    here = isinstance(folder, os.PathLike)
    assert list_local_sizes(folder) == ({"a": 5} if here else None)
    # What should be there is asked for by its name, whatever the listing has.
    assert list_local_sizes(folder, ["a", "deep", "deep/b", "none"]) == ({"a": 5, "deep/b": 1} if here else None)


@pytest.mark.parametrize(
    "name",
    [
        *(".DS_Store", "._a.png", ".nfs0001f", ".fuse_hidden01", "Thumbs.db", "THUMBS.DB", "desktop.ini", "@eaDir"),
        *("lost+found", "System Volume Information", "$RECYCLE.BIN", ".Trashes", ".~lock.a.csv#", "__MACOSX"),
    ],
)
def test_what_systems_leave_is_litter(name):
    assert is_litter(name)


def test_litter_is_nobody_s_in_any_listing(folder):
    for name in (".DS_Store", "._a", ".nfs0001", "Thumbs.db", "a", ".a"):
        write_bytes(folder / name, b"x")
    assert list(list_folder(folder)) == [".a", "a"]
    refuse_foreign(folder, {"a", ".a"}, "")
    with pytest.raises(DataError, match=r"holds something else \(a\): go$"):
        refuse_foreign(folder, {".a"}, "go")


@pytest.mark.parametrize(
    "name", ["a.png", ".a.png", ".nfs.png", "thumbs.png", "desktop.ini.bak", "_", ".git", "lost", ".trash"]
)
def test_what_users_have_is_no_litter(name):
    assert not is_litter(name)


def test_links_are_walked_once_and_loops_end(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("b/deep/one", "b/two", "b/.three", "b/._two", "a"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / ".hidden").symlink_to(tmp_path / "b")
    found = [(path.relative_to(tmp_path).as_posix(), lies, hidden) for path, lies, hidden in walk_files(tmp_path)]
    assert found == [
        ("a", "file", False),
        ("round", "other", False),
        ("b/.three", "file", True),
        ("b/two", "file", False),
        ("b/deep/one", "file", False),
    ]
