"""`lgd serve` in a process of its own, as programs ask it; and its application without Ray."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import NamedTuple

TOKEN = "a-token-for-tests-0123456789"
SCRIPT = "<img src=x onerror=alert(1)>"
"""The name of a slide."""


class Answer(NamedTuple):
    status: int
    headers: dict
    """With small letters."""
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def detail(self):
        """The sentence of an error, which is all that its body has."""
        assert self.status >= 400 and [*self.json] == ["detail"], self
        return self.json["detail"]


class Service:
    """`lgd serve`, asked as a program asks it."""

    def __init__(self, url, folder, process):
        self.url, self.folder, self.results, self.process = url, folder, folder / "out", process
        self.port = int(url.rstrip("/").rpartition(":")[2])

    def fetch(self, path, method="GET", body=None, token=TOKEN, **headers):
        """An answer of any status."""
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def ask(self, path, method="GET", body=None):
        """The JSON of an answer without an error."""
        answer = self.fetch(path, method, body)
        assert answer.status < 300, answer
        return answer.json

    def find(self, name):
        """The id of a slide."""
        (found,) = [one["id"] for one in self.ask("slides") if one["name"] == name]
        return found

    def score(self, name):
        identity = self.find(name)
        self.ask(f"slides/{identity}/score", "POST")
        wait(lambda: self.ask(f"slides/{identity}")["state"] == "scored", 60)
        return identity


def wait(check, seconds=30.0):
    """What `check` gives once it is true."""
    ends = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < ends, "it did not come in time"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def start_service(folder, **options):
    """The service with some options, its token in `folder`, and its results there."""
    (folder / "token").write_text(TOKEN)
    options = {"out": folder / "out", "port": 0, "token-file": folder / "token"} | options
    command = [sys.executable, "-m", "lgd", "serve", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ, stdout=log, stderr=subprocess.STDOUT)
        try:

            def read_url():
                text = (folder / "log").read_text()
                assert process.poll() is None, text
                return re.search(r"at (http://127\.0\.0\.1:\d+/)", text)

            yield Service(wait(read_url, 240)[1], folder, process)
        finally:
            process.terminate()
            process.wait(60)


def ask_app(app, path, method="GET", body=b"", **headers):
    """An answer of an ASGI application."""
    return asyncio.run(call_app(app, path, method, [body], **headers))


async def call_app(app, path, method="GET", parts=(), pause=0.0, **headers):
    """An answer of an ASGI application to a body that comes in parts, each after a pause in seconds."""
    path, _, query = path.partition("?")
    headers = {"host": "127.0.0.1"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode()}
    scope |= {"headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]}
    scope |= {"root_path": "", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1), "state": {}}
    left, sent = [*parts], []

    async def receive():
        await asyncio.sleep(pause)
        if left:
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(left)}
        if pause:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    # What the application does not expect, it answers before it raises.
    with contextlib.suppress(Exception):
        await app(scope, receive, send)
    start, *bodies = sent
    answered = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], answered, b"".join(one.get("body", b"") for one in bodies))
