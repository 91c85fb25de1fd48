import sys
from pathlib import Path

import pytest

from lgd.errors import DataError
from lgd.urls import as_location


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
