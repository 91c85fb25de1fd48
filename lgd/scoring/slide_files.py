"""The tiles of a slide as files that other tools read, written part by part.

    tiles.csv          x, y, side (level-0 pixels), tissue (share), the label, grade, a column a class, label_set, notes
                       and error; of an ordinal `grade` is the expected number of the class
    patches.geojson    for QuPath: the outline of the tissue as a locked annotation, and the tiles with their label,
                       its colour, and probabilities as measurements
    features.h5        in TRIDENT's layout, for CLAM, STAMP and other slide models: `features` (n, D) float32, those of
                       the student's morphology, and `coords` (n, 2) int64; tiles that could not be read are left out

Shapes: n tiles, K numbers of an answer, D of the features, H and W of the mask.
"""

import contextlib
import io
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lgd.io.files import publish
from lgd.io.location import Location
from lgd.io.tables import write_csv
from lgd.models.description import StudentConfig
from lgd.scoring.colours import NO_ANSWER, colour_grades, find_ends, grade_answers
from lgd.scoring.label_sets import format_set, read_set
from lgd.scoring.predict import read_answer
from lgd.scoring.slide_parts import read_parts
from lgd.scoring.slide_plan import PlanArrays, SlidePlan
from lgd.scoring.tile_table import list_columns

if TYPE_CHECKING:
    import h5py

_METADATA = 65_536
"""Bytes that HDF5 takes for itself, at most."""
_DIGITS = 6
_TISSUE = {"name": "Tissue", "color": [0, 120, 0]}


class Row(NamedTuple):
    """A tile and what a network says of it."""

    number: int
    x: int
    y: int
    tissue: float
    output_K: np.ndarray
    label: str | float | None
    grade: float | None
    colour: tuple[int, ...]
    note: str
    error: str


class ScoredSlide(NamedTuple):
    """A slide of which all parts are there."""

    folder: Location
    plan: SlidePlan
    arrays: PlanArrays
    config: StudentConfig

    def read_rows(self) -> Iterator[Row]:
        """The tiles in the order of the plan; one part is in memory at a time."""
        target, ends, number = self.config.training.target, find_ends(self.config.training), 0
        for part in read_parts(self.folder, self.plan):
            output_nK = part.output_nK.astype(np.float64)
            grade_n = grade_answers(target, output_nK)
            colour_n3 = colour_grades(target, grade_n, ends)
            for row, output_K in enumerate(output_nK):
                yield Row(
                    number=number,
                    x=int(self.arrays.xy_n2[number, 0]),
                    y=int(self.arrays.xy_n2[number, 1]),
                    tissue=float(self.arrays.tissue_n[number]),
                    output_K=output_K,
                    label=read_answer(target, output_K)[0],
                    grade=_round(grade_n[row]),
                    colour=tuple(colour_n3[row].tolist()),
                    note=part.note_n[row].decode(errors="replace"),
                    error=part.error_n[row].decode(errors="replace"),
                )
                number += 1


def _round(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def write_tiles(slide: ScoredSlide, path: Location) -> None:
    """Write tiles.csv."""
    target, conformal = slide.config.training.target, slide.config.conformal

    def list_cells() -> Iterator[list[object]]:
        for row in slide.read_rows():
            label = _round(row.label) if isinstance(row.label, float) else row.label
            cells: list[object] = [row.x, row.y, slide.plan.side, _round(row.tissue), label]
            if not target.is_number:
                cells += [row.grade, *map(_round, row.output_K.tolist())]
            label_set = read_set(conformal, target, row.output_K, "patch")
            yield [*cells, format_set(target, label_set), row.note, row.error]

    with publish(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, list_columns(target), list_cells())


def write_geojson(slide: ScoredSlide, path: Location) -> None:
    """Write patches.geojson, a feature a line."""
    with publish(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for number, feature in enumerate(_list_features(slide)):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(feature, separators=(",", ":"), allow_nan=False))
        file.write("\n]}\n")


def _list_features(slide: ScoredSlide) -> Iterator[dict[str, object]]:
    name, side, target = slide.plan.inputs.sha256, slide.plan.side, slide.config.training.target
    for number, rings in enumerate(outline_tissue(slide.arrays.mask_HW, slide.plan)):
        properties = {"objectType": "annotation", "name": "tissue", "classification": _TISSUE, "isLocked": True}
        yield _as_feature(f"{name}/tissue/{number}", rings, properties)
    for row in slide.read_rows():
        corners = [(0, 0), (side, 0), (side, side), (0, side), (0, 0)]
        square = [[[row.x + x, row.y + y] for x, y in corners]]
        label = target.label_word if isinstance(row.label, float) else row.label
        measured = dict(zip(target.classes or (target.label_word,), map(_round, row.output_K), strict=True))
        if not target.is_number:
            measured["grade"] = row.grade
        measured["tissue"] = _round(row.tissue)
        colour = list(row.colour if row.label is not None else NO_ANSWER)
        properties = {
            "objectType": "tile",
            "classification": {"name": label or "no answer", "color": colour},
            "measurements": {name: value for name, value in measured.items() if value is not None},
        }
        yield _as_feature(f"{name}/{row.x}/{row.y}", square, properties)


def _as_feature(name: str, rings: list[list[list[int]]], properties: Mapping[str, object]) -> dict[str, object]:
    geometry = {"type": "Polygon", "coordinates": rings}
    # The same in every run, so that what a person adds to it in QuPath can be joined again.
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lgd:{name}"))
    return {"type": "Feature", "id": identity, "geometry": geometry, "properties": properties}


def outline_tissue(mask_HW: np.ndarray, plan: SlidePlan) -> Iterator[list[list[list[int]]]]:
    """The polygons around a mask, each a ring and those of its holes, closed, in level-0 pixels."""
    from contourpy import FillType, contour_generator

    step = plan.mask_mpp / plan.inputs.mpp
    # Of the centres of pixels; a frame of glass closes what touches the edge.
    padded_HW = np.pad(mask_HW, 1).astype(np.float32)
    contours = contour_generator(z=padded_HW, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    for point_n2, offset in zip(contours[0], contours[1], strict=True):
        place_n2 = ((np.asarray(point_n2, float) - 0.5) * step).clip(0, (plan.width, plan.height)).round().astype(int)
        yield [place_n2[start:stop].tolist() for start, stop in itertools.pairwise(np.asarray(offset).tolist())]


def write_features(slide: ScoredSlide, path: Location) -> None:
    """Write features.h5."""
    plan = slide.plan
    read_n = np.concatenate([part.error_n == b"" for part in read_parts(slide.folder, plan)])
    rows, dim = int(read_n.sum()), next(read_parts(slide.folder, plan)).features_nD.shape[1]
    with publish_hdf5(path, rows * (4 * dim + 16)) as file:
        features, row = file.create_dataset("features", (rows, dim), np.float32), 0
        for part in read_parts(slide.folder, plan):
            some_nD = part.features_nD[part.error_n == b""]
            features[row : row + len(some_nD)] = some_nD
            row += len(some_nD)
        coords = file.create_dataset("coords", data=slide.arrays.xy_n2[read_n])
        features.attrs.update({"name": plan.slide, "encoder": "lgd", "savetodir": str(path.parent)})
        coords.attrs.update(_describe_tiles(plan, str(path.parent)))
        file.attrs.update(describe_network(slide.config) | {"centred": False})


def describe_network(config: StudentConfig) -> dict[str, str]:
    """Attributes of a file of its numbers."""
    licence, weights = config.licence or "None", config.weights_sha256
    return {"encoder": f"lgd {config.method}", "licence": licence, "weights_sha256": weights}


def _describe_tiles(plan: SlidePlan, folder: str) -> dict[str, object]:
    """As TRIDENT has it; the magnification is not known, and is never guessed from the scale."""
    return {
        "name": plan.slide,
        "savetodir": folder,
        "patch_size": plan.inputs.pixels,
        "patch_size_level0": plan.side,
        "overlap": 0,
        "level0_width": plan.width,
        "level0_height": plan.height,
        "mpp": plan.inputs.tile_mpp,
        "level0_mpp": plan.inputs.mpp,
    }


@contextlib.contextmanager
def publish_hdf5(path: Location, size: int) -> "Iterator[h5py.File]":
    """An empty HDF5 file to write datasets of so many bytes to, which becomes `path`."""
    import h5py

    with publish(path) as temporary:
        with h5py.File(path.name, "w", driver="core", backing_store=False) as empty:
            empty.flush()
            temporary.write_bytes(empty.id.get_file_image())
        # HDF5 2.0 crashes some time after it has met a full disk: it may only write where there is room for sure.
        with temporary.open("r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), reserved.seek(0, io.SEEK_END), size + _METADATA)
        with h5py.File(temporary, "r+") as file:
            yield file
            used = file.id.get_filesize()
        os.truncate(temporary, used)
