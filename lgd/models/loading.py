"""A finished student, read again from its folder."""

from collections.abc import Collection

from lgd.base.errors import DataError
from lgd.base.extensions import is_python
from lgd.io.location import Location
from lgd.models.description import StudentConfig
from lgd.models.encoder import Encoder
from lgd.models.export import load_weights
from lgd.models.methods import METHODS, find_method
from lgd.models.query_map import QueryMap
from lgd.models.student import HallucinatingStudent, Sizes, Student


def student_from(config: StudentConfig) -> Student:
    """A student of the shape that `Student.describe` gave, with all tensors of a finished one."""
    spec, name = config.hallucination, config.method
    if name not in METHODS and not is_python(name):
        raise DataError(f"field method is {name!r:.120}, which this version of lgd lacks")
    student = find_method(name).network(
        morphology=Encoder(config.morphology),
        hallucination=None if spec is None else Encoder(spec),
        target=config.training.target,
        **{name: getattr(config, name) for name in Sizes.__annotations__ if name != "target"},
    )
    if isinstance(student, HallucinatingStudent):
        student.query_map = QueryMap(student.streams, sum(student.dims))
    return student


def load_student(folder: str | Location, code: Collection[str] = ()) -> tuple[Student, StudentConfig]:
    """The student of a folder in evaluation mode, and its `config.json`.

    Raises `DataError` for what cannot be read, and for code that it names and `code`, what the user named, lacks.
    """
    config = StudentConfig.read_folder(folder)
    return load_weights(folder, lambda: student_from(config), config, code).eval(), config
