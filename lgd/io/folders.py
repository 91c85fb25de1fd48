"""Whole folders that are written here and may have to appear at a url."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lgd.base.errors import DataError
from lgd.io.calls import upload
from lgd.io.files import Kind, exists, explain_write_errors, list_folder, remove, remove_folder, sync, temporary_path
from lgd.io.location import Location

# Of folders.
_SET_ASIDE = re.compile(r"\..*|thumb(nail)?s?", re.IGNORECASE | re.DOTALL)


def walk_files(folder: Location) -> Iterator[tuple[Location, Kind, bool]]:
    """All that lies in a folder, in any depth and through links, but for litter; and whether it is hidden.

    What lies in a folder of thumbnails counts as hidden.
    Folders that are not hidden come first, else in the order of their names. Each is entered once, though links may
    lead to it from several places, or back; one that cannot be listed comes itself.
    """
    entered: set[str] = set()
    shown: list[Location] = [folder]
    hidden: list[Location] = []
    while shown or hidden:
        is_hidden = not shown
        at = (hidden if is_hidden else shown).pop()
        true = os.path.realpath(at) if isinstance(at, Path) else str(at)
        if true in entered:
            continue
        entered.add(true)
        try:
            names = list_folder(at)
        except OSError:
            yield at, "folder", is_hidden
            continue
        below = [name for name, lies in names.items() if lies == "folder"]
        shown += [at / name for name in reversed(below) if not is_hidden and not _SET_ASIDE.fullmatch(name)]
        hidden += [at / name for name in reversed(below) if is_hidden or _SET_ASIDE.fullmatch(name)]
        for name, lies in names.items():
            if lies != "folder":
                yield at / name, lies, is_hidden or name.startswith(".")


@contextlib.contextmanager
def publish_folder(path: Location, mark: str) -> Iterator[Path]:
    """A local folder to fill, which becomes `path`, in place of a folder of that name if there is one.

    `mark`: the file whose appearance commits, where several files cannot appear at once: at a url it is the first to
    be removed and the last to be uploaded. On an error nothing appears.
    """
    if not isinstance(path, Path):
        with WorkingFolder(path) as working:
            yield working.path
            if exists(path / mark):
                discard_folder(path, mark)
            working.publish(last=mark)
        return
    temporary, old = temporary_path(path), path.with_name(f".{path.name}.old.tmp")
    try:
        with explain_write_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.replace(old)
            temporary.replace(path)
            sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard_folder(path: Location, mark: str) -> None:
    """Remove a folder, first the file that makes it complete, so that none is ever half removed."""
    remove(path / mark)
    remove_folder(path)


class WorkingFolder(contextlib.ExitStack):
    """A folder for what writes to no url: `path` is the local one itself, or one in TMPDIR, which goes at the end."""

    def __init__(self, folder: Location) -> None:
        super().__init__()
        self.folder = folder
        if isinstance(folder, Path):
            self.path = folder
        else:
            self.path = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="lgd-")))

    def publish(self, last: str = "") -> None:
        """Make every file that was written so far appear at the url, the one named `last` after all others."""
        if not isinstance(self.folder, Path):
            files = sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())
            for name in sorted(files, key=lambda name: name == last):
                upload(self.path / name, self.folder / name)


def refuse_foreign(folder: Location, own: Collection[str], remedy: str, names: Iterable[str] | None = None) -> None:
    """Raise `DataError` where a folder holds what is not among its `own`; `names` are those in it, if known."""
    names = list_folder(folder) if names is None else names
    # A killed `publish` leaves its temporary file.
    foreign = [name for name in names if name not in own and not re.fullmatch(r"\..*\.tmp", name)]
    if foreign:
        raise DataError(f"{folder} already holds something else ({', '.join(foreign[:3])}): {remedy}")


def list_local_sizes(folder: Location, names: Iterable[str] = ()) -> dict[str, int] | None:
    """Bytes of each file in a folder, by name; None at a url, whose files are checked when they are fetched.

    `names` should be there: what the listing lacks of them is asked for, since that of a network file system may lag.
    """
    if not isinstance(folder, Path):
        return None
    # One listing is quicker than asking for 2e5 files by name.
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    for name in names:
        if name not in sizes and (folder / name).is_file():
            with contextlib.suppress(OSError):
                sizes[name] = (folder / name).stat().st_size
    return sizes


def find_existing(path: Location) -> Path | None:
    """The nearest of a local path and the folders around it that exists; None at a url."""
    return next((one for one in (path, *path.parents) if one.exists()), None) if isinstance(path, Path) else None
