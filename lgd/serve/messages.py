"""Messages of errors for those who ask over HTTP: no path of this machine is in them."""

import re
from collections.abc import Mapping

from lgd.base.errors import ConfigError, DataError
from lgd.base.text import escape_text

SEE_LOG = "this cannot be answered: see the log of the service"
# A url or a path; what follows GET and POST is one of the service's own.
_PATH = re.compile(r"[a-z0-9]+://|(?<![\w.])(?<!GET )(?<!POST )/\w|\.\.?/|/[^\s/]+/[^\s/]+/")
_LONGEST = 1000


def explain(error: ConfigError | DataError, names: Mapping[str, str], *, by_parameters: bool = True) -> str:
    """The message of an error, of which each path among `names` is shown by its name, and options as parameters, where
    those of a url are meant.
    """
    message = str(error.args[0] if error.args else error)
    for path, name in sorted(names.items(), key=lambda one: -len(one[0])):
        message = message.replace(path, name) if path else message
    if _PATH.search(message):
        return SEE_LOG
    # An image of a request lies in no folder from which it could be taken.
    message = message.replace("convert or remove it", "convert it")
    if by_parameters:
        message = message.replace("--mpp ", "mpp=").replace("--", "")
    return escape_text(message, _LONGEST)
