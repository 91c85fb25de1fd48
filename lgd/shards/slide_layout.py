"""Two slides of one tissue -> squares of both, which become pairs of patches: the layout `slides`.

Nothing is stored but places: the pixels are read from the slides when a pair is checked, and when it is written.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lgd.base.environment import count_cpus
from lgd.base.errors import DataError
from lgd.base.logs import progress
from lgd.base.threads import in_threads
from lgd.io.location import Location, relative_name
from lgd.io.tables import read_csv
from lgd.shards.candidate import Candidate, Layout, Problem, is_csv, read_row, safe_key
from lgd.shards.region import Region
from lgd.slides.affine import Affine, read_affine
from lgd.slides.alignment import COARSEST
from lgd.slides.slide import Slide, open_slide
from lgd.slides.source import SAME, is_same
from lgd.slides.tiles import Tiles, lay_tiles
from lgd.slides.tissue_mask import Tissue, find_tissue

COLUMNS = ("he", "ihc", "transform", "label", "level", "slide", "split", "mpp", "marker", "center", "scanner")
"""Those of a CSV of slides."""
_LEAST_TISSUE = 0.5
_MOST_ENLARGED = 1.15
_OTHER_SCALE = 1.2
"""Ratio from which the scale of a transform contradicts those of the slides: sections shrink by a few per cent."""
_MOST_THREADS = 4  # each holds the masks of two slides

logger = logging.getLogger(__name__)


class SlidePair(NamedTuple):
    """A row of the CSV."""

    candidate: Candidate
    """The two slides; its stem is their name, and its mpp that of the H&E's level 0, where the CSV gives it."""
    affine: Affine | None


class Slides(Layout):
    """A folder with `slides.csv`, or the CSV itself: a row for each H&E slide and the IHC slide of the same tissue.

    Columns he and ihc (relative to the CSV) and, as you have them, transform (`lgd.slides.affine`, from level-0 pixels
    of the H&E to those of the IHC; empty where both have one frame), label, slide, split, mpp (of level 0), marker,
    center and scanner. Each side of the split has whole slides.
    """

    takes_csv = True
    labels_slides = True
    caveats = (
        "The two stains are slides that were registered by a program, whose errors a score of alignment finds only in "
        "part: pairs that it called misaligned were left out.",
    )

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        base, path = (root.parent, root) if is_csv(root) else (root, root / "slides.csv")
        pairs = []
        for number, row in read_csv(path, required=("he", "ihc"), allowed=COLUMNS):
            try:
                pairs.append(_read_pair(base, row, self))
            except DataError as error:
                yield Problem(f"{path.name} row {number}", str(error), "", row["he"], row["ihc"])
        pairs, problems = _leave_out_repeated(pairs, base)
        yield from problems
        with progress(len(pairs), "tissue", "slides") as bar:
            for found in in_threads(lambda pair: self._cut(pair, base), pairs, min(count_cpus(), _MOST_THREADS)):
                yield from found
                bar.update(1)

    def _cut(self, pair: SlidePair, base: Location) -> Sequence[Candidate | Problem]:
        """The squares of two slides, or why there are none."""
        try:
            return self._lay(pair)
        except DataError as error:
            return [_as_problem(pair.candidate, base, str(error).replace(f"{base}/", ""))]

    def _lay(self, pair: SlidePair) -> list[Candidate]:
        assert self.cut is not None, "--tile and --mpp were checked"
        (entry, affine), cut = pair, self.cut
        assert entry.ihc is not None, "it was read"
        with open_slide(str(entry.he), entry.mpp) as he:
            ihc_mpp = entry.mpp / affine.scale if entry.mpp and affine else entry.mpp
            with open_slide(str(entry.ihc), ihc_mpp) as ihc:
                _check_frames(he, ihc, affine)
                if he.mpp > cut.mpp * _MOST_ENLARGED:
                    raise DataError(
                        f"{he.path} has {he.mpp:.4g} um a pixel, too coarse for --mpp {cut.mpp:g}: raise it"
                    )
                if cut.measured and max(he.mpp, ihc.mpp) > COARSEST * SAME:
                    raise DataError(
                        f"{he.path} or its IHC has more than {COARSEST} um a pixel, at which alignment cannot be "
                        "measured: name finer slides, or accept all pairs by --least-alignment none"
                    )
                he_tissue, ihc_tissue = (find_tissue(slide, focus=False) for slide in (he, ihc))
                for slide, tissue in ((he, he_tissue), (ihc, ihc_tissue)):
                    if tissue.is_empty:
                        raise DataError(f"{slide.path}: {tissue.notes[0]}")
                _note_exchanged(he, he_tissue, ihc, ihc_tissue)
                tiles = lay_tiles(he, he_tissue, cut.tile, cut.mpp, _LEAST_TISSUE)
                regions = [Region(int(x), int(y), cut.tile, cut.mpp, (he.mpp, ihc.mpp), affine) for x, y in tiles.xy_n2]
                squares = _choose_squares(regions, tiles, ihc, ihc_tissue)
                mpp = round(tiles.side * he.mpp / cut.tile, 4)
                return [_describe(entry, region, tiles.side, square, ihc, mpp) for region, square in squares]


def _read_pair(base: Location, row: dict[str, str], layout: Layout) -> SlidePair:
    if not row["ihc"]:
        raise DataError("has no IHC: name the slide of it, or remove the row")
    transform = row.get("transform", "")
    entry = read_row(base, row, layout.target)
    name = entry.slide or entry.stem.removesuffix(".ome")
    return SlidePair(replace(entry, stem=name, slide=name), read_affine(transform, base) if transform else None)


def _leave_out_repeated(pairs: Sequence[SlidePair], base: Location) -> tuple[list[SlidePair], list[Problem]]:
    """The pairs whose slides, and whose name, no other pair has; and a problem for each of the others."""
    users: dict[str, set[int]] = {}
    for number, (entry, _) in enumerate(pairs):
        for use in (f"name {safe_key(entry.stem)}", f"file {entry.he}", f"file {entry.ihc}"):
            users.setdefault(use, set()).add(number)
        if entry.he == entry.ihc:
            users[f"file {entry.he}"].add(-1)
    problems: dict[int, Problem] = {}
    for use, numbers in users.items():
        for number in numbers - {-1} if len(numbers) > 1 else ():
            if use.startswith("file"):
                name = use.removeprefix(f"file {base}/")
                reason = f"slide {name} is there more than once: keep it in one row, as one stain"
            else:
                reason = f"several pairs of slides are called {use[5:]}: name each in the column slide"
            problems.setdefault(number, _as_problem(pairs[number].candidate, base, reason))
    return [pair for number, pair in enumerate(pairs) if number not in problems], list(problems.values())


def _as_problem(entry: Candidate, base: Location, reason: str) -> Problem:
    assert entry.ihc is not None, "it was read"
    he, ihc = relative_name(entry.he, base), relative_name(entry.ihc, base)
    return Problem(he, reason, safe_key(entry.stem), he, ihc)


def _check_frames(he: Slide, ihc: Slide, affine: Affine | None) -> None:
    """Raise `DataError` for slides that cannot have one frame, or have other scales than their transform."""
    if affine is not None:
        ratio = affine.scale * ihc.mpp / he.mpp
        if max(ratio, 1 / ratio) > _OTHER_SCALE:
            raise DataError(
                f"the transform enlarges by {affine.scale:.4g}, but the scales of the slides ({he.mpp:.4g} and "
                f"{ihc.mpp:.4g} um a pixel) ask for {he.mpp / ihc.mpp:.4g}: it must lead from level-0 pixels of the "
                "H&E to level-0 pixels of the IHC"
            )
        return
    sizes = [f"{slide.width} x {slide.height} pixels of {slide.mpp:.4g} um" for slide in (he, ihc)]
    if (he.width, he.height) != (ihc.width, ihc.height) or not is_same(he.mpp, ihc.mpp):
        raise DataError(
            f"its H&E has {sizes[0]} and its IHC {sizes[1]}, so that they have no common frame: name the slides that "
            "the registration has written, the warped H&E too, or give a transform"
        )


def _choose_squares(
    regions: Sequence[Region], tiles: Tiles, ihc: Slide, tissue: Tissue
) -> list[tuple[Region, tuple[float, float, float]]]:
    """The regions with enough tissue on the IHC too, and their squares there; `DataError` where there is none."""
    square_n3 = np.array([region.find_square(tiles.side) for region in regions])
    side = square_n3[0, 2]
    share_n = tissue.find_shares(square_n3[:, :2], side)
    inside_n = (square_n3[:, :2] + side / 2 >= 0).all(1) & (square_n3[:, :2] + side / 2 < (ihc.width, ihc.height)).all(
        1
    )
    if not inside_n.any():
        raise DataError(
            "its transform leads from all tissue of the H&E to places outside the IHC: it must lead from level-0 "
            "pixels of the H&E to those of the IHC, not the other way"
        )
    if not (share_n >= _LEAST_TISSUE).any():
        raise DataError(f"of {len(regions)} tiles with tissue on the H&E none has it on the IHC: register the slides")
    logger.info(
        "%s: %d of %d tiles hold tissue on both slides", ihc.path, (share_n >= _LEAST_TISSUE).sum(), len(regions)
    )
    return [
        (region, (float(x), float(y), float(side)))
        for region, (x, y, _), share in zip(regions, square_n3, share_n, strict=True)
        if share >= _LEAST_TISSUE
    ]


def _describe(
    entry: Candidate, region: Region, side: int, square: tuple[float, float, float], ihc: Slide, mpp: float
) -> Candidate:
    """The candidate of a region."""
    assert entry.ihc is not None, "it was read"
    ihc_x, ihc_y, ihc_side = square
    places = {"x": float(region.x), "y": float(region.y), "side": float(side)}
    places |= {"ihc_x": ihc_x, "ihc_y": ihc_y, "ihc_side": ihc_side}
    origin = entry.origin.model_copy(update={**places, "ihc_slide": ihc.path.name})
    return replace(entry, stem=f"{entry.stem}_y{region.y}_x{region.x}", mpp=mpp, origin=origin, region=region)


def _note_exchanged(he: Slide, he_tissue: Tissue, ihc: Slide, ihc_tissue: Tissue) -> None:
    """Warn where the IHC has more of eosin's colour than the H&E."""
    of_he, of_ihc = _measure_green(he, he_tissue), _measure_green(ihc, ihc_tissue)
    if of_he < of_ihc:
        logger.warning(
            "%s looks less like an H&E than %s (green is %.2f and %.2f of what red and blue absorb): are the columns "
            "he and ihc exchanged?",
            he.path,
            ihc.path,
            of_he,
            of_ihc,
        )


def _measure_green(slide: Slide, tissue: Tissue) -> float:
    """What tissue absorbs of green, over what it absorbs of red and blue: high for eosin, low for DAB and blue."""
    pixels, mpp = slide.shrink(512)
    height, width = pixels.shape[:2]
    row_n, column_n = (
        np.minimum(((np.arange(count) + 0.5) * mpp / tissue.mpp).astype(int), most - 1)
        for count, most in zip((height, width), tissue.mask_HW.shape, strict=True)
    )
    od_n3 = -np.log10(np.maximum(pixels[tissue.mask_HW[np.ix_(row_n, column_n)]], 1) / np.array(tissue.white))
    red, green, blue = np.maximum(od_n3, 0).mean(axis=0)
    return float(green / max(red + blue, 1e-6))
