"""The connections of Ray Serve's proxy, with bounds of the head of a request: 64 KB, and a minute.

The parser that uvicorn prefers, httptools, bounds neither: a head of 130 MB kept its process busy for 36 seconds, in
which it answered nobody, and Ray killed it. h11 refuses a head that is too large.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 60.0
"""In which the head of a request must be there."""


class BoundedProtocol(H11Protocol):
    """A connection that is closed where it brings no whole head for so long."""

    _seen: RequestResponseCycle | None = None
    """The request that was the last one when the connection was looked at."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch it."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle
        self._watch()
