"""Start the service, on this machine or on the cluster that RAY_ADDRESS names, and end it without a trace."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from lgd.base.errors import DataError
from lgd.base.process_state import default_environment, stop_signals
from lgd.io.folders import find_existing
from lgd.io.location import Location, as_location
from lgd.models.description import StudentConfig
from lgd.ray_jobs.cluster import count_slots, is_reachable, join_cluster, restore_connection
from lgd.scoring.slide_plan import find_scale
from lgd.serve.network import open_store
from lgd.serve.options import ServeOptions
from lgd.serve.slide_folder import SlideFolder

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'lgd[serve]'"
# Bodies go from process to process with the calls that they belong to. By way of Ray's store of objects, where what is
# above 100 kB goes otherwise, a request of 0.4 MB took a fifth more CPU time.
_INLINE = {"RAY_max_direct_call_object_size": str(4 * 2**20)}
_MOMENT = 0.5
_REQUEST_SECONDS = 120
"""In which a request must be answered."""


def check_options(options: ServeOptions) -> str:
    """The token, after all that can be wrong before anything is started; raises as its parts do."""
    missing = [name for name in ("starlette", "fastapi", "fastapi_offline", "uvicorn") if find_spec(name) is None]
    if missing:
        raise DataError(f"{missing[0]}, which the service needs, is not installed: {_INSTALL}")
    token = options.read_token(needed=not options.is_private)
    _check_port(options)
    if find_existing(model := as_location(options.model)) not in (None, model):
        raise DataError(f"there is no folder {options.model}: name a run, or the folder of its student, by --model")
    config = StudentConfig.read_folder(options.student)
    if options.slides_folder:
        find_scale(config.training, config.size)
        _check_results(options.results)
    open_store(options, config)
    return token


def serve_until_stopped(options: ServeOptions, announce: Callable[[str], None]) -> None:
    """Run the service until SIGTERM or Ctrl-C; `announce` is given its address once it answers."""
    token = check_options(options)
    of_slides = f", and the slides of {options.slides}" if options.slides else ""
    logger.info("loading the network of %s%s: this takes half a minute to some minutes", options.model, of_slides)
    _name_unusable(options)
    stopped = threading.Event()
    with restore_connection():
        try:
            from lgd.serve.guard import make_proxy_variables

            # A cluster that was started without them has the bounds behind its proxy only.
            with default_environment(make_proxy_variables(options.max_mb) | _INLINE):
                join_cluster(_INSTALL, dashboard=False)
            from ray import serve

            # Each step that it takes is no news for those who wait for the service.
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            from lgd.serve.replicas import APPLICATION, make_application
        except ImportError as error:
            raise DataError(f"Ray Serve is not installed ({error}): {_INSTALL}") from error
        if options.gpus is None:
            options = replace(options, gpus=0.5 if count_slots("GPU") else 0.0)
        options = replace(options, port=options.port or _find_port(options.host))
        with stop_signals(lambda number, frame: stopped.set()):
            try:
                serve.start(
                    proxy_location="HeadOnly",
                    http_options={
                        "host": options.host,
                        "port": options.port,
                        "request_timeout_s": _REQUEST_SECONDS,
                        "keep_alive_timeout_s": 30,
                    },
                )
                serve.run(make_application(options, token), name=APPLICATION)
                announce(f"http://{name_host(options.host)}:{options.port}/")
                stopped.wait()
                logger.info("stopping")
            except RuntimeError as error:
                # Above it stands the trace of the process that could not begin.
                reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
                raise DataError(f"the service could not be started ({reason}): --debug shows more") from error
            finally:
                # A signal to all processes of a session needs a moment to end them.
                time.sleep(_MOMENT)
                if is_reachable():
                    serve.delete(APPLICATION)
                    serve.shutdown()  # type: ignore[no-untyped-call]


def _name_unusable(options: ServeOptions) -> None:
    """Log which slides are listed with a problem in place of a map."""
    if options.slides_folder is None:
        return
    config = StudentConfig.read_folder(options.student)
    slides = SlideFolder(options.slides_folder, options.hide_names, find_scale(config.training, config.size))
    for one in slides.list_slides():
        if one.problem:
            logger.warning("%s cannot be used: %s", one.path, one.problem)


def name_host(host: str) -> str:
    """A host as an address names it; of a service that listens on all addresses, the name of this machine."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _check_results(folder: Location) -> None:
    """Raise `DataError` where no folder of results can be; where it may not be written, they can still be seen."""
    there = find_existing(folder)
    if there is None:
        return
    if not there.is_dir():
        raise DataError(f"{folder} cannot hold the results of slides, for {there} is no folder: name another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        logger.warning("%s may not be written: no slide can be scored", there)


def _find_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _check_port(options: ServeOptions) -> None:
    """Raise `DataError` where another program has the port: Ray Serve would try for a minute."""
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise DataError(
                f"{options.host}:{options.port} cannot be listened on ({error.strerror}): name another --port or --host"
            ) from error
