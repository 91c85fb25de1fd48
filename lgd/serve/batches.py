"""Requests that are computed together: those that came while the last ones were computed.

`ray.serve.batch` closes a batch some milliseconds after its first request, also where it then waits for the one before:
of requests that come one by one it makes batches of one.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Given = TypeVar("Given")


class Batches(Generic[Asked, Given]):
    """Calls of one event loop, of which one thread computes up to `most` at a time.

    Args:
        compute: Gives an answer for each of several requests.
        most: Requests in a batch.
    """

    def __init__(self, compute: Callable[[Sequence[Asked]], Sequence[Given]], most: int) -> None:
        self._compute, self._most = compute, most
        self._waiting: list[tuple[Asked, asyncio.Future[Given]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Given:
        """The answer to one request; raises what its batch raises."""
        answer: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while waiting := [one for one in self._waiting if not one[1].done()]:
            # Those that wait no more were cancelled.
            batch, self._waiting = waiting[: self._most], waiting[self._most :]
            answers = [answer for _, answer in batch]
            try:
                given = await asyncio.to_thread(self._compute, [asked for asked, _ in batch])
                for answer, one in zip(answers, given, strict=True):
                    if not answer.done():
                        answer.set_result(one)
            except Exception as error:  # noqa: BLE001 - raised where the answers are awaited
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
        self._waiting, self._running = [], None
