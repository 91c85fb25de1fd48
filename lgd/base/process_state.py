"""What belongs to the whole process, set for a while and then as it was: environment variables, signal handlers, and
what is said of errors in threads.

The process group is `lgd.train.world`'s, logging and filters of warnings are `lgd.base.logs`'s.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def default_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those variables that nobody has set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        _restore_environment(dict.fromkeys(new))


@contextlib.contextmanager
def undo_changes() -> Iterator[contextlib.ExitStack]:
    """A stack that undoes, when it is closed, what the block changes in the environment and in `_STOP_SIGNALS`.

    For a library that sets them and does not put them back. Where the block raises, they are undone at once.
    """
    environment, handlers, undo = dict(os.environ), _read_handlers(), contextlib.ExitStack()
    done = False
    try:
        yield undo
        done = True
    finally:
        changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
        undo.callback(_restore_environment, {name: environment.get(name) for name in changed})
        undo.callback(_restore_handlers, handlers)
        if not done:
            undo.close()


def _restore_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Answer SIGTERM and Ctrl-C by `handler`; calling what is given makes them mean at once what they meant before.

    Only the main thread can do so: in another one nothing changes.
    """
    before = _read_handlers()
    for number in before:
        signal.signal(number, handler)
    with contextlib.ExitStack() as restore:
        restore.callback(_restore_handlers, before)
        yield restore.close


@contextlib.contextmanager
def quiet_threads(package: str) -> Iterator[None]:
    """Print no traceback of an error that ends a thread of a package, which raises it to its caller too."""
    before = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith(f"{package}."):
            before(args)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def _read_handlers() -> dict[int, Callable[[int, FrameType | None], object] | int]:
    """The handlers that this thread can restore: none but in the main thread, or where C code has set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}


def _restore_handlers(handlers: Mapping[int, Callable[[int, FrameType | None], object] | int]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
