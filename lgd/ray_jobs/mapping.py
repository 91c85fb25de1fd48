"""A function over arguments, in this process or in workers of Ray that may be lost."""

import collections
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from lgd.base.errors import DataError
from lgd.ray_jobs.cluster import Send, collect_logs, connect, count_slots

logger = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_MOST_LOSSES = 25
"""Workers that may die while they have one argument: a node that is taken away now and then is no fault of it."""


def map_with(  # noqa: PLR0913 - what workers are, and what they do
    make: Callable[[], Callable[[Argument], Result]],
    arguments: Sequence[Argument],
    *,
    workers: int,
    option_name: str,
    threads: int = 0,
    use_gpus: bool = True,
    at_once: int = 1,
    name: Callable[[Argument], str] = str,
) -> Iterator[Result]:
    """Apply a function to each argument and yield the results as they come, in any order.

    `make` builds the function once in each worker: what is costly to load is loaded there. A worker has one of the
    cluster's GPUs, where there are any and `use_gpus` is left True, and CPUs for so many `threads` beside its own. Each
    worker calls the function in `at_once` threads; a function with a method `stop` is stopped by it when its results
    are not wanted any more.

    A worker that dies is started again, and its arguments are given to the next one that is free: the function may be
    called twice with one argument. Raises `DataError` for an argument that its worker always dies of, by `name`.
    """
    if workers == 0 or not arguments:
        yield from _map_here(make(), arguments, at_once)
        return
    cpus = connect(workers, option_name, threads, use_gpus)
    import ray

    class Mapper:
        """One worker."""

        def __init__(self) -> None:
            self.making, self.made = threading.Lock(), list[Callable[[Argument], Result]]()

        def apply(self, argument: Argument, send: Send) -> Result:
            # Not in `__init__`, whose errors Ray gives as those of a lost worker, and whose arguments it may lose.
            with self.making:
                if not self.made:
                    # For as long as this process lives.
                    self.sending = send()
                    self.sending.__enter__()
                    self.made.append(make())
            return self.made[0](argument)

    gpus = 1 if use_gpus and count_slots("GPU") else 0
    # Calls wait for a worker that is being started again.
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Mapper)
    with collect_logs(several=True) as send:
        actors = [actor.options(max_concurrency=at_once).remote() for _ in range(min(workers, len(arguments)))]
        try:
            yield from _spread(actors, send, arguments, at_once, name)
        except ray.exceptions.RayTaskError as error:
            # The user's error is raised as if it had happened here.
            raise (error.cause if isinstance(error.cause, ValueError | OSError) else error) from error
        finally:
            for worker in actors:
                ray.kill(worker)


def _spread(
    actors: Sequence[Any], send: Send, arguments: Sequence[Argument], at_once: int, name: Callable[[Argument], str]
) -> Iterator[Any]:
    """Give each argument to an actor that runs, `at_once` at a time, and yield the results as they come.

    An argument whose actor died is given again, alone, so that another one in the same actor is not blamed for it.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    waiting = collections.deque((argument, 0) for argument in arguments)
    calls: dict[Any, tuple[int, Argument, int]] = {}
    running, starting = set[int](), {actor.__ray_ready__.remote(): number for number, actor in enumerate(actors)}

    def count_free(number: int) -> int:
        held = (at_once if losses else 1 for place, _, losses in calls.values() if place == number)
        return at_once - sum(held) if number in running else 0

    while waiting or calls:
        while waiting:
            argument, losses = waiting[0]
            number = max(range(len(actors)), key=count_free)
            if count_free(number) < (at_once if losses else 1):
                break
            waiting.popleft()
            call = actors[number].apply.options(max_task_retries=0).remote(argument, send)
            calls[call] = number, argument, losses
        (done,), _ = ray.wait([*calls, *starting])
        if done in starting:
            ray.get(done)
            running.add(starting.pop(done))
            continue
        number, argument, losses = calls.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError:
            raise
        except RayError as error:
            logger.debug("%s", error)
            _report_loss(name(argument), losses + 1)
            waiting.appendleft((argument, losses + 1))
            if number in running:
                running.remove(number)
                starting[actors[number].__ray_ready__.remote()] = number
        else:
            yield result


def _report_loss(name: str, losses: int) -> None:
    """Log that a worker was lost; `DataError` where its argument has lost too many."""
    if losses == _MOST_LOSSES:
        raise DataError(
            f"{name}: {losses} workers died while they worked on it: it crashes them, or takes more memory than a node "
            "has, as the log of the node's system says; take it out, or run fewer workers; the same command goes on"
        )
    logger.warning("%s: the worker that had it died and is started again (%d of %d)", name, losses, _MOST_LOSSES)


def _map_here(function: Callable[[Argument], Result], arguments: Sequence[Argument], at_once: int) -> Iterator[Result]:
    if at_once == 1:
        yield from map(function, arguments)
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        for future in as_completed([pool.submit(function, argument) for argument in arguments]):
            yield future.result()
    finally:
        getattr(function, "stop", lambda: None)()
        pool.shutdown(cancel_futures=True)
