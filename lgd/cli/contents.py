"""What lies in a folder or at a url, and all that is wrong with it (`lgd verify`)."""

from collections.abc import Callable, Collection
from typing import Literal

from lgd.base.errors import ConfigError, DataError
from lgd.config_files import is_run, load_config
from lgd.io.files import exists, peek_kind
from lgd.io.location import Location, as_location
from lgd.models.description import TeacherConfig, read_kind
from lgd.retrieval import search
from lgd.runs.folder import RunDocument
from lgd.shards.verify import verify
from lgd.store import probe
from lgd.store.document import StoreDocument
from lgd.store.store import Store

Kind = Literal["shard folder", "feature store", "checkpoint", "teacher", "student", "run"]

_DOCUMENTS: dict[str, Kind] = {
    "store.json": "feature store",
    "manifest.json": "shard folder",
    "state.json": "checkpoint",
}


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
        return "teacher" if read_kind(folder / "config.json") is TeacherConfig else "student"
    if (lies := peek_kind(folder, "folder")) != "folder":
        raise DataError(f"{folder} is a file: name the folder that it lies in" if lies else f"{folder} does not exist")
    raise DataError(
        f"{folder} is no shard folder (manifest.json), no feature store (store.json), no checkpoint (state.json), no "
        "trained network (config.json) and no run (run.json)"
    )


def check(
    folder: Location, reencode: int = 0, teacher: str = "", code: Collection[str] = ()
) -> tuple[Kind, list[str], list[str]]:
    """What lies in `folder`, its every problem, and what else to say.

    `reencode`: rows of a store (or of a run's) whose teacher and targets are run again; `teacher`: where it is, if not
    where it was; `code`: what networks may run of code outside LGD. Raises `DataError` for a folder of something else,
    and `ConfigError` for `reencode` of anything but a store or a run.
    """
    kind = find_kind(folder)
    if reencode and kind not in ("feature store", "run"):
        raise ConfigError(f"--reencode is for feature stores, and {folder} is a {kind}")
    if kind == "feature store":
        return kind, *_check_store(folder, reencode, teacher, code)
    if kind == "run":
        return kind, *_check_run(folder, reencode, teacher, code)
    if kind == "shard folder":
        return kind, verify(folder), []
    if kind == "checkpoint":
        from lgd.train.checkpoint import problems

        return kind, problems(folder), []
    return kind, _check_network(folder, kind, code), []


def _check_store(folder: Location, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    document, notes = StoreDocument.read(folder / "store.json"), list[str]()
    stores = [Store(folder, teachers=(name,)) for name in document.teachers]
    problems = stores[0].verify()
    for store in stores:
        problems += probe.find_problems(store)
        if exists(search.index_folder(store) / "index.json"):
            problems += search.problems(store)
    if problems or not reencode:
        return problems, []
    from lgd.store.supervision import reencode as run_again

    # A folder that is named is that of one teacher.
    named = TeacherConfig.read_folder(teacher).weights_sha256 if teacher and len(stores) > 1 else ""
    for store in stores:
        own = teacher if named in ("", store.recipe.teacher.weights_sha256) else ""
        found, more = run_again(store, reencode, own, code=code)
        problems, notes = problems + found, notes + more
    return problems, notes


def _check_network(folder: Location, kind: Kind, code: Collection[str]) -> list[str]:
    """Problems of a teacher or a student, which is built and given its weights, and of its checkpoints."""
    from lgd.models.loading import load_student
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
    config = load_config(folder / "config.yaml")
    stages = RunDocument.read(folder / "run.json").stages
    made = [
        stage.folder
        for name in ("train-teacher", "cache-latents", "import-latents", "train")
        for stage in stages.get(name, ())
    ]
    for path in map(as_location, dict.fromkeys([*config.shard_dirs, *made])):
        try:
            kind, found, more = check(path, reencode if exists(path / "store.json") else 0, teacher, code)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += found
        notes += [*more, f"{kind} {path}: {f'{len(found)} problem(s)' if found else 'no problems'}"]
    return problems, notes
