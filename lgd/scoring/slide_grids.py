"""grids.h5: what a student predicts of nuclei and of the second stain in the cells of each tile of a slide.

    coords       (n, 2) int64: upper left corners of the tiles in level-0 pixels, as in tiles.csv
    nuclei       (n, g, g) float16: nuclei per 1,000 um2, in g x g cells of a tile, from its top left, row by row
    membrane     (n, k, k, 3) float16: DAB density, stained share, completeness of membranes; or
    positive     (n, k, k, 2) float16: share of positive nuclei, and their DAB density

Attributes: `side` of a tile in level-0 pixels, `mpp` of these; of a dataset `channels` and their `units`. A tile that
could not be read has NaN.

Shapes: n tiles, g and k cells a side.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.errors import DataError
from lgd.io.files import exists, read_bytes
from lgd.io.location import Location
from lgd.models.grids import CHANNELS_BY_NAME, GridChannel
from lgd.models.student import GRIDS
from lgd.scoring.slide_answer import TiledSlide
from lgd.scoring.slide_files import ScoredSlide, describe_network, publish_hdf5
from lgd.scoring.slide_parts import read_parts

if TYPE_CHECKING:
    import h5py

GRIDS_FILE = "grids.h5"


def write_grids(slide: ScoredSlide, path: Location) -> None:
    """Write grids.h5, unless the student predicts no grids."""
    plan, first = slide.plan, next(read_parts(slide.folder, slide.plan))
    shapes = {name: one.shape[1:] for name in GRIDS.values() if (one := getattr(first, name)).size}
    if not shapes:
        return
    cells = sum(int(np.prod(shape)) for shape in shapes.values())
    with publish_hdf5(path, plan.tiles * (2 * cells + 16)) as file:
        for name, shape in shapes.items():
            dataset, row = file.create_dataset(name, (plan.tiles, *shape), np.float16), 0
            for part in read_parts(slide.folder, plan):
                grid = getattr(part, name)
                dataset[row : row + len(grid)] = grid
                row += len(grid)
            channels = [one for one in CHANNELS_BY_NAME.values() if one.dataset == name]
            dataset.attrs["channels"] = [one.title for one in channels]
            dataset.attrs["units"] = [one.unit or "share" for one in channels]
        file.create_dataset("coords", data=slide.arrays.xy_n2)
        file.attrs.update(describe_network(slide.config))
        file.attrs.update({"name": plan.slide, "side": plan.side, "mpp": plan.inputs.mpp})


def read_sides(folder: Location) -> dict[str, int]:
    """The datasets of a slide's grids.h5, and the cells of each along a tile's side; nothing where there is no file."""
    if not exists(folder / GRIDS_FILE):
        return {}
    with _open_grids(folder) as file:
        return {name: file[name].shape[1] for name in GRIDS.values() if name in file}


def read_channel(folder: Location, channel: GridChannel) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the tiles, int64 (n, 2), and a channel of their cells, float16 (n, g, g).

    Raises `DataError` for a file that is damaged or lacks the channel.
    """
    with _open_grids(folder) as file:
        # Read whole: HDF5 takes long to pick one number in three.
        grid_n = file[channel.dataset][()]
        return file["coords"][()], grid_n if grid_n.ndim == 3 else grid_n[..., channel.channel]


@contextlib.contextmanager
def _open_grids(folder: Location) -> "Iterator[h5py.File]":
    import h5py

    path = folder / GRIDS_FILE
    try:
        with io.BytesIO(read_bytes(path)) as content, h5py.File(content, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read ({str(error)[:200]}): {TiledSlide.REMEDY}") from error
