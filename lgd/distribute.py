"""Ray: connect or start, map a function over arguments, launch training workers. The only importer of ray.

With 0 workers everything runs in this process, without Ray; under torchrun such a process joins torchrun's world.
"""

import collections
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from lgd.errors import ConfigError, DataError, Stopped
from lgd.files import exists, is_remote, place, read_json, remove, write_bytes, write_json
from lgd.text import print_lines

# Ray Train prints each line twice otherwise, and warns of a default that does not concern us. The colours of what
# workers print would be escaped.
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def connect(workers: int, what: str, use_gpus: bool = True) -> float:
    """Join the cluster that RAY_ADDRESS names, or start a local one; return the CPUs for each worker.

    Raises `DataError` when the cluster cannot give `workers` workers a GPU or a CPU each (with `use_gpus` False a
    CPU each, whatever it has); `what` names the option that asked for them.
    """
    try:
        # A folder named `ray`, as a run has one, would pass for a package.
        import ray._version
    except ImportError as error:
        raise DataError(f"Ray is not installed: pip install 'ray[default,train]', or set {what} to 0") from error

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            if address:
                _knock(address)
                ray.init(address=address, logging_level=logging.ERROR)
            else:
                # One machine has no preemption notice to watch for.
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                # Ray Train asks the dashboard's process whether its controller lives, and complains without one.
                ray.init(address="local", include_dashboard=True, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            place = f"the cluster of RAY_ADDRESS={address}" if address else "a local Ray"
            raise DataError(f"{place} cannot be reached or started ({error}); set {what} to 0 to do without") from error
    has = ray.cluster_resources()
    gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    slots, kind = (gpus, "GPUs") if gpus and use_gpus else (cpus, "CPUs")
    if workers > slots:
        raise DataError(
            f"{what} is {workers}, but this Ray cluster has {cpus} CPUs and {gpus} GPUs: set it to {slots} or less, "
            f"or add nodes (one worker takes one of its {kind})"
        )
    # On a cluster of one's own the workers share all CPUs; on a shared one each takes a single slot.
    return 1 if os.environ.get("RAY_ADDRESS") else max(1, cpus // max(workers, 1))


def _knock(address: str) -> None:
    """Raise `OSError` when nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def disconnect() -> None:
    """Leave the cluster; a local one that `connect` started is stopped."""
    if _is_connected():
        sys.modules["ray"].shutdown()


@contextlib.contextmanager
def restore_connection() -> Iterator[None]:
    """Leave the cluster at the end, unless this process was in one before."""
    before = _is_connected()
    try:
        yield
    finally:
        if not before:
            disconnect()


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def map_with(
    make: Callable[[], Callable[[Argument], Result]],
    arguments: Sequence[Argument],
    *,
    workers: int,
    what: str,
    use_gpus: bool = True,
    at_once: int = 1,
) -> Iterator[Result]:
    """Apply a function to each argument and yield the results as they come, in any order.

    `make` builds the function once in each worker: what is costly to load is loaded there. A worker has one of the
    cluster's GPUs, where there are any and `use_gpus` is left True. Each worker calls the function in `at_once`
    threads; a function with a method `stop` is told by it that its results are not wanted any more.
    """
    if workers == 0 or not arguments:
        yield from _map_here(make(), arguments, at_once)
        return
    cpus = connect(workers, what, use_gpus)
    import ray
    from ray.util import ActorPool

    class Mapper:
        """One worker."""

        def __init__(self) -> None:
            self.function = make()

        def apply(self, argument: Argument) -> Result:
            return self.function(argument)

    gpus = 1 if use_gpus and ray.cluster_resources().get("GPU", 0) else 0
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Mapper)
    actors = [actor.options(max_concurrency=at_once).remote() for _ in range(min(workers, len(arguments)))]
    # An actor that stands in the pool twice gets two arguments at a time; the first turn goes round all actors.
    pool: Any = ActorPool(actors * at_once)
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


def ahead(
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


def _cause(error: Any) -> BaseException:
    """The user's error behind a remote one, so that it is told as if it had happened here."""
    cause: Any = getattr(error, "cause", None)
    while getattr(cause, "cause", None) not in (None, cause):
        cause = cause.cause
    return cause if isinstance(cause, (ValueError, OSError)) else error


def launch(
    function: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    *,
    workers: int,
    max_failures: int,
    storage: str | Path,
    name: str,
) -> None:
    """Run `function(argument)` once in each training worker, with a process group between them.

    0 workers: in this process. Otherwise under Ray Train, which restarts the workers up to `max_failures` times
    when one is lost; `function` must then go on from its own checkpoints. SIGTERM and Ctrl-C make the file
    `argument["stop"]`, at whose appearance the workers should save what they have and end.
    """
    if workers == 0:
        function(argument)
        return
    cpus = connect(workers, "train.workers")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = bool(ray.cluster_resources().get("GPU", 0))
    storage = place(storage) if is_remote(storage) else Path(storage).absolute()
    note, stop = storage / f"{name}.error.json", storage / f"{name}.stop"
    for old in (note, stop):
        remove(old)
    _tell_if_busy(workers, "GPU" if use_gpu else "CPU")
    trainer = TorchTrainer(
        functools.partial(_once, function, note),
        train_loop_config=argument | {"stop": str(stop)},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
        ),
        run_config=RunConfig(
            name=name, failure_config=FailureConfig(max_failures=max_failures), **_storage_of(storage)
        ),
    )
    try:
        with _stopping_by(stop):
            _in_thread(trainer.fit)
    except ray.train.TrainingFailedError as error:
        if not exists(note):
            raise _lost(error, max_failures) from error
    if exists(note):
        raise DataError(*read_json(note))


def _storage_of(folder: Path) -> dict[str, Any]:
    """Where Ray Train keeps its state, as it wants to be told; at a url by the same client as everything else."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    url: Any = folder
    return {"storage_path": url.path, "storage_filesystem": PyFileSystem(FSSpecHandler(url.fs))}


def _tell_if_busy(workers: int, kind: str) -> None:
    import ray

    free, has = (int(found.get(kind, 0)) for found in (ray.available_resources(), ray.cluster_resources()))
    if free < workers:
        print_lines(f"waiting for the cluster: {workers} {kind}s are needed, {free} of {has} are free", file=sys.stderr)


@contextlib.contextmanager
def _stopping_by(stop: Path) -> Iterator[None]:
    """Answer SIGTERM and Ctrl-C by making the file `stop`; the second one ends this process as usual."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: Any) -> None:
        write_bytes(stop, b"")
        for one, handler in before.items():
            signal.signal(one, handler)
        print_lines("stopping: the workers end their step and save a checkpoint", file=sys.stderr)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        remove(stop)


def _in_thread(function: Callable[[], Any]) -> None:
    """Call a function outside of the main thread, where Ray Train would put its own answer to Ctrl-C in our place."""
    done: Future[Any] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    done.result()


def _lost(error: Any, max_failures: int) -> BaseException:
    """What to tell of workers that were lost too often; the error itself where they failed by themselves."""
    from ray.exceptions import RayActorError

    # A worker that dies while all start is the controller's failure. Those that are left fail for want of a lost one.
    failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    if not any(isinstance(cause, RayActorError) for cause in causes):
        return error
    return DataError(
        f"workers were lost more often than train.max_failures {max_failures} allows: the same command goes on from "
        "the newest checkpoint"
    )


def _once(function: Callable[[dict[str, Any]], None], note: Path, argument: dict[str, Any]) -> None:
    """Run a worker. Bad data is bad after a restart too: its error is noted, and restarted workers end at once."""
    if exists(note):
        return
    try:
        function(argument)
    except (DataError, ConfigError) as error:
        write_json(note, [str(line) for line in error.args])
        # All workers stop at the same step; where one alone meets an error the others must be ended.
        if not isinstance(error, Stopped):
            raise
