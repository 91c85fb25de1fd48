"""The token, who may ask without one, and the bounds of a body."""

import asyncio
import json

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse

from lgd.serve import guard
from lgd.serve.guard import BodyBound, Guard
from tests.support.serving import TOKEN, ask_app, call_app


async def app(scope, receive, send):
    """Answers with the size of the body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


@pytest.mark.parametrize(
    "given",
    [
        "",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}0",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN.upper()}",
        f"Bearer x{TOKEN}",
        "Bearer \xe9\x80",
    ],
)
def test_a_request_without_the_token_is_refused(given):
    headers = {"authorization": given} if given else {}
    for path in ("/model", f"/model?token={TOKEN}", "/slides/x/tiles/0/0_0.jpg", "/static", "/docsx", "/health/x"):
        answer = ask_app(Guard(app, TOKEN), path, **headers)
        assert answer.status == 401 and "Authorization: Bearer TOKEN" in answer.detail
        assert answer.detail.startswith("this token is wrong: ") == bool(given)
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_token_lets_in_from_any_host():
    for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
        answer = ask_app(Guard(app, TOKEN), "/model", authorization=given, host="lab.example", origin="https://a.b")
        assert answer.status == 200
    for path in ("/", "/health", "/docs", "/openapi.json", "/static/api.js", "/docs/static/x.js"):
        assert ask_app(Guard(app, TOKEN), path).status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8400", "localhost:1", "[::1]", "[::1]:8400"])
def test_without_a_token_this_machine_may_ask(host):
    for method in ("GET", "POST"):
        assert ask_app(Guard(app, ""), "/model", method, host=host).status == 200
        assert ask_app(Guard(app, ""), "/model", method, host=host, origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8400", "127.0.0.1@evil.example", "::1"],
)
def test_without_a_token_no_other_name_is_answered(host):
    """A page of another site whose name is made to mean 127.0.0.1."""
    answer = ask_app(Guard(app, ""), "/model", host=host)
    assert answer.status == 400 and "127.0.0.1 and localhost only" in answer.detail


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1.evil.example"]
)
def test_pages_of_other_sites_may_not_ask(origin):
    for method in ("POST", "PUT", "DELETE"):
        answer = ask_app(Guard(app, ""), "/predict", method, origin=origin, host="127.0.0.1:8400")
        assert answer.status == 403 and "another site" in answer.detail


def test_each_answer_limits_the_browser():
    for path, token in (("/", ""), ("/model", TOKEN), ("/docs", "")):
        answer = ask_app(Guard(app, token), path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert ("unsafe-inline" in policy) == (path == "/docs")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_up_to_the_bound_is_taken(stated):
    for size in (0, 1, 99, 100, 101, 250):
        parts = [bytes(min(40, size - at)) for at in range(0, size, 40)] or [b""]
        headers = {"content-length": str(size)} if stated else {}
        answer = asyncio.run(call_app(BodyBound(app, 100), "/predict", "POST", parts, **headers))
        if size <= 100:
            assert (answer.status, answer.body) == (200, str(size).encode())
        else:
            assert answer.status == 413 and "larger than" in answer.detail and "--max-mb" in answer.detail


@pytest.mark.parametrize("length", ["-1", "1e3", "abc", "", "\xb2", "9" * 16])
def test_a_length_that_is_none_is_refused(length):
    answer = ask_app(BodyBound(app, 100), "/predict", "POST", b"a", content_length=length)
    assert answer.status == 400 and "Content-Length" in answer.detail


def test_two_lengths_are_refused():
    headers = {"content-length": "1", "transfer-encoding": "chunked"}
    assert ask_app(BodyBound(app, 100), "/predict", "POST", b"a", **headers).status == 400


@pytest.mark.parametrize(("expect", "received"), [("", 5), ("100-continue", 0)])
def test_what_is_left_of_a_body_is_read_before_an_answer(expect, received):
    """But for that of a client that waits to be asked for it."""
    read = []

    async def refuse(scope, receive, send):
        await PlainTextResponse("no", 401)(scope, receive, send)

    class Counting(BodyBound):
        async def __call__(self, scope, receive, send):
            async def count():
                read.append(await receive())
                return read[-1]

            await super().__call__(scope, count, send)

    headers = {"content-length": "50"} | ({"expect": expect} if expect else {})
    answer = asyncio.run(call_app(Counting(refuse, 100), "/predict", "POST", [bytes(10)] * 5, **headers))
    assert (answer.status, answer.body, len(read)) == (401, b"no", received)
    read.clear()
    assert ask_app(Counting(refuse, 20), "/predict", "POST", content_length="50").status == 413


def test_a_body_that_trickles_is_refused(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    parts = [b"a"] * 100
    answer = asyncio.run(call_app(BodyBound(app, 1000), "/predict", "POST", parts, pause=0.05))
    assert answer.status == 408 and json.loads(answer.body) == {"detail": "the body did not come within 0 seconds"}
    quick = asyncio.run(call_app(BodyBound(app, 1000), "/predict", "POST", [b"a"] * 3, pause=0.05))
    assert (quick.status, quick.body) == (200, b"3")


def test_an_application_may_ask_whether_the_client_has_gone(monkeypatch):
    """For longer than a body may take."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)

    async def wait(scope, receive, send):
        assert (await receive())["body"] == b"a"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.3)
        await PlainTextResponse("done")(scope, receive, send)

    answer = asyncio.run(call_app(BodyBound(wait, 10), "/predict", "POST", [b"a"], pause=0.01))
    assert (answer.status, answer.body) == (200, b"done")


def test_an_answer_that_began_is_not_replaced():
    async def echo(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()
        await send({"type": "http.response.body", "body": b"begun"})

    answer = asyncio.run(call_app(BodyBound(echo, 10), "/predict", "POST", [bytes(8)] * 3))
    assert (answer.status, answer.body) == (200, b"begun")


@pytest.mark.parametrize("headers", [{}, {"content_length": "3"}, {"transfer_encoding": "chunked"}])
def test_an_application_that_reads_while_it_answers_waits_for_nothing(headers, monkeypatch):
    """As Ray Serve's proxy does: of two that wait for one message, one would wait in vain."""
    monkeypatch.setattr(guard, "_PAUSE_SECONDS", 30)
    taken = []

    async def answer_early(scope, receive, send):
        reading = asyncio.create_task(receive())
        # It waits for the body when the answer begins.
        await asyncio.sleep(0)
        await PlainTextResponse("early")(scope, receive, send)
        taken.append(await reading)

    async def ask():
        return await call_app(BodyBound(answer_early, 10), "/", "POST", [b"abc"] if headers else [b""], 0.05, **headers)

    answer = asyncio.run(asyncio.wait_for(ask(), 10))
    assert answer.status == 200 and answer.body == b"early" and taken[0]["type"] == "http.request"
