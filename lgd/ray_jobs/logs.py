"""Log records and bars of workers appear at the driver, by a queue on the cluster."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

from lgd.base.logs import LOGGER, receive_logs, send_logs

logger = logging.getLogger(__name__)


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
def collect_logs(several: bool) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """What a worker must enter to have its log records and bars appear here (`several`: see `receive_logs`)."""
    queue, level = _RecordQueue(), LOGGER.getEffectiveLevel()
    try:
        with receive_logs(queue, several):
            yield functools.partial(send_logs, queue, level)
    finally:
        queue.close()
