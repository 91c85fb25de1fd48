"""A hub of encoders on loopback: the few answers of huggingface.co that a copy of a repository needs."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve_hub(folders: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories `ORG/NAME` from folders; gives the address, and the paths that were asked for."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(f"{self.command} {path}")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repository, rest = "/".join(parts[:2]), parts[2:]
            if repository in gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if repository not in folders:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = sorted(folders[repository].iterdir())
            if path.startswith("/api/models"):
                if rest[:1] == ["tree"]:
                    tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                    return self.answer(200, json.dumps(tree).encode())
                names = [{"rfilename": file.name} for file in files]
                return self.answer(200, json.dumps({"id": repository, "sha": SHA, "siblings": names}).encode())
            file = folders[repository] / rest[-1]
            if not file.exists():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": SHA})

        do_HEAD = do_GET

        def answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
