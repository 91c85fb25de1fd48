"""Join the cluster that RAY_ADDRESS names, or start a local one, and leave it."""

import atexit
import contextlib
import functools
import importlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator

from lgd.base.environment import count_cpus
from lgd.base.errors import DataError
from lgd.base.logs import LOGGER, receive_logs, send_logs
from lgd.base.process_state import default_environment, undo_changes

logger = logging.getLogger(__name__)

Send = Callable[[], contextlib.AbstractContextManager[None]]
"""What a worker must enter to have its log records and bars appear in the driver."""

_connection = contextlib.ExitStack()
"""Leaves the cluster that `connect` joined, and undoes what that changed in this process."""

_PATIENCE = 600
"""Seconds in which an autoscaler may add nodes."""

# Ray Train prints each line twice otherwise, and warns of a default that does not concern us. The colours of what
# workers print would be escaped.
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}

# Ray takes a loopback address for that of the network and listens there, except where it expects one machine.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# A local Ray runs what anybody sends to its ports, so other users of this machine must not get in. Its libraries read
# the token once a process.
_OWN = _ON_LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def connect(workers: int, option_name: str, threads: int = 0, use_gpus: bool = True) -> int:
    """Join the cluster that RAY_ADDRESS names, or start a local one; return the CPUs for each worker.

    On a cluster of one's own the workers share all CPUs. On another one each reserves one, and one for each of its
    `threads`; where these are lacking, nodes are requested and awaited for a while, which an autoscaler may add.

    Raises `DataError` when the cluster cannot give `workers` workers a GPU or these CPUs each (with `use_gpus` False
    the CPUs, whatever it has); `option_name` is the option that asked for them.
    """
    join_cluster(f"set {option_name} to 0 to do without")
    address = os.environ.get("RAY_ADDRESS")
    cpus = threads + 1 if address else 1
    slots = _count_workers(cpus, use_gpus)
    if workers > slots and address:
        slots = _wait_for_nodes(workers, cpus, use_gpus)
    if workers > slots:
        takes = f"a GPU and {cpus}" if use_gpus and count_slots("GPU") else str(cpus)
        reads = f", one for each of {threads} reading threads and one more" if cpus > 1 else ""
        raise DataError(
            f"{option_name} is {workers}, but this Ray cluster has {count_slots('CPU')} CPUs and {count_slots('GPU')} "
            f"GPUs: set it to {slots} or less, or add nodes (a worker takes {takes} CPUs{reads})"
        )
    return cpus if address else max(1, count_slots("CPU") // max(workers, 1))


def join_cluster(remedy: str, dashboard: bool = True) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one, unless this process is in one.

    A local one has a `dashboard`, which Ray Train asks, or none, which starts a tenth sooner and uses less meanwhile.

    Raises `DataError`, with the remedy, where Ray is not installed, or cannot be reached or started.
    """
    try:
        variables = _import_ray()
    except ImportError as error:
        raise DataError(f"Ray is not installed: pip install 'ray[default,train]', or {remedy}") from error
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        try:
            _start_ray(address, variables, dashboard)
        except Exception as error:
            # A node that does not come up in time is a bare one.
            cluster = f"the cluster of RAY_ADDRESS={address}" if address else "a local Ray"
            raise DataError(f"{cluster} cannot be reached or started ({error}); {remedy}") from error


def _count_workers(cpus: int, use_gpus: bool) -> int:
    """How many workers of so many CPUs, and of a GPU where there are any, the cluster has room for."""
    gpus, rooms = count_slots("GPU"), count_slots("CPU") // cpus
    return min(gpus, rooms) if gpus and use_gpus else rooms


def _wait_for_nodes(workers: int, cpus: int, use_gpus: bool) -> int:
    """Ask an autoscaler, if there is one, for room for the workers; return how many there is room for in the end."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": cpus} | ({"GPU": 1} if use_gpus and count_slots("GPU") else {})
    logger.warning(
        "waiting for nodes, up to %d seconds: the cluster has room for %d of %d workers",
        _PATIENCE,
        _count_workers(cpus, use_gpus),
        workers,
    )
    request_resources(bundles=[bundle] * workers)
    ends = time.monotonic() + _PATIENCE
    try:
        while (slots := _count_workers(cpus, use_gpus)) < workers and time.monotonic() < ends:
            time.sleep(1)
    finally:
        # From here on the workers themselves keep their nodes.
        request_resources(bundles=[])
    return slots


@functools.cache
def _import_ray() -> dict[str, str]:
    """Import Ray; return the variables that it reads when it is imported, which its processes must be given too."""
    address = os.environ.get("RAY_ADDRESS")
    variables = _ON_LOOPBACK if address else _OWN
    if "ray" in sys.modules or (address and not _is_on_loopback_only(address)):
        variables = {}
    # A folder named `ray`, as a run has one, would pass for a package: so a module of it.
    with default_environment({"RAY_CLIENT_MODE": "0"} | variables):
        importlib.import_module("ray._version")
    return variables


def _start_ray(address: str | None, variables: dict[str, str], dashboard: bool) -> None:
    """Join or start Ray. What its processes print is shown at DEBUG only; their log records come by `collect_logs`."""
    import ray

    debug = LOGGER.isEnabledFor(logging.DEBUG)
    if address:
        _check_reachable(address)
    # One machine has no preemption notice to watch for.
    variables = variables | _QUIET | ({} if address else {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})
    # Ray takes SIGTERM for itself, and its processes and Ray Train read the variables later.
    with undo_changes() as undo:
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        ray.init(
            address=address or "local",
            # Ray looks at a container's limit, but not at the CPUs that this process is bound to.
            num_cpus=None if address else count_cpus(),
            # Ray Train asks the dashboard's process whether its controller lives, and complains without one.
            include_dashboard=None if address else dashboard,
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.ERROR,
        )
    _connection.push(undo)
    # What Ray's processes report of each lost worker goes to standard output otherwise, which is for results, also
    # without `log_to_driver`, and by `shutdown` too.
    ray._private.worker._worker_logs_enabled = debug
    _connection.callback(setattr, ray._private.worker, "_worker_logs_enabled", True)
    _connection.callback(ray.shutdown)
    # At the end of the process it would write a code for colours, though Ray writes none, to what `lgd.base.text`
    # escapes.
    if colorama := sys.modules.get("colorama.initialise"):
        atexit.unregister(colorama.reset_all)


def _check_reachable(address: str) -> None:
    """Raise `OSError` when nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def is_reachable() -> bool:
    """Whether the cluster that this process is in still answers: a signal to a whole group ends a local one too."""
    import ray

    try:
        _check_reachable(ray.get_runtime_context().gcs_address)
    except OSError:
        return False
    return True


def _is_on_loopback_only(address: str) -> bool:
    """Whether nobody listens at the port of a loopback address on this machine's own address, as Ray finds that."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit():
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Nothing is sent: the kernel chooses the address from which it would be.
        probe.connect(("8.8.8.8", 80))
        host = probe.getsockname()[0]
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        return True
    return host.startswith("127.")


def disconnect() -> None:
    """Leave the cluster; a local one that `connect` started is stopped. What `connect` changed here is undone."""
    _connection.close()


@contextlib.contextmanager
def restore_connection() -> Iterator[None]:
    """Leave the cluster at the end, unless this process was in one before."""
    ray = sys.modules.get("ray")
    before = ray is not None and ray.is_initialized()
    try:
        yield
    finally:
        if not before:
            disconnect()


def count_slots(kind: str, free: bool = False) -> int:
    """The CPUs or GPUs of the cluster, or those of them that nothing uses."""
    import ray

    resources: Callable[[], dict[str, float]] = ray.available_resources if free else ray.cluster_resources
    return int(resources().get(kind, 0))


@contextlib.contextmanager
def collect_logs(several: bool) -> Iterator[Send]:
    """What a worker must enter to have its log records and bars appear here (`several`: see `receive_logs`)."""
    from ray.util.queue import Queue

    # Where its node is lost it begins anew on another one: only messages that nobody had taken yet are lost.
    queue = Queue(actor_options={"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1})
    try:
        with receive_logs(queue, several):
            yield functools.partial(send_logs, queue, LOGGER.getEffectiveLevel())
    finally:
        queue.shutdown(force=True)
