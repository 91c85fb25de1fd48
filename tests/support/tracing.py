"""What a call that is refused takes, to be asked in a process without other threads (fixture `alone`).

Before Python 3.12.9 and 3.13.2, `tracemalloc.stop` beside a thread that allocates without the GIL ends the process with
a segmentation fault.
"""

import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any


def refused(function: Callable[[Any], Any], argument: Any, taken: Any) -> tuple[str, float, int]:
    """Message of the `ValueError`, CPU seconds and peak bytes; before, one that is `taken` imports what is needed."""
    function(taken)
    assert threading.active_count() == 1, "tracemalloc is not safe beside other threads"
    tracemalloc.start()
    start, message = time.process_time(), None
    try:
        function(argument)
    except ValueError as error:
        message = str(error)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message is not None, f"{argument!r:.200} was taken"
    return message, seconds, peak
