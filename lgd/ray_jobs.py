"""Ray: connect or start, map a function over arguments, launch training workers. The only importer of ray.

With 0 workers everything runs in this process, without Ray; under torchrun such a process joins torchrun's world.
"""

import atexit
import collections
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar, cast

from lgd.base.errors import ConfigError, DataError, Stopped
from lgd.base.logs import LOGGER, receive_logs, send_logs
from lgd.base.process_state import default_environment, stop_signals, undo_changes
from lgd.io.files import exists, read_json, remove, write_bytes, write_json
from lgd.io.location import Location, as_arrow

logger = logging.getLogger(__name__)

_connection = contextlib.ExitStack()
"""Undoes what `connect` changes in this process."""

# Ray Train prints each line twice otherwise, and warns of a default that does not concern us. The colours of what
# workers print would be escaped.
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def connect(workers: int, option_name: str, use_gpus: bool = True) -> float:
    """Join the cluster that RAY_ADDRESS names, or start a local one; return the CPUs for each worker.

    Raises `DataError` when the cluster cannot give `workers` workers a GPU or a CPU each (with `use_gpus` False a
    CPU each, whatever it has); `option_name` is the option that asked for them.
    """
    try:
        # A folder named `ray`, as a run has one, would pass for a package. The variable is set by the import for good.
        with default_environment({"RAY_CLIENT_MODE": "0"}):
            import ray._version
    except ImportError as error:
        raise DataError(f"Ray is not installed: pip install 'ray[default,train]', or set {option_name} to 0") from error

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        try:
            _start_ray(address)
        except (OSError, RuntimeError, ValueError) as error:
            cluster = f"the cluster of RAY_ADDRESS={address}" if address else "a local Ray"
            raise DataError(
                f"{cluster} cannot be reached or started ({error}); set {option_name} to 0 to do without"
            ) from error
    gpus, cpus = _count("GPU"), _count("CPU")
    slots, kind = (gpus, "GPUs") if gpus and use_gpus else (cpus, "CPUs")
    if workers > slots:
        raise DataError(
            f"{option_name} is {workers}, but this Ray cluster has {cpus} CPUs and {gpus} GPUs: set it to {slots} or "
            f"less, or add nodes (one worker takes one of its {kind})"
        )
    logger.debug("Ray has %d CPUs and %d GPUs for %d workers", cpus, gpus, workers)
    # On a cluster of one's own the workers share all CPUs; on a shared one each takes a single slot.
    return 1 if os.environ.get("RAY_ADDRESS") else max(1, cpus // max(workers, 1))


def _start_ray(address: str | None) -> None:
    """Join or start Ray. What its processes print is shown at DEBUG only; their log records come by `_collect_logs`."""
    import ray

    debug = LOGGER.isEnabledFor(logging.DEBUG)
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    if address:
        _check_reachable(address)
        options |= {"address": address}
    else:
        # Ray Train asks the dashboard's process whether its controller lives, and complains without one.
        options |= {"address": "local", "include_dashboard": True}
    # One machine has no preemption notice to watch for.
    variables = _QUIET if address else _QUIET | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    # Ray takes SIGTERM for itself, and its processes and Ray Train read the variables later.
    with undo_changes() as undo:
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        ray.init(**options)
    _connection.push(undo)
    # At the end of the process it would write a code for colours, though Ray writes none, to what `lgd.base.text`
    # escapes.
    if colorama := sys.modules.get("colorama.initialise"):
        atexit.unregister(colorama.reset_all)


def _check_reachable(address: str) -> None:
    """Raise `OSError` when nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def disconnect() -> None:
    """Leave the cluster; a local one that `connect` started is stopped. What `connect` changed here is undone."""
    with _connection:
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


class _RecordQueue:
    """A queue on the cluster by which workers send their log records to the driver."""

    def __init__(self) -> None:
        from ray.util.queue import Queue

        self._queue = Queue(actor_options={"num_cpus": 0})

    def put_nowait(self, record: logging.LogRecord | None) -> None:
        """Add a record, or None where there will be no more."""
        from ray.exceptions import RayError

        try:
            self._queue.put_nowait(record)
        except RayError:
            # Who reads has ended by itself then.
            if record is not None:
                raise

    def get(self, block: bool) -> logging.LogRecord | None:
        """The next record; None where there will be no more."""
        from ray.exceptions import RayError

        try:
            record: logging.LogRecord | None = self._queue.get(block)
        except RayError as error:
            logger.warning("the messages of the workers are lost from here on, their work is not: %s", error)
            return None
        return record

    def close(self) -> None:
        """End the queue's process."""
        self._queue.shutdown(force=True)


@contextlib.contextmanager
def _collect_logs(several: bool) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """What a worker must enter to have its log records and bars appear here (`several`: see `receive_logs`)."""
    queue, level = _RecordQueue(), LOGGER.getEffectiveLevel()
    try:
        with receive_logs(queue, several):
            yield functools.partial(send_logs, queue, level)
    finally:
        queue.close()


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

    gpus = 1 if use_gpus and _count("GPU") else 0
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Mapper)
    with _collect_logs(several=True) as send:
        actors = [actor.options(max_concurrency=at_once).remote(send) for _ in range(min(workers, len(arguments)))]
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


def _cause(error: Any) -> BaseException:
    """The user's error behind a remote one, so that it is raised as if it had happened here."""
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
    storage: Location,
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

    use_gpu = bool(_count("GPU"))
    storage = storage.absolute()
    note, stop = storage / f"{name}.error.json", storage / f"{name}.stop"
    for old in (note, stop):
        remove(old)
    _note_if_busy(workers, "GPU" if use_gpu else "CPU")
    resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
    failures, (path, filesystem) = FailureConfig(max_failures=max_failures), as_arrow(storage)
    try:
        with _collect_logs(several=False) as send, _stopping_by(stop):
            trainer = TorchTrainer(
                functools.partial(_run_recording_user_error, function, note, send),
                train_loop_config=argument | {"stop": str(stop)},
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
                run_config=RunConfig(
                    name=name, failure_config=failures, storage_path=path, storage_filesystem=filesystem
                ),
            )
            _in_thread(trainer.fit)
    except ray.train.TrainingFailedError as error:
        if not exists(note):
            raise _lost(error, max_failures) from error
    if exists(note):
        raise DataError(*read_json(note))


def _count(kind: str, free: bool = False) -> int:
    """The CPUs or GPUs of the cluster, or those of them that nothing uses."""
    import ray

    resources: Callable[[], dict[str, float]] = ray.available_resources if free else ray.cluster_resources
    return int(resources().get(kind, 0))


def _note_if_busy(workers: int, kind: str) -> None:
    free, has = _count(kind, free=True), _count(kind)
    if free < workers:
        logger.warning("waiting for the cluster: %d %ss are needed, %d of %d are free", workers, kind, free, has)


@contextlib.contextmanager
def _stopping_by(stop: Location) -> Iterator[None]:
    """Answer SIGTERM and Ctrl-C by making the file `stop`; the second one ends this process as usual."""

    def ask(number: int, frame: Any) -> None:
        write_bytes(stop, b"")
        restore()
        logger.warning("stopping: the workers end their step and save a checkpoint")

    with stop_signals(ask) as restore:
        try:
            yield
        finally:
            restore()
            remove(stop)


def _in_thread(function: Callable[[], Any]) -> None:
    """Call a function outside of the main thread, where Ray Train would put its own answer to Ctrl-C in our place."""
    done: Future[Any] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # noqa: BLE001 - `result` raises it in the main thread
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    done.result()


def _lost(error: Any, max_failures: int) -> BaseException:
    """The error of workers that were lost too often; the error itself where they failed by themselves."""
    from ray.exceptions import RayActorError

    # A worker that dies while all start is the controller's failure. Those that are left fail for want of a lost one.
    failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    if not any(isinstance(cause, RayActorError) for cause in causes):
        return cast(BaseException, error)
    return DataError(
        f"workers were lost more often than train.max_failures {max_failures} allows: the same command goes on from "
        "the newest checkpoint"
    )


def _run_recording_user_error(
    function: Callable[[dict[str, Any]], None],
    note: Location,
    send: Callable[[], contextlib.AbstractContextManager[None]],
    argument: dict[str, Any],
) -> None:
    """Run a worker. Bad data is bad after a restart too: its error is noted, and restarted workers end at once."""
    if exists(note):
        return
    try:
        with send():
            function(argument)
    except (DataError, ConfigError) as error:
        write_json(note, [str(line) for line in error.args])
        # All workers stop at the same step; where one alone meets an error the others must be ended.
        if not isinstance(error, Stopped):
            raise
