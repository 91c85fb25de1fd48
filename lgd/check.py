"""What lies in a folder or at a url, and everything that is wrong with it: `lgd verify`."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from lgd.errors import ConfigError, DataError
from lgd.files import exists
from lgd.urls import place


def check(
    folder: Path, reencode: int = 0, teacher: str = "", code: Collection[str] = ()
) -> tuple[str, list[str], list[str]]:
    """What lies in `folder` (a shard folder, a feature store, a checkpoint, a network, a run), its problems, and what
    else to tell.

    `reencode`: rows of a store whose teacher and targets are run again; `teacher`: where it is, if not where it was;
    `code`: what networks may run of code outside LGD.
    Raises `DataError` for a folder of something else, and `ConfigError` for `reencode` of anything but a store.
    """
    if exists(folder / "store.json"):
        return "feature store", *_check_store(folder, reencode, teacher, code)
    if reencode:
        raise ConfigError(f"--reencode is for feature stores, and {folder} is none (store.json is missing)")
    if exists(folder / "manifest.json"):
        from lgd.data.verify import verify

        return "shard folder", verify(folder), []
    if exists(folder / "state.json"):
        from lgd.train.checkpoint import problems

        return "checkpoint", problems(folder), []
    if exists(folder / "run.json") or exists(folder / "config.yaml"):
        return "run", *_check_run(folder, code)
    if exists(folder / "config.json"):
        return _check_network(folder, code)
    raise DataError(
        f"{folder} is no shard folder (manifest.json), no feature store (store.json), no checkpoint (state.json), no "
        "trained network (config.json) and no run (run.json)"
    )


def _check_store(folder: Path, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    from lgd.store.latents import Store
    from lgd.store.search import index_folder
    from lgd.store.search import problems as index_problems

    store = Store(folder)
    problems = store.verify()
    if exists(index_folder(store) / "index.json"):
        problems += index_problems(store)
    if problems or not reencode:
        return problems, []
    from lgd.store.supervision import reencoded

    found = reencoded(store, reencode, teacher, code=code)
    told = [f"re-encoded {found.rows} rows, largest difference to what is stored:"]
    told += [
        f"  {name}: {numbers['absolute']:.2g}, {numbers['relative']:.2g} of the row's length (at most "
        f"{found.allowed[name]:.2g})"
        for name, numbers in found.differences.items()
    ]
    return found.problems(store), told


def _check_network(folder: Path, code: Collection[str]) -> tuple[str, list[str], list[str]]:
    """A teacher or a student, which is built and given its weights, and its checkpoints."""
    from lgd.models.description import TeacherConfig, read_kind
    from lgd.models.methods import load_student
    from lgd.models.teacher import load_teacher
    from lgd.train import checkpoint

    kind = read_kind(folder / "config.json")
    load: Callable[[Path, Collection[str]], object] = load_teacher if kind is TeacherConfig else load_student
    problems = []
    try:
        load(folder, code)
    except DataError as error:
        problems.append(str(error))
    for path in checkpoint.complete(folder / "checkpoints"):
        problems += checkpoint.problems(path)
    return "teacher" if kind is TeacherConfig else "student", problems, []


def _check_run(folder: Path, code: Collection[str]) -> tuple[list[str], list[str]]:
    """Everything that a run's stages made, and what they were made of."""
    problems, told = [], []
    for path in _folders_of_run(folder):
        try:
            what, found, _ = check(path, code=code)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += found
        told.append(f"{what} {path}: {f'{len(found)} problem(s)' if found else 'no problems'}")
    return problems, told


def _folders_of_run(folder: Path) -> Iterator[Path]:
    """Shards, teacher, store and networks of a run, each once."""
    from lgd.options import load_config
    from lgd.run_document import RunDocument

    config = load_config(folder / "config.yaml")
    stages = RunDocument.read(folder / "run.json").stages
    made = [stage.folder for name in ("train-teacher", "cache-latents", "train") for stage in stages.get(name, ())]
    for path in dict.fromkeys([*config.shard_dirs, *made]):
        yield place(path)
