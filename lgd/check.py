"""What lies in a folder or at a url, and everything that is wrong with it: `lgd verify`."""

from pathlib import Path

from lgd.errors import ConfigError, DataError
from lgd.files import exists
from lgd.progress import progress


def check(folder: Path, reencode: int = 0, teacher: str = "") -> tuple[str, list[str], list[str]]:
    """What lies in `folder` (a shard folder, a feature store, a checkpoint), its problems, and what else to tell.

    `reencode`: rows of a store whose teacher and targets are run again; `teacher`: where it is, if not where it was.
    Raises `DataError` for a folder of something else, and `ConfigError` for `reencode` of anything but a store.
    """
    if exists(folder / "store.json"):
        return "feature store", *_check_store(folder, reencode, teacher)
    if reencode:
        raise ConfigError(f"--reencode is for feature stores, and {folder} is none (store.json is missing)")
    if exists(folder / "manifest.json"):
        from lgd.data.verify import verify

        return "shard folder", verify(folder), []
    if exists(folder / "state.json"):
        from lgd.train.checkpoint import problems

        return "checkpoint", problems(folder), []
    raise DataError(
        f"{folder} is no shard folder (manifest.json), no feature store (store.json) and no checkpoint (state.json)"
    )


def _check_store(folder: Path, reencode: int, teacher: str) -> tuple[list[str], list[str]]:
    from lgd.store.latents import Store
    from lgd.store.search import index_folder
    from lgd.store.search import problems as index_problems

    store = Store(folder)
    with progress(store.rows, "verify", "rows") as bar:
        problems = store.verify(bar.update)
    if exists(index_folder(store) / "index.json"):
        problems += index_problems(store)
    if problems or not reencode:
        return problems, []
    from lgd.store.supervision import reencoded

    found = reencoded(store, reencode, teacher)
    told = [f"re-encoded {found.rows} rows, largest difference to what is stored:"]
    told += [
        f"  {name}: {numbers['absolute']:.2g}, {numbers['relative']:.2g} of the row's length (at most "
        f"{found.allowed[name]:.2g})"
        for name, numbers in found.differences.items()
    ]
    return found.problems(store), told
