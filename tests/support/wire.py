"""A TCP proxy before an S3 server, which harms the answers that a test chooses."""

import contextlib
import random
import re
import socket
import socketserver
import struct
import threading
import time

_ERRORS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "403": ("403 Forbidden", "ExpiredToken", "The provided token has expired."),
    "429": ("429 Too Many Requests", "TooManyRequests", "Please reduce your request rate."),
    "400": ("400 Bad Request", "RequestTimeout", "Your socket connection to the server was not read from in time."),
    "404": ("404 Not Found", "NoSuchKey", "The specified key does not exist."),
}
HARMS = ("flip", "flip the body", "cut and stated", "cut", "reset", "slow", *_ERRORS)
"""What can happen to an answer: a bit of it flips, in any place or in its body and unseen by a checksum of HTTP's; it
ends early so that its length agrees, or not; the connection is reset in its middle; it is late; it is an error. What
was asked for is done: also a write of which the answer says that it failed."""


class Wire:
    """A proxy on loopback; `with` stops it."""

    def __init__(self, host, port):
        self.requests: list[str] = []
        """Method and path of the requests so far."""
        self.choose = lambda number, request: ""
        """Number and text of a request -> how its answer is harmed, one of `HARMS` or nothing."""
        self.dice = random.Random(0)
        self.harmed = 0
        self._lock = threading.Lock()
        wire = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                head = b"".join(iter(self.rfile.readline, b"\r\n"))
                if b"100-continue" in head.lower():
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                if head:
                    wire.answer(self.request, head, _ask(host, port, head, _read_body(self.rfile, head)))

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads = True, True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, client, head, whole):
        """Send an answer, harmed or not."""
        request = head.split(b" HTTP")[0].decode()
        with self._lock:
            harm = self.choose(len(self.requests), request)
            self.requests.append(request)
            self.harmed += bool(harm)
            content = harmed(harm, whole, head.startswith(b"HEAD"), self.dice)
        if harm == "slow":
            time.sleep(0.1)
        if harm == "reset":
            # With this the socket is closed by a reset instead of an end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            client.sendall(content)
        if harm == "reset":
            client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def _read_body(stream, head):
    """The body of a request as it stands on the wire."""
    if length := re.search(rb"(?i)\ncontent-length: *(\d+)", head):
        return stream.read(int(length[1]))
    if not re.search(rb"(?i)\ntransfer-encoding: *chunked", head):
        return b""
    body = b""
    while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
        size = stream.readline()
        body += size + stream.read(int(size, 16) + 2)
    return body


def _ask(host, port, head, body):
    """The server's whole answer to a request."""
    lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith((b"connection:", b"expect:"))]
    with socket.create_connection((host, port), timeout=60) as server:
        server.sendall(b"\r\n".join([*lines, b"Connection: close", b"", body]))
        return b"".join(iter(lambda: server.recv(1 << 16), b""))


def harmed(harm, whole, bare, dice):
    """An answer as it comes out of the wire; `bare`: it has no body by its kind."""
    head, _, body = whole.partition(b"\r\n\r\n")
    if harm in _ERRORS:
        status, code, text = _ERRORS[harm]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}".encode()
        return head + b"\r\nConnection: close\r\n\r\n" + (b"" if bare else body)
    if harm == "flip":
        return _flip(whole, dice)
    if harm == "flip the body" and body:
        return _unchecked(head) + b"\r\n\r\n" + _flip(body, dice)
    if harm in ("cut", "reset"):
        return whole[: dice.randrange(len(whole))]
    if harm == "cut and stated" and body:
        body = body[: dice.randrange(len(body))]
        head = re.sub(rb"(?i)(content-length:) *\d+", b"\\1 %d" % len(body), _unchecked(head))
        return head + b"\r\n\r\n" + body
    return whole


def _unchecked(head):
    """Headers without those by which a client could notice that the body is another one."""
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not re.match(rb"(?i)x-amz-checksum|etag|content-md5", line))


def _flip(content, dice):
    place, bit = dice.randrange(len(content)), 1 << dice.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
