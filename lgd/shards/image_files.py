"""Which files of a folder are images: one rule for `predict`, `query` and `build-shards`.

A file is an image when its name or its content is that of one. What systems leave in folders is nobody's, and an image
with a hidden name, or in a hidden folder, is a copy that some viewer keeps: it is counted and not taken.
"""

from typing import NamedTuple

from lgd.base.errors import DataError
from lgd.io.files import Kind, peek_kind, read_first_bytes
from lgd.io.folders import walk_files
from lgd.io.location import Location
from lgd.shards.image import FIRST_BYTES, kind

_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .jif .webp .tif .tiff .btf .tf8 .bmp .dib .jp2 .j2k .j2c .jpc .jpx .jpf".split()
)


class FolderImages(NamedTuple):
    """What a folder holds, as far as images go; each list in the order of `walk_files`."""

    images: list[Location]
    """By name or by content; among them links to nowhere and folders that cannot be listed: reading says so."""
    others: list[Location]
    """What is no image."""
    hidden: list[Location]
    """What is named like an image, and hidden or in a hidden folder."""


def has_image_name(name: str) -> bool:
    """Whether a file is called like an image, hidden or not."""
    return name.lower().endswith(_SUFFIXES)


def is_image(path: Location, lies: Kind) -> bool:
    """Whether what is not hidden is an image, by name or by content; `lies` is what `list_folder` says of it."""
    try:
        if has_image_name(path.name):
            # A pipe would be waited for; a link to nowhere is reported as an image that cannot be read.
            return lies == "file" or (lies == "other" and peek_kind(path, lies) is None)
        return lies == "file" and kind(read_first_bytes(path, FIRST_BYTES)) is not None
    except (OSError, DataError):
        return has_image_name(path.name)


def list_images(folder: Location) -> FolderImages:
    """The images of a folder, in any depth and through links; each folder is entered once, however many links it has.

    Raises `RemoteError` for a url that cannot be listed.
    """
    found = FolderImages([], [], [])
    for path, lies, hidden in walk_files(folder):
        if hidden:
            found.hidden.extend([path] if has_image_name(path.name) else [])
        else:
            # Of folders only those come that cannot be listed.
            (found.images if lies == "folder" or is_image(path, lies) else found.others).append(path)
    return found
