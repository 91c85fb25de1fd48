"""A function over arguments in threads, in order, a few ahead."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def map_ordered_prefetch(
    pool: Executor, function: Callable[[Argument], Result], arguments: Iterable[Argument], count: int
) -> Iterator[Result]:
    """Results in the order of the arguments; up to `count` are worked out ahead in the pool, never all of them."""
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def in_threads(function: Callable[[Argument], Result], arguments: Iterable[Argument], threads: int) -> Iterator[Result]:
    """Results in the order of the arguments; a few are worked out ahead, never all of them."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from map_ordered_prefetch(pool, function, arguments, 2 * threads)
    finally:
        # As in `lgd.stream.reader`: whatever thread collects what was abandoned must not wait.
        pool.shutdown(wait=False, cancel_futures=True)
