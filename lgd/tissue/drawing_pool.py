"""Drawing in several processes, in order."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from lgd.base.environment import count_cpus
from lgd.base.logs import progress

Job = TypeVar("Job")
Drawn = TypeVar("Drawn")


def draw_all(
    draw: Callable[[Job], Drawn], jobs: Sequence[Job], workers: int, unit: str, chunk: int = 1
) -> Iterator[Drawn]:
    """What `draw` gives for each, in their order, by so many processes (0 for one a CPU), `chunk` at a time."""
    workers = workers or count_cpus()
    with progress(len(jobs), "virtual tissue", unit) as bar, contextlib.ExitStack() as stack:
        all_drawn: Iterator[Drawn] = map(draw, jobs)
        if workers > 1:
            # Spawned, because a fork of a process with threads (torch, Ray) can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent)
            all_drawn = stack.enter_context(pool).map(draw, jobs, chunksize=chunk)
        for drawn in all_drawn:
            yield drawn
            bar.update()


def _end_with_parent() -> None:
    """End this process when its parent does, however that ends: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
