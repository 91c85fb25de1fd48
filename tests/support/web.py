"""An HTTP server for tests that counts what it sends, and can misbehave."""

import collections
import hashlib
import http.server
import threading
import time
from pathlib import Path

from lgd.io.remote import open_file


class Web:
    """An HTTP server on loopback; `with` stops it."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.sent: collections.Counter[str] = collections.Counter()
        # Name of a file -> what is done to its answers, one entry an answer: a status, alone or with the value of
        # Retry-After, bytes, or seconds to wait; None does nothing.
        self.faults: dict[str, list] = collections.defaultdict(list)
        # Name of a file -> its size as it is stated before it is sent.
        self.stated: dict[str, int] = {}
        # The Cache-Control of each request for a file's content.
        self.asked: dict[str, list] = collections.defaultdict(list)
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                name = self.path.lstrip("/")
                whole = web.files.get(name)
                if whole is None:
                    self.send_error(404)
                    return
                fault, size = None, web.stated.get(name, len(whole))
                if self.command == "GET":
                    web.sent[name] += 1
                    web.asked[name].append(self.headers["Cache-Control"])
                    fault, size = web.faults[name].pop(0) if web.faults[name] else None, len(whole)
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                if isinstance(fault, tuple):
                    self.send_response(fault[0])
                    self.send_header("Retry-After", fault[1])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                if self.command == "GET":
                    if isinstance(fault, float):
                        self.wfile.write(whole[:100])
                        time.sleep(fault)
                        whole = whole[100:]
                    self.wfile.write(fault if isinstance(fault, bytes) else whole)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, name, content):
        """Serve a file; its url, digest and size."""
        self.files[name] = content
        return f"{self.url}/{name}", hashlib.sha256(content).hexdigest(), len(content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def fetch(location, digest, size=None):
    """Where the file lies that `open_file` gives: a local one, or its copy in the cache."""
    with open_file(location, digest, size) as file:
        return Path(file.name)
