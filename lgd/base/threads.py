"""A function over arguments in threads, in order, a few ahead."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def keep_ahead(
    iterable: Iterable[Argument], count: int, size: Callable[[Argument], int] = lambda one: 1
) -> Iterator[Argument]:
    """Give each element after those behind it, of up to `count` in sum of their `size`, were taken from `iterable`."""
    waiting: collections.deque[Argument] = collections.deque()
    ahead = 0
    for one in iterable:
        waiting.append(one)
        ahead += size(one)
        while ahead > count:
            ahead -= size(waiting[0])
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def map_ordered_prefetch(
    pool: Executor, function: Callable[[Argument], Result], arguments: Iterable[Argument], count: int
) -> Iterator[Result]:
    """Results in the order of the arguments; up to `count` are worked out ahead in the pool, never all of them."""
    for future in keep_ahead((pool.submit(function, argument) for argument in arguments), count):
        yield future.result()


def in_threads(function: Callable[[Argument], Result], arguments: Iterable[Argument], threads: int) -> Iterator[Result]:
    """Results in the order of the arguments; a few are worked out ahead, never all of them."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from map_ordered_prefetch(pool, function, arguments, 2 * threads)
    finally:
        # As in `lgd.stream.reader`: whatever thread collects what was abandoned must not wait.
        pool.shutdown(wait=False, cancel_futures=True)
