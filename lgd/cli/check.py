"""What lies in a folder or at a url, and everything that is wrong with it: `lgd verify`."""

from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

from lgd.base.errors import ConfigError, DataError
from lgd.config_files import is_run, load_config
from lgd.io.files import exists, peek_kind
from lgd.io.location import Location, as_location

Kind = Literal["shard folder", "feature store", "checkpoint", "teacher", "student", "run"]

_DOCUMENTS: dict[str, Kind] = {
    "store.json": "feature store",
    "manifest.json": "shard folder",
    "state.json": "checkpoint",
}


class Checked(NamedTuple):
    """What a check came to."""

    kind: Kind
    problems: list[str]
    notes: list[str]
    """What else to say."""


def find_kind(folder: Location) -> Kind:
    """What lies in a folder or at a url, by the document that each kind has.

    Raises `DataError` for a folder of something else, and for what is no folder.
    """
    for name, kind in _DOCUMENTS.items():
        if exists(folder / name):
            return kind
    if is_run(folder):
        return "run"
    if exists(folder / "config.json"):
        from lgd.models.description import TeacherConfig, read_kind

        return "teacher" if read_kind(folder / "config.json") is TeacherConfig else "student"
    if (lies := peek_kind(folder, "folder")) != "folder":
        raise DataError(f"{folder} is a file: name the folder that it lies in" if lies else f"{folder} does not exist")
    raise DataError(
        f"{folder} is no shard folder (manifest.json), no feature store (store.json), no checkpoint (state.json), no "
        "trained network (config.json) and no run (run.json)"
    )


def check(folder: Location, reencode: int = 0, teacher: str = "", code: Collection[str] = ()) -> Checked:
    """Every problem of what lies in `folder`, and what else to say.

    `reencode`: rows of a store (or of a run's) whose teacher and targets are run again; `teacher`: where it is, if not
    where it was; `code`: what networks may run of code outside LGD. Raises `DataError` for a folder of something else,
    and `ConfigError` for `reencode` of anything but a store or a run.
    """
    kind = find_kind(folder)
    if reencode and kind not in ("feature store", "run"):
        raise ConfigError(f"--reencode is for feature stores, and {folder} is a {kind}")
    if kind == "feature store":
        return Checked(kind, *_check_store(folder, reencode, teacher, code))
    if kind == "shard folder":
        from lgd.shards.verify import verify

        return Checked(kind, verify(folder), [])
    if kind == "checkpoint":
        from lgd.train.checkpoint import problems

        return Checked(kind, problems(folder), [])
    if kind == "run":
        return Checked(kind, *_check_run(folder, reencode, teacher, code))
    return Checked(kind, _check_network(folder, kind, code), [])


def _check_store(folder: Location, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    from lgd.retrieval.search import index_folder
    from lgd.retrieval.search import problems as index_problems
    from lgd.store.store import Store

    store = Store(folder)
    problems = store.verify()
    if exists(index_folder(store) / "index.json"):
        problems += index_problems(store)
    if problems or not reencode:
        return problems, []
    from lgd.store.supervision import reencode as run_again

    return run_again(store, reencode, teacher, code=code)


def _check_network(folder: Location, kind: Kind, code: Collection[str]) -> list[str]:
    """Problems of a teacher or a student, which is built and given its weights, and of its checkpoints."""
    from lgd.models.methods import load_student
    from lgd.models.teacher import load_teacher
    from lgd.train import checkpoint

    load: Callable[[Location, Collection[str]], object] = load_teacher if kind == "teacher" else load_student
    problems = []
    try:
        load(folder, code)
    except DataError as error:
        problems.append(str(error))
    for path in checkpoint.complete(folder / "checkpoints"):
        problems += checkpoint.problems(path)
    return problems


def _check_run(folder: Location, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    """Problems of everything that a run's stages made, and of what they were made of."""
    problems, notes = [], []
    for path in list_folders(folder):
        try:
            kind = find_kind(path)
            found = check(path, reencode if kind == "feature store" else 0, teacher, code)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += found.problems
        state = f"{len(found.problems)} problem(s)" if found.problems else "no problems"
        notes += [*found.notes, f"{kind} {path}: {state}"]
    return problems, notes


def list_folders(folder: Location) -> Iterator[Location]:
    """Shards, teacher, store and networks of a run, each once."""
    from lgd.runs.folder import RunDocument

    config = load_config(folder / "config.yaml")
    stages = RunDocument.read(folder / "run.json").stages
    made = [stage.folder for name in ("train-teacher", "cache-latents", "train") for stage in stages.get(name, ())]
    for path in dict.fromkeys([*config.shard_dirs, *made]):
        yield as_location(path)
