"""What a person watches while lgd works: log lines and bars of progress, on standard error.

Modules write to `logging.getLogger(__name__)`, so a program that imports lgd can route and silence all of it, and sees
nothing unless it asks. The command line asks by `show_logs`. A worker process of Ray sends its records and its bars to
the driver (`send_logs`), which takes them up as its own (`receive_logs`).
"""

import contextlib
import functools
import io
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener
from typing import TYPE_CHECKING, Any, ClassVar

from lgd.base.text import escape_text, print_lines

if TYPE_CHECKING:
    from tqdm import tqdm

LOGGER = logging.getLogger("lgd")
"""The parent of each module's logger."""
logger = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two lines of progress in a log, and before the first."""
_SENT_EVERY = 0.5
"""Seconds between two states of a bar that a worker sends."""

_NOISE = (
    # Pillow, of 89 to 100 megapixels, which `lgd.shards.image` allows.
    (RuntimeWarning, r"Image size \(\d+ pixels\) exceeds limit"),
    # Pillow, of broken directories of EXIF and TIFF: what counts is whether the pixels are whole.
    (
        UserWarning,
        "Tag data larger than file|Corrupt EXIF data|Truncated File Read|Image appears to be a malformed MPO",
    ),
    # DDP: the strides of a 1x1 kernel's gradient are another name of the same order.
    (UserWarning, "Grad strides do not match bucket view strides"),
    # NCCL: each rank has made its GPU the current one.
    (UserWarning, r"barrier\(\): using the device under current context"),
    # DeepSpeed's ZeRO stage 3 calls functions that PyTorch 2.13 renames.
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
    # Its export to ONNX copies trees by a class that it renames.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
)
"""Warnings of other libraries that no user of the command line can act upon."""
_NOISY = ("DeepSpeed", "torch.onnx._internal.exporter._registration")
"""Loggers of which errors alone are shown; the second one misses torchvision, which LGD does without."""


class LineHandler(logging.Handler):
    """Writes each record as one escaped line to standard error, above any live bar of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            # Without an import: the one that draws a bar has imported it.
            tqdm = sys.modules.get("tqdm") if sys.stderr.isatty() else None
            with tqdm.tqdm.external_write_mode(sys.stderr) if tqdm else contextlib.nullcontext():
                print_lines(f"{record.name}: {line}" if record.levelno < logging.INFO else line, file=sys.stderr)
        except Exception:  # noqa: BLE001 - as each handler of `logging`: work goes on without its messages
            self.handleError(record)


@contextlib.contextmanager
def show_logs(level: int) -> Iterator[None]:
    """Print what lgd logs from `level` on to standard error; bars of progress too, where it includes INFO.

    At DEBUG the lines of other libraries are left as they are, else only their errors are shown.
    """
    with _attached(LineHandler(), level), contextlib.nullcontext() if level <= logging.DEBUG else _quiet_libraries():
        yield


@contextlib.contextmanager
def _attached(handler: logging.Handler, level: int) -> Iterator[None]:
    """Have one handler take all that lgd logs from `level` on, and no other."""
    before = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    # The root's handlers are those of other libraries: with them each line would appear twice.
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
        handler.close()


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without `_NOISE`, and of some libraries errors only. What Ray and its workers say stays in Ray's own files."""
    # Filters, because they set their levels when they are imported; DeepSpeed also writes to standard output.
    noisy = [*map(logging.getLogger, _NOISY)]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for one in noisy:
        one.addFilter(is_error)
    try:
        with warnings.catch_warnings():
            for category, message in _NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for one in noisy:
            one.removeFilter(is_error)


@dataclass(frozen=True, kw_only=True, slots=True)
class BarState:
    """How far a worker's bar is."""

    desc: str
    total: int
    unit: str
    start: int
    done: int
    postfix: str
    closed: bool


def progress(total: int, desc: str, unit: str, done: int = 0) -> "tqdm":
    """A bar of progress (tqdm) with rate and time left.

    On the command line's terminal it is drawn on standard error; in a worker it is sent to the driver, which draws it;
    else it is logged as a line now and then. `done`: how much was done before.
    """
    # Each update looks at the clock: otherwise tqdm needs a thread of its own to notice that a stage has become slow.
    options: dict[str, object] = {"total": total, "desc": escape_text(desc), "unit": f" {unit}", "initial": done}
    options |= {"miniters": 1, "ncols": 0, "file": io.StringIO()}
    drawn, logged = _bar_classes()
    if any(isinstance(handler, QueueHandler) for handler in LOGGER.handlers):
        return logged(**options, mininterval=_SENT_EVERY)
    shown = any(isinstance(handler, LineHandler) for handler in LOGGER.handlers) and logger.isEnabledFor(logging.INFO)
    if shown and sys.stderr.isatty():
        return drawn(**options | {"ncols": None, "file": sys.stderr})
    return logged(**options, mininterval=EVERY, delay=EVERY)


@functools.cache
def _bar_classes() -> tuple[type, type]:
    """The bar that is drawn, and that which is logged, from where a driver may draw it."""
    from tqdm import tqdm

    class Drawn(tqdm):  # type: ignore[misc]
        """tqdm starts a thread for every class of bars, which nothing ends."""

        monitor_interval = 0

    class Logged(Drawn):
        """Takes no line of the terminal from drawn bars.

        And it has a lock of its own: handlers of `logging` hold theirs while they wait for that of the drawn bars.
        """

        _instances: ClassVar = weakref.WeakSet[tqdm]()

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            state = BarState(
                desc=self.desc,
                total=self.total,
                unit=self.unit.strip(),
                start=self.initial,
                done=self.n,
                postfix=self.postfix or "",
                closed=self.disable,
            )
            logger.info("%s", self, extra={"bar": state})

    Logged.set_lock(threading.RLock())
    return Drawn, Logged


def send_logs(queue: Any, level: int) -> contextlib.AbstractContextManager[None]:
    """In a worker: send what lgd logs from `level` on, and its bars, to a process that reads the queue."""
    return _attached(QueueHandler(queue), level)


@contextlib.contextmanager
def receive_logs(queue: Any, several: bool) -> Iterator[None]:
    """Log what workers send to the queue as if it were this process's own, and draw their bars.

    `several`: each worker may have a bar of the same name; otherwise that of a restarted worker replaces the lost one.
    """
    receiver = _Receiver(queue, several)
    receiver.start()
    try:
        yield
    finally:
        receiver.stop()
        for bar in receiver.bars.values():
            bar.close()


class _Receiver(QueueListener):
    """A thread that reads the queue."""

    def __init__(self, queue: Any, several: bool) -> None:
        super().__init__(queue)
        self.several = several
        self.bars: dict[tuple[str, int | None], tqdm] = {}

    def handle(self, record: logging.LogRecord) -> None:
        state: BarState | None = getattr(record, "bar", None)
        if state is None:
            logging.getLogger(record.name).handle(record)
            return
        key = state.desc, record.process if self.several else None
        if key in self.bars and state.start != self.bars[key].initial:
            self.bars.pop(key).close()
        if key not in self.bars:
            self.bars[key] = progress(state.total, state.desc, state.unit, state.start)
        bar = self.bars[key]
        bar.set_postfix_str(state.postfix, refresh=False)
        bar.update(state.done - bar.n)
        if state.closed:
            self.bars.pop(key).close()


@contextlib.contextmanager
def log_prints(logger: logging.Logger) -> Iterator[None]:
    """Log at DEBUG what a library prints to standard output, where only results may go."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            yield
        finally:
            for line in printed.getvalue().splitlines():
                logger.debug("%s", line)
