"""Training workers under Ray Train, and how they are asked to stop."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from lgd.base.device import find_device
from lgd.base.errors import ConfigError, DataError, Stopped
from lgd.base.process_state import stop_signals
from lgd.io.files import exists, read_json, remove, write_bytes, write_json
from lgd.io.location import Location, as_arrow
from lgd.ray_jobs.cluster import collect_logs, connect, count_slots

logger = logging.getLogger(__name__)


def launch(
    function: Callable[[str | None], None],
    *,
    workers: int,
    max_failures: int,
    storage: Location,
    name: str,
    threads: int = 0,
) -> None:
    """Run `function(stop)` once in each training worker, with a process group between them.

    0 workers: in this process, with `stop` None. Otherwise under Ray Train, which restarts the workers up to
    `max_failures` times when one is lost; `function` must then go on from its own checkpoints. SIGTERM and Ctrl-C make
    the file `stop`, at whose appearance the workers should save what they have and end. Each worker reads in so many
    `threads` beside its own.
    """
    if workers == 0:
        function(None)
        return
    cpus = connect(workers, "train.workers", threads)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = bool(count_slots("GPU"))
    kind = "GPU" if use_gpu else "CPU"
    free, has = count_slots(kind, free=True), count_slots(kind)
    if free < workers:
        logger.warning("waiting for the cluster: %d %ss are needed, %d of %d are free", workers, kind, free, has)
    storage = storage.absolute()
    note, stop = storage / f"{name}.error.json", storage / f"{name}.stop"
    for old in (note, stop):
        remove(old)
    # With `use_gpu` each has a GPU too.
    scaling_config = ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus})
    failures, (path, filesystem) = FailureConfig(max_failures=max_failures), as_arrow(storage)
    run_config = RunConfig(name=name, failure_config=failures, storage_path=path, storage_filesystem=filesystem)
    try:
        with collect_logs(several=False) as send, _stopping_by(stop):
            work = functools.partial(_run_recording_user_error, functools.partial(function, str(stop)), note, send)
            torch_config = _configure_torch(note)
            _in_thread(
                TorchTrainer(work, torch_config=torch_config, scaling_config=scaling_config, run_config=run_config).fit
            )
    except ray.train.TrainingFailedError as error:
        if not exists(note):
            raise _lost(error, max_failures) from error
    if exists(note):
        raise DataError(*read_json(note))


@contextlib.contextmanager
def _stopping_by(stop: Location) -> Iterator[None]:
    """Answer SIGTERM and Ctrl-C by making the file `stop`; the second one ends this process as usual."""

    def ask(number: int, frame: object) -> None:
        write_bytes(stop, b"")
        restore()
        logger.warning("stopping: the workers end their step and save a checkpoint")

    with stop_signals(ask) as restore:
        try:
            yield
        finally:
            restore()
            remove(stop)


def _configure_torch(note: Location) -> Any:
    """Have Ray Train make a process group only of workers that can use their GPUs; else the note says why they cannot.

    Without a usable GPU NCCL would fail first, and by a message of its own.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class CheckedBackend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_note_unusable_device, note)
            if not exists(note):
                super().on_start(worker_group, backend_config)

    class CheckedConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[CheckedBackend]:
            return CheckedBackend

    return CheckedConfig()


def _note_unusable_device(note: Location) -> None:
    with contextlib.suppress(DataError):
        # It is tried by the rank that it belongs to.
        _run_recording_user_error(functools.partial(find_device, None), note, contextlib.nullcontext)


def _in_thread(function: Callable[[], object]) -> None:
    """Call a function outside of the main thread, where Ray Train would put its own answer to Ctrl-C in our place."""
    done: Future[object] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # noqa: BLE001 - `result` raises it in the main thread
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    done.result()


def _lost(error: Exception, max_failures: int) -> Exception:
    """The error of workers that were lost too often; the error itself where they failed by themselves."""
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


def _run_recording_user_error(
    function: Callable[[], object], note: Location, send: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """Run a worker. Bad data is bad after a restart too: its error is noted, and restarted workers end at once."""
    if exists(note):
        return
    try:
        with send():
            function()
    except (DataError, ConfigError) as error:
        write_json(note, [str(line) for line in error.args])
        # All workers stop at the same step; where one alone meets an error the others must be ended.
        if not isinstance(error, Stopped):
            raise
