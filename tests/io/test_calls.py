"""Calls of a store that fail for a moment, or for good: over the wire, against servers on loopback."""

import datetime
import email.utils
import logging
import time

import pytest
from web import Web, fetch
from wire import HARMS, Wire

from lgd.base.errors import DataError
from lgd.io import calls, location
from lgd.io.files import create_json, exists, list_folder, read_bytes, remove, remove_folder, write_bytes
from lgd.io.location import MissingError, RemoteError
from lgd.io.remote import open_file


@pytest.fixture
def web(monkeypatch):
    """A server; nothing is known of any store."""
    monkeypatch.setattr(calls, "_LONGEST_PAUSE", 0.1)
    for name in ("_answered", "_noted", "_lacking"):
        monkeypatch.setattr(calls, name, type(getattr(calls, name))())
    with Web() as served:
        yield served


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, (429, "0"), (503, "soon"), (429, "-1")])
def test_what_may_pass_is_tried_again_with_one_line_in_the_log(web, caplog, status):
    url, digest, size = web.put("a.bin", b"content")
    web.faults["a.bin"] = [status] * 5
    assert read_bytes(url) == b"content" and web.sent["a.bin"] == 6
    web.faults["a.bin"] = [status] * 4
    assert fetch(url, digest, size).read_bytes() == b"content"
    (line,) = [one for one in caplog.records if one.name == "lgd.io.calls"]
    number = status if isinstance(status, int) else status[0]
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith(f"waiting for {web.url}: {url} cannot be read now (status {number}, ")


@pytest.mark.parametrize("status", [400, 403, 404, 405, 410, 416, 501, 505])
def test_what_does_not_pass_is_answered_at_once(web, status):
    url, _, _ = web.put("a.bin", b"content")
    web.faults["a.bin"] = [status, None]
    with pytest.raises(DataError, match=r"a\.bin (is missing|cannot be read)"):
        read_bytes(url)
    assert web.sent["a.bin"] == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_store_that_let_us_in_before_may_refuse_for_a_moment(web, status):
    (one, _, _), (other, _, _) = web.put("a.bin", b"content"), web.put("b.bin", b"other")
    web.faults["a.bin"] = [status]
    with pytest.raises(RemoteError, match="access is denied .*ask its owner for access"):
        read_bytes(one)
    assert read_bytes(other) == b"other"
    web.faults["a.bin"] = [status] * 3
    assert read_bytes(one) == b"content"


def test_a_file_that_a_document_names_may_be_late_but_one_that_nobody_names_is_missing(web):
    url, digest, size = web.put("set/a.bin", b"content")
    web.faults["set/a.bin"] = [404]
    assert not exists(f"{web.url}/set/b.bin")
    with pytest.raises(MissingError, match="a.bin is missing: correct the url"):
        read_bytes(url)
    web.faults["set/a.bin"] = [404, 404]
    assert fetch(url, digest, size).read_bytes() == b"content"


def test_of_many_files_that_stay_missing_the_first_is_waited_for(web):
    web.put("set/a.bin", b"content")
    began = time.monotonic()
    for number in range(20):
        with pytest.raises(MissingError, match=rf"{number}.bin is missing"):
            open_file(f"{web.url}/set/{number}.bin", f"{number:064}", 5)
    assert 1 <= time.monotonic() - began < 3


@pytest.mark.parametrize("as_date", [False, True])
def test_the_pause_is_the_one_that_the_server_asks_for(web, monkeypatch, as_date):
    monkeypatch.setattr(calls, "_PATIENCE", 30)
    until = time.time() + 2
    moment = datetime.datetime.fromtimestamp(until, datetime.UTC)
    web.faults["a.bin"] = [(429, email.utils.format_datetime(moment, usegmt=True) if as_date else "1")]
    url, _, _ = web.put("a.bin", b"content")
    began = time.monotonic()
    assert read_bytes(url) == b"content"
    assert 0.7 <= time.monotonic() - began < 2.5 and web.sent["a.bin"] == 2


@pytest.mark.parametrize("pause", ["3600", "999999999999", "Fri, 01 Jan 2999 00:00:00 GMT", "Sat, 99 Foo 1 x"])
def test_a_lasting_fault_ends_in_time_with_one_message_whatever_pause_is_asked_for(web, pause):
    url, _, _ = web.put("a.bin", b"content")
    web.faults["a.bin"] = [(503, pause)] * 1000
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"a\.bin cannot be read \(.*503.*, tried \d+ times\): check the url, the"):
        read_bytes(url)
    assert 1 <= time.monotonic() - began < 2.5


def test_stalls_cuts_and_lost_connections_pass(web, monkeypatch, cache):
    monkeypatch.setattr(calls, "_PATIENCE", 10)
    monkeypatch.setattr(location, "_STALLED", 0.2)
    url, digest, size = web.put("a.bin", bytes(range(250)) * 400)
    web.faults["a.bin"] = [1.0, web.files["a.bin"][:5000], 1.0, b""]
    assert fetch(url, digest, size).read_bytes() == web.files["a.bin"] and web.sent["a.bin"] == 5
    web.faults["a.bin"] = [1.0, b""]
    assert read_bytes(url) == web.files["a.bin"]
    monkeypatch.setattr(calls, "_PATIENCE", 0.2)
    web.server.shutdown()
    web.server.server_close()
    with pytest.raises(RemoteError, match=r"a\.bin cannot be read \(.*Cannot connect.*tried [2-9] times\)"):
        exists(url)


@pytest.fixture(scope="module")
def wire(s3_server):
    """A wire to a bucket, whose clients begin anew."""
    import s3fs

    s3_server.create_bucket(Bucket="calls")
    with pytest.MonkeyPatch.context() as patch, Wire(*s3_server.meta.endpoint_url.split("/")[2].split(":")) as wire:
        patch.setenv("AWS_ENDPOINT_URL", wire.url)
        s3fs.S3FileSystem.clear_instance_cache()
        write_bytes("s3://calls/set/a.json", b"content")
        yield wire


def create():
    """It may meet what it wrote itself, where it was not told so."""
    name = f"{time.monotonic_ns()}.json"
    made = create_json(f"s3://calls/made/{name}", {})
    return made in (True, False) and name in list_folder("s3://calls/made")


def write_and_remove():
    write_bytes("s3://calls/new/y.json", b"y")
    there = list_folder("s3://calls/new")
    remove("s3://calls/new/y.json")
    remove_folder("s3://calls/new")
    return "y.json" in there and not list_folder("s3://calls/new")


CALLS = {
    "read": lambda: read_bytes("s3://calls/set/a.json") == b"content",
    "exists": lambda: exists("s3://calls/set/a.json") and not exists("s3://calls/set/b.json"),
    "list": lambda: list_folder("s3://calls/set") == {"a.json": "file"} and not list_folder("s3://calls/none"),
    "create": create,
    "write": write_and_remove,
}


@pytest.mark.parametrize("harm", sorted({*HARMS} - {"flip", "flip the body", "cut and stated", "slow"}))
def test_a_fault_of_one_answer_of_s3_does_not_change_what_a_call_gives(wire, harm):
    """Not even one that could be taken for the answer that there is no such file."""
    harmed = wire.harmed
    for name, call in CALLS.items():
        for place in range(3):
            first = len(wire.requests)
            wire.choose = lambda number, request, hit=first + place: harm if number == hit else ""
            assert call(), (name, place, wire.requests[first:])
    assert wire.harmed - harmed >= 10


def test_a_host_that_does_not_exist_is_answered_at_once(web, monkeypatch):
    monkeypatch.setattr(calls, "_PATIENCE", 30)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"a\.bin cannot be read \(.*check the url"):
        read_bytes("http://no-such-host.invalid/a.bin")
    assert time.monotonic() - began < 10
