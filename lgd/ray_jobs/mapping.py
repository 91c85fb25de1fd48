"""A function over arguments, in workers of Ray or in this process."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from lgd.ray_jobs.cluster import collect_logs, connect, count_slots

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def map_with(
    make: Callable[[], Callable[[Argument], Result]],
    arguments: Sequence[Argument],
    *,
    workers: int,
    option_name: str,
    use_gpus: bool = True,
    at_once: int = 1,
) -> Iterator[Result]:
    """Apply a function to each argument and yield the results as they come, in any order.

    `make` builds the function once in each worker: what is costly to load is loaded there. A worker has one of the
    cluster's GPUs, where there are any and `use_gpus` is left True. Each worker calls the function in `at_once`
    threads; a function with a method `stop` is stopped by it when its results are not wanted any more.
    """
    if workers == 0 or not arguments:
        yield from _map_here(make(), arguments, at_once)
        return
    cpus = connect(workers, option_name, use_gpus)
    import ray
    from ray.util import ActorPool

    class Mapper:
        """One worker."""

        def __init__(self, send: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
            # For as long as this process lives.
            self.sending = send()
            self.sending.__enter__()
            self.function = make()

        def apply(self, argument: Argument) -> Result:
            return self.function(argument)

    gpus = 1 if use_gpus and count_slots("GPU") else 0
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Mapper)
    with collect_logs(several=True) as send:
        actors = [actor.options(max_concurrency=at_once).remote(send) for _ in range(min(workers, len(arguments)))]
        # An actor that stands in the pool twice gets two arguments at a time; the first turn goes round all actors.
        pool = ActorPool(actors * at_once)
        try:
            yield from pool.map_unordered(lambda worker, argument: worker.apply.remote(argument), list(arguments))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        finally:
            for worker in actors:
                ray.kill(worker)


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


def _cause(error: Exception) -> BaseException:
    """The user's error behind a remote one, so that it is raised as if it had happened here."""
    cause = getattr(error, "cause", None)
    while cause is not None and getattr(cause, "cause", None) not in (None, cause):
        cause = cause.cause
    return cause if isinstance(cause, (ValueError, OSError)) else error
