"""Names in urls that mean nothing."""

from lgd.base.errors import DataError


class UnknownName(DataError):
    """There is no patch, slide, tile or overlay of this name."""
