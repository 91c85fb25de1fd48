import sys
from pathlib import Path

import pytest

from lgd.base.errors import ConfigError, DataError
from lgd.io.location import as_arrow, as_location, as_output_location, relative_name, require_local, waits_for_network


def test_paths_and_urls_are_told_apart(tmp_path, monkeypatch):
    assert as_location("a/b.tar") == Path("a/b.tar") and as_location("file:///a/b.tar") == Path("/a/b.tar")
    assert as_location(tmp_path) is tmp_path
    shard = as_location("s3://bucket/set/train-000000.tar")
    assert not isinstance(shard, Path) and str(shard.with_suffix(".idx")) == "s3://bucket/set/train-000000.idx"
    assert str(as_location("s3://bucket/set/") / "manifest.json") == "s3://bucket/set/manifest.json"
    for text, reason in {
        "pipe:cat x": "neither a path nor a url",
        "nope://x/y": "urls of nope",
        "memory://x/y": "urls of memory",
        "simplecache::s3://x/y": "s3://, gs://",
        "zip://a::s3://x/y": "s3://, gs://",
        "s3://x/y::z": "s3://, gs://",
        "s3://": "names no bucket",
        "s3:///x": "names no bucket",
        "http://me:secret@host/x": "must hold no password",
    }.items():
        with pytest.raises(DataError, match=reason) as raised:
            as_location(text)
        assert "secret" not in str(raised.value)
    # A module of None in sys.modules is how Python itself marks one that cannot be imported.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"pip install 'lgd\[gs\]'"):
        as_location("gs://bucket/x")


def test_what_is_only_read_is_no_output():
    assert as_output_location("a/b", "--out") == Path("a/b")
    assert str(as_output_location("s3://bucket/b", "--out")) == "s3://bucket/b"
    with pytest.raises(
        DataError, match="^http://host/b cannot be written to: give --out a folder, or a url such as s3"
    ):
        as_output_location("http://host/b", "--out")


def test_what_must_be_here_is_no_url(tmp_path):
    assert require_local("a/b", "no") == Path("a/b") and require_local(tmp_path, "no") is tmp_path
    with pytest.raises(ConfigError, match="^OUT: name a local folder$"):
        require_local("s3://bucket/b", "OUT: name a local folder")
    with pytest.raises(ConfigError, match="^no$"):
        require_local(as_location("s3://bucket/b"), "no")


def test_only_a_url_is_waited_for(tmp_path):
    assert waits_for_network("s3://bucket/b") and waits_for_network(as_location("http://host/b"))
    assert not waits_for_network("a/b") and not waits_for_network(tmp_path) and not waits_for_network("file:///a")


@pytest.mark.parametrize("root", ["a", "/a/b", "s3://bucket", "s3://bucket/set", "http://host/set"])
def test_a_name_is_relative_to_its_folder(root):
    folder = as_location(root)
    assert relative_name(folder / "HE" / "x.png", folder) == "HE/x.png" and relative_name(folder / "x", folder) == "x"


def test_arrow_gets_the_file_system_of_a_url(s3_server, tmp_path):
    assert as_arrow(tmp_path) == (str(tmp_path), None)
    s3_server.create_bucket(Bucket="arrow")
    path, system = as_arrow(as_location("s3://arrow/set"))
    assert path == "arrow/set"
    with system.open_output_stream(f"{path}/x") as stream:
        stream.write(b"content")
    assert s3_server.get_object(Bucket="arrow", Key="set/x")["Body"].read() == b"content"


def test_a_url_has_no_working_folder_to_be_relative_to():
    assert as_location("s3://bucket/b").absolute() == as_location("s3://bucket/b")
    assert as_location("a").absolute() == Path.cwd() / "a"
