"""One call of a remote store's client: tried again while its fault may pass, and one message where it lasts.

A fault may pass where no connection can be made or is lost, time runs out, a body is cut, or the status is 408, 425,
429 or most 5xx. Other answers may be stale, of a store that is consistent only after a while or of a proxy that signs
requests anew:

- 401 and 403 are believed at once where they are a store's first answer to this process, and may pass after that.
- 404 is believed at once, unless a document or the listing of its folder says that the file is there.
- The listing of a folder that is answered by 404 may pass: one without files is empty.

What may pass is tried for about a minute, with growing pauses, or as Retry-After says. One line in the log says so.
"""

import datetime
import email.utils
import functools
import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from lgd.base.errors import DataError
from lgd.io.location import FULL, HTTP, MissingError, RemoteError

if TYPE_CHECKING:
    from upath import UPath

Params = ParamSpec("Params")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_PATIENCE = 55.0
"""Seconds from the first try to the last; a stalled one takes up to 30 more."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.4, 8.0
_QUIET = 30.0
"""Seconds in which there is at most one line on waiting for a store."""
_TRIES_OF_S3FS = 2
"""Tries of each request by s3fs itself: a call may need many requests. Each may stall for 15 seconds."""

_KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
_PASSING = {408, 425, 429}
_LASTING = {501, 505, 507, 511}
_DENIED = {401, 403}
_ABSENT = {404, 410}
# Of status 400 or 409 at S3, also of an upload that was damaged on its way.
_PASSING_CODES = """
RequestTimeout BadDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch IncompleteBody OperationAborted
ConditionalRequestConflict Throttling ThrottlingException RequestThrottled RequestLimitExceeded
""".split()
_DENIED_CODES = {"ExpiredToken", "RequestTimeTooSkewed"}
_CLIENTS = {"aiohttp", "botocore", "gcsfs"}
_NETWORK = {"aiohttp", "urllib3", "requests", "http"}
_NETWORK_OF_BOTOCORE = re.compile("Connection|Connect|HTTPClient|Timeout|Incomplete|ResponseParser|Streaming|Checksum")
_NO_SUCH_HOST = re.compile("(?i)name or service not known|nodename nor servname|no address associated")

# Names of stores -> that one answered, and when a line said that it is waited for; urls of folders -> when a file that
# should be there was last given up.
_answered: set[str] = set()
_noted: dict[str, float] = {}
_lacking: dict[str, float] = {}


class Fault(NamedTuple):
    """What the error of a client library says."""

    error: BaseException
    status: int | None
    """Of HTTP, where there was an answer."""
    code: str
    """Of S3, such as SlowDown."""
    retry_after: float
    """Seconds."""

    @classmethod
    def of(cls, error: Exception) -> "Fault":
        """Examine an error, or its cause: fsspec calls errors of http a missing file, s3fs makes errors of the OS."""
        found: BaseException | None = error
        while found and _module(found) not in _CLIENTS:
            found = found.__cause__
        found = found or error
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            facts = answer.get("ResponseMetadata", {})
            status, headers = facts.get("HTTPStatusCode"), facts.get("HTTPHeaders", {})
            return cls(error, status, str(answer.get("Error", {}).get("Code", "")), _read_pause(headers))
        status = getattr(found, "code" if _module(found) == "gcsfs" else "status", None)
        headers = getattr(found, "headers", None) or {}
        return cls(found, status if isinstance(status, int) else None, "", _read_pause(headers))

    def may_pass(self, doing: str, answered: bool) -> bool:
        """Whether the same call may give something else in a moment; `answered`: the store has given something."""
        error, status = self.error, self.status
        if "bucket does not exist" in str(error) or isinstance(error, NotImplementedError):
            return False
        if self.code in _DENIED_CODES or status in _DENIED:
            return answered
        if self.code in _PASSING_CODES or status in _PASSING:
            return True
        if status is not None:
            # S3 answers so to nothing but reading; it says "no such bucket" otherwise.
            stale = status in _ABSENT and doing != "read" and bool(self.code)
            return stale or (status >= 500 and status not in _LASTING)
        if "certificate" in str(error).lower() or (not answered and _NO_SUCH_HOST.search(str(error))):
            return False
        if type(error) is ValueError:
            # Of a store that answered before it is an answer that was damaged on its way, otherwise an odd url.
            return answered
        if _module(error) in ("botocore", "aiobotocore"):
            return bool(_NETWORK_OF_BOTOCORE.search(type(error).__name__))
        return isinstance(error, TimeoutError | ConnectionError | EOFError) or (
            _module(error) in _NETWORK and not isinstance(error, ValueError)
        )

    def is_absent(self) -> bool:
        """Whether there is no such file."""
        missing = isinstance(self.error, FileNotFoundError) or self.status in _ABSENT
        return missing and "bucket does not exist" not in str(self.error)

    def describe(self) -> str:
        """Status, kind and text of the error, in one line."""
        text = " ".join(str(getattr(self.error, "message", "") or self.error).split())
        status = f"status {self.status}, " if self.status and str(self.status) not in text else ""
        return f"{status}{type(self.error).__name__}: {text}"


def call(
    url: "UPath", doing: str, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs
) -> Result:
    """Call a function of a url's file system; its errors become `RemoteError` or `MissingError`.

    `doing`: read, written, listed or removed. It must bear to be called again after any error.
    """
    return _call(url, doing, False, functools.partial(function, *args, **options))


def call_promised(
    url: "UPath", doing: str, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs
) -> Result:
    """`call` for a file that a document names: that it is missing may pass."""
    return _call(url, doing, True, functools.partial(function, *args, **options))


def _call(url: "UPath", doing: str, promised: bool, function: Callable[[], Result]) -> Result:
    store, folder = "/".join(str(url).split("/", 3)[:3]), str(url.parent)
    if url.protocol in ("s3", "s3a"):
        url.fs.retries = _TRIES_OF_S3FS
    end, pause = time.monotonic() + _PATIENCE, _FIRST_PAUSE
    for tries in itertools.count(1):
        try:
            result = function()
        except DataError:
            raise
        except Exception as error:  # The client libraries share no base class.
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            fault, now = Fault.of(error), time.monotonic()
            if fault.is_absent() and doing == "read":
                promised = promised or _is_listed(url)
                passes = promised and now - _lacking.get(folder, -_PATIENCE) >= _PATIENCE
                if promised and (not passes or now >= end):
                    # Where many are missing only the first is waited for.
                    _lacking[folder] = now
            else:
                passes = fault.may_pass(doing, store in _answered)
            if not passes or now >= end:
                raise _explain(url, doing, fault, tries) from error
            wait = min(max(pause * random.uniform(0.5, 1), fault.retry_after), end - now)
            _note_waiting(store, url, doing, fault)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            _answered.add(store)
            return result
    raise AssertionError


def upload(local: Path, url: "UPath") -> None:
    """Copy a local file to a url, where it appears when it is complete."""
    if url.protocol in HTTP:
        raise RemoteError(f"{url} cannot be written: http urls do not offer that: use s3://, gs:// or a local folder")
    call(url, "written", url.fs.put_file, str(local), url.path)


def _is_listed(url: "UPath") -> bool:
    """Whether the listing of its folder has a file that was said to be missing; one request for a store that lists.

    Names without a suffix are of folders, and may be the beginning of any number of others.
    """
    if url.protocol in HTTP or not url.suffix:
        return False
    found = call(url.parent, "listed", url.fs.find, url.parent.path, prefix=url.name)
    return url.path.strip("/") in (name.strip("/") for name in found)


def _note_waiting(store: str, url: "UPath", doing: str, fault: Fault) -> None:
    now = time.monotonic()
    if now - _noted.get(store, -_QUIET) >= _QUIET:
        _noted[store] = now
        reason = fault.describe()
        logger.warning("waiting for %s: %s cannot be %s now (%s): trying again for a minute", store, url, doing, reason)


def _read_pause(headers: Mapping[str, str]) -> float:
    """Seconds that Retry-After asks for, given as such or as a date; 0 without."""
    text = str(headers.get("Retry-After") or headers.get("retry-after") or "")
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date - datetime.datetime.now(date.tzinfo)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _explain(url: "UPath", doing: str, fault: Fault, tries: int) -> DataError:
    """What a client library's error means, with the remedy."""
    error, status = fault.error, fault.status
    scheme = {"s3a": "s3", "gcs": "gs"}.get(url.protocol, url.protocol)
    tried = f", tried {tries} times" if tries > 1 else ""
    problem = f"{url} cannot be {doing}"
    if "bucket does not exist" in str(error):
        return RemoteError(f"{problem}: its bucket does not exist: create it, or correct the url")
    if fault.is_absent() and (doing == "read" or not fault.code):
        return MissingError(f"{url} is missing{tried}: correct the url")
    denied = isinstance(error, PermissionError) or status in _DENIED
    if denied or re.search("Credentials|Profile", type(error).__name__):
        remedy = f"set {_KEYS[scheme]} for every process" if scheme in _KEYS else "ask its owner for access"
        return RemoteError(f"{problem}: access is denied ({error}{tried}): {remedy}")
    if isinstance(error, NotImplementedError) or status in (405, 501):
        return RemoteError(f"{problem}: {scheme} urls do not offer that: use s3://, gs:// or a local folder")
    address = " and AWS_ENDPOINT_URL" if scheme == "s3" else ""
    return RemoteError(f"{problem} ({fault.describe()}{tried}): check the url, the network{address}, and try again")
