"""The connections of the proxy: a head that is too large, or does not come, ends its own connection and no other."""

import asyncio
import contextlib
import time

import pytest
import uvicorn

from lgd.serve import connections
from lgd.serve.guard import bound_proxy


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def serve():
    """The port of a server as Ray Serve makes its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
        bound_proxy()
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await task


async def ask(reader, writer, path="/"):
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split()[1], await reader.readexactly(2)


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\n"])
def test_a_large_head_is_refused(start):
    async def attack():
        async with serve() as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(start)
            part = b"a" * 10_000 if not start.endswith(b"\n") else b"X: a\r\n" * 2000
            sent = 0
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    writer.write(part)
                    await writer.drain()
                    sent += len(part)
            assert sent < 5 * 10**6
            assert await ask(*await asyncio.open_connection("127.0.0.1", port)) == (b"200", b"ok")

    asyncio.run(attack())


@pytest.mark.parametrize("first", [False, True])
def test_a_head_that_trickles_ends_its_connection(first, monkeypatch):
    """Of the first request of a connection, and of a later one; others are answered meanwhile."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)

    async def attack():
        async with serve() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if first:
                assert await ask(reader, writer) == (b"200", b"ok")
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"G" if time.monotonic() == began else b"E")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                    assert time.monotonic() - began < 5, "it was not closed"
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1), 0.001)
            assert time.monotonic() - began >= 0.2
            assert await ask(*await asyncio.open_connection("127.0.0.1", port)) == (b"200", b"ok")

    asyncio.run(attack())


def test_a_connection_in_use_stays(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)

    async def use():
        async with serve() as port:
            connection = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(8):
                assert await ask(*connection) == (b"200", b"ok")
                await asyncio.sleep(0.1)

    asyncio.run(use())
