"""Grids of nuclei and of the second stain that a student predicts from H&E, beside those measured on the images.

Shapes: g cells of a grid a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lgd.io.location import Location
from lgd.metrics import Floats
from lgd.models.grids import CHANNELS_BY_NAME, GridChannel
from lgd.report.figures import Image, draw_scale_bar, new_figure, save_figure
from lgd.scoring.predict import Scorer
from lgd.shards.archive import Shard
from lgd.store.store import Store
from lgd.stream.reader import Reader

if TYPE_CHECKING:
    from lgd.report.figures import Axes

MOST_PATCHES = 4
_SIDE = 300
"""Pixels of a patch that is shown."""
_FADED = 0.45
"""How much is left of an image below its grid."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GridPatch:
    """A patch with its grids, each float64 (g, g, channels) by its dataset."""

    title: str
    he: Image
    ihc: Image
    mpp: float | None
    """Micrometres per pixel of the images as they are shown."""
    measured: Mapping[str, Floats]
    predicted: Mapping[str, Floats]


def read_grid_patches(
    scorer: Scorer,
    store: Store,
    shards: Sequence[Shard],
    numbers: Sequence[int],
    titles: Sequence[str],
    taught: Sequence[str],
) -> list[GridPatch]:
    """Patches by their numbers among the shards, with the grids that the student was taught.

    Patches of which the store has no grid are left out, and all of a student that predicts none.
    """
    with_parts = [shard for shard in store.with_latents(shards) if "ihc" in shard.roles]
    parts = {shard.sha256: part for shard, part in zip(with_parts, store.parts_of(with_parts), strict=True)}
    metas, patches = Reader(shards, ()), list[GridPatch]()
    for number, title in zip(numbers, titles, strict=True):
        sample = metas.read(number)
        shard, row = shards[sample.shard], sample.row
        if shard.sha256 not in parts:
            continue
        part = parts[shard.sha256]
        he_HW3 = Reader([shard], ("he",), scorer.config.size).read(row).images["he"]
        predicted = scorer.score(he_HW3[None], grids=True)
        measured = {name: part.array(name)[row] for name in taught if name in predicted and name in part.layout}
        if not measured:
            continue
        images = Reader([shard], ("he", "ihc"), _SIDE).read(row).images
        patches.append(
            GridPatch(
                title=title,
                he=images["he"],
                ihc=images["ihc"],
                mpp=sample.meta.mpp and sample.meta.mpp * sample.meta.width / _SIDE,
                measured={name: _as_channels(one) for name, one in measured.items()},
                predicted={name: _as_channels(predicted[name][0]) for name in measured},
            )
        )
    return patches


def _as_channels(grid: np.ndarray) -> Floats:
    return grid.astype(np.float64).reshape(*grid.shape[:2], -1)


def draw_grids(patches: Sequence[GridPatch], path: str | Location) -> None:
    """Two rows a patch: measured above predicted, over the faded H&E (nuclei) or IHC (all others).

    A cell's square has the area and the colour of its value, on one scale for all patches.
    """
    kinds = [kind for kind in CHANNELS_BY_NAME.values() if kind.dataset in patches[0].measured]
    # A share is shown as such, and all else up to the largest value there is.
    most = {kind: _largest(patches, kind) if kind.unit else 1.0 for kind in kinds}
    columns = 1 + len(kinds)
    # All panels of a row have room for the title.
    figure = new_figure(2.35 * columns, 4.9 * len(patches) + 0.9)
    grid = figure.subplots(2 * len(patches), columns, squeeze=False)
    for number, patch in enumerate(patches):
        above, below = grid[2 * number : 2 * number + 2]
        for axes, image, name in ((above[0], patch.he, "H&E"), (below[0], patch.ihc, "IHC")):
            _draw_image(axes, image, patch.mpp)
            axes.set_ylabel(name, fontsize=9)
        above[0].set_title(patch.title, fontsize=8.5, loc="left")
        for column, kind in enumerate(kinds, 1):
            above[column].set_title(" ", fontsize=8.5)
            for axes, grids, name in (
                (above[column], patch.measured, "measured"),
                (below[column], patch.predicted, "predicted from H&E"),
            ):
                image = patch.he if kind.dataset == "nuclei" else patch.ihc
                grey_HW = 255 - _FADED * (255 - image.mean(axis=2))
                _draw_image(axes, np.repeat(grey_HW.astype(np.uint8)[..., None], 3, axis=2), None)
                _draw_cells(axes, grids[kind.dataset][..., kind.channel], most[kind], image.shape[0])
                axes.set_ylabel(name, fontsize=8)
    for column, kind in enumerate(kinds, 1):
        shown = grid[0, column].images[-1]
        bar = figure.colorbar(shown, ax=grid[:, column], location="bottom", fraction=0.04, pad=0.01, aspect=14)
        bar.set_label(kind.label, fontsize=8.5)
        bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


def _largest(patches: Sequence[GridPatch], kind: GridChannel) -> float:
    values = [
        float(grids[kind.dataset][..., kind.channel].max())
        for patch in patches
        for grids in (patch.measured, patch.predicted)
    ]
    return max(*values, 1e-3)


def _draw_image(axes: "Axes", image: Image, mpp: float | None) -> None:
    axes.imshow(image)
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    draw_scale_bar(axes, image.shape[1], image.shape[0], mpp)


def _draw_cells(axes: "Axes", value_gg: Floats, most: float, side: int) -> None:
    """A square in the middle of each cell, up to nine tenths as wide."""
    canvas = np.full((side, side), np.nan)
    cell = side / len(value_gg)
    for (row, column), value in np.ndenumerate(value_gg):
        half = 0.45 * cell * np.sqrt(min(max(value, 0.0) / most, 1.0))
        top, bottom, left, right = (
            round((number + 0.5) * cell + sign * half) for number in (row, column) for sign in (-1, 1)
        )
        canvas[top:bottom, left:right] = value
    axes.imshow(canvas, cmap="viridis_r", vmin=0, vmax=most, interpolation="nearest")
