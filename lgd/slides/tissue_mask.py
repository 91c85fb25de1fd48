"""Where a slide holds tissue: what absorbs more light than the slide's own glass, whatever the stain.

A fixed threshold of brightness or saturation loses faint IHC: of real tissue of level 0 and 1+ such rules keep a
third, and one whose threshold is Otsu's calls half of an empty slide tissue. Here a pixel is tissue where the largest
optical density of its three channels, over the glass and blurred by 10 um, is above 0.03, and not even: eosin that has
run onto the glass is (for 1 to 3 mm on the sections of her2st). Pen strokes and what is out of focus are measured and
reported, not left out: the dye at the margin of a specimen looks like a pen, too.

Shapes: H and W pixels of the mask, n squares.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from lgd.base.threads import in_threads
from lgd.slides.slide import Overview, Slide

_MPP = 2.8
_MOST_SIDE = 4096
"""Pixels of a mask: that of a slide of 200,000 px is coarser."""
_OD = 0.03
_BLUR_UM = 10 / 2.355
"""Standard deviation of a Gaussian 10 um wide."""
_WINDOW_UM = 60.0
_UNEVEN, _COARSEST_MPP = 0.006, 6.0
"""Least standard deviation of the density in a window, where the mask is no coarser: larger pixels show no cells.
Of halos of eosin on her2st 95 % are below 0.0064, and of the faintest real IHC (BCI, level 0) 99 % are above 0.0083."""
_CLOSE_UM = 8.0
_LEAST_UM2 = 2500.0
_STRIP = 128
"""Rows that are measured at once."""
_GLASS_PIXELS = 500_000
_LEAST_SHARE = 0.001
"""Of the scanned part: a slide with less tissue is empty."""
_WHITE_LEAST, _WHITE_CAST = 140.0, 0.9
"""The glass of a slide without any must not take all its stain (as `lgd.stain.targets.estimate_white`)."""

_INK_HUES, _INK_SATURATION, _BLACK = (55, 165), 90, 70
"""Of 255, as Pillow counts them."""
_STROKE_UM, _RIM_UM = 40.0, 11.0
"""What is thinner is no stroke; and what is paler along it is one."""
_PEN_NOTED, _BLUR_NOTED = 0.01, 0.1
_SPOTS, _SPOT_SIDE, _SPOT_MPP = 48, 256, 0.5
_THREADS = 2  # that read them
_BLURRED = 1 / 6
"""Of the slide's median focus. A Gaussian of 1 px takes it to a third or a fifth, one of 2 px to a tenth or less."""


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide."""

    mask_HW: np.ndarray
    """bool, of the whole frame."""
    mpp: float
    """Micrometres to a pixel of the mask."""
    downsample: float
    """Level-0 pixels to one of the mask."""
    white: tuple[float, float, float]
    """Red, green and blue of the glass."""
    area_mm2: float
    scanned_mm2: float
    """Of what the file holds, glass too."""
    pen: float
    """Share of the tissue that looks like ink."""
    blurred: float
    """Share of spots of tissue that are out of focus, compared with the others of this slide."""
    notes: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether less than 0.1 % of what was scanned is tissue."""
        return self.area_mm2 < _LEAST_SHARE * self.scanned_mm2

    def share(self, x: int, y: int, side: int) -> float:
        """The share of a square, in level-0 pixels, that is tissue."""
        return float(self.find_shares(np.array([[x, y]]), side)[0])

    def find_shares(self, xy_n2: np.ndarray, side: int) -> np.ndarray:
        """The same of squares of one size, by their top left, float32 (n,)."""
        near_n2, far_n2 = xy_n2 / self.downsample, (xy_n2 + side) / self.downsample
        total_n = self._sum_to(far_n2[:, 0], far_n2[:, 1]) - self._sum_to(near_n2[:, 0], far_n2[:, 1])
        total_n += self._sum_to(near_n2[:, 0], near_n2[:, 1]) - self._sum_to(far_n2[:, 0], near_n2[:, 1])
        share_n: np.ndarray = np.clip(total_n * (self.downsample / side) ** 2, 0, 1)
        return share_n.astype(np.float32)

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        """Tissue pixels above and left of each corner, int32 (H + 1, W + 1)."""
        sums = np.zeros([side + 1 for side in self.mask_HW.shape], np.int32)
        np.cumsum(self.mask_HW, 0, np.int32, sums[1:, 1:])
        np.cumsum(sums[1:, 1:], 1, np.int32, sums[1:, 1:])
        return sums

    def _sum_to(self, x_n: np.ndarray, y_n: np.ndarray) -> np.ndarray:
        """Tissue above and left of places in pixels of the mask; exact between corners too, where it is bilinear."""
        height, width = self.mask_HW.shape
        x_n, y_n = np.clip(x_n, 0, width), np.clip(y_n, 0, height)
        left_n, top_n = (np.minimum(at_n.astype(np.int64), most - 1) for at_n, most in ((x_n, width), (y_n, height)))
        across_n, down_n = x_n - left_n, y_n - top_n
        upper_n = self._sums[top_n, left_n] * (1 - across_n) + self._sums[top_n, left_n + 1] * across_n
        lower_n = self._sums[top_n + 1, left_n] * (1 - across_n) + self._sums[top_n + 1, left_n + 1] * across_n
        total_n: np.ndarray = upper_n * (1 - down_n) + lower_n * down_n
        return total_n


def find_tissue(slide: Slide, *, focus: bool = True) -> Tissue:
    """The tissue of a slide, from one low level of it and a few spots at full size.

    Without `focus` the spots, which take most of the time on a small slide, are not read, and no blur is reported.
    Raises `DataError` where the file is damaged.
    """
    overview = slide.read_overview(max(_MPP, slide.mpp * max(slide.width, slide.height) / _MOST_SIDE))
    mpp, downsample = overview.mpp, overview.mpp / slide.mpp
    red, green, blue = map(float, white_3 := estimate_glass(overview))
    ink_HW = _map_strips(functools.partial(_find_ink, mpp=mpp), overview)
    dense_HW = _map_strips(functools.partial(_find_dense, mpp=mpp, white_3=white_3), overview)
    scanned = float(overview.scanned_HW.sum()) * mpp**2 / 1e6
    # The memory that they took is that of what follows.
    del overview
    mask_HW = _clean(dense_HW, mpp)
    area, pen = float(mask_HW.sum()) * mpp**2 / 1e6, float(ink_HW[mask_HW].mean()) if mask_HW.any() else 0.0
    blurred = _measure_blur(slide, mask_HW, downsample) if focus else 0.0
    tissue = Tissue(mask_HW, mpp, downsample, (red, green, blue), area, scanned, pen, blurred, ())
    return dataclasses.replace(tissue, notes=tuple(_list_notes(tissue)))


def estimate_glass(overview: Overview) -> np.ndarray:
    """Red, green and blue of the glass, float64 (3,): the median of the tenth of pixels whose least channel is highest.

    Programs fill what was not scanned with pure white, which is brighter than glass. It is left out unless the glass is
    as white: what remains then is tissue and its edges, and the brightest of that is not even.
    """
    height, width = overview.scanned_HW.shape
    step = max(1, round(math.sqrt(height * width / _GLASS_PIXELS)))
    pixels, scanned_HW = overview.pixels[::step, ::step], overview.scanned_HW[::step, ::step]
    least_HW = pixels.min(-1)
    filled_HW = (least_HW == 255) | (pixels.max(-1) == 0)
    known_HW = scanned_HW & ~filled_HW
    if known_HW.any():
        white_3 = _find_brightest(pixels, known_HW)
        like_HW = known_HW & (np.abs(least_HW - white_3.min()) < 0.05 * white_3.min())
        around_HW = ndimage.maximum_filter(least_HW, 3) - ndimage.minimum_filter(least_HW, 3)
        if not (least_HW[scanned_HW] == 255).any() or np.mean(around_HW[like_HW] <= 8) > 0.5:
            return white_3.clip(max(_WHITE_CAST * white_3.max(), _WHITE_LEAST))
    return np.full(3, 255.0)


def _find_brightest(pixels: np.ndarray, known_HW: np.ndarray) -> np.ndarray:
    known_n3 = pixels[known_HW]
    least_n = known_n3.min(1)
    return np.asarray(np.median(known_n3[least_n >= np.quantile(least_n, 0.9)], axis=0))


def _map_strips(measure: Callable[[np.ndarray, np.ndarray], np.ndarray], overview: Overview) -> np.ndarray:
    """What a measure gives of pixels and of what was scanned, bool (H, W): by strips, with what lies around them."""
    margin = math.ceil(_WINDOW_UM / overview.mpp) + 1
    result_HW = np.empty_like(overview.scanned_HW)
    for top in range(0, len(result_HW), _STRIP):
        first = max(0, top - margin)
        rows = slice(first, top + _STRIP + margin)
        measured = measure(overview.pixels[rows], overview.scanned_HW[rows])
        result_HW[top : top + _STRIP] = measured[top - first :][:_STRIP]
    return result_HW


def _find_dense(pixels: np.ndarray, scanned_HW: np.ndarray, mpp: float, white_3: np.ndarray) -> np.ndarray:
    """Where the blurred optical density is above the threshold, and uneven, bool (H, W)."""
    od_HW = np.full(scanned_HW.shape, -np.inf, np.float32)
    for channel, white in enumerate(white_3):
        of_byte = -np.log10(np.maximum(np.arange(256), 1) / white).astype(np.float32)
        np.maximum(od_HW, of_byte[pixels[..., channel]], out=od_HW)
    # What was not scanned is no tissue, and neither is black that some programs fill in for it.
    od_HW[~scanned_HW | (pixels.max(-1) == 0)] = 0
    dense_HW: np.ndarray = ndimage.gaussian_filter(od_HW, _BLUR_UM / mpp) > _OD
    return dense_HW & _find_uneven(od_HW, mpp) if mpp <= _COARSEST_MPP else dense_HW


def _find_uneven(od_HW: np.ndarray, mpp: float) -> np.ndarray:
    window = max(3, round(_WINDOW_UM / mpp))
    mean_HW = ndimage.uniform_filter(od_HW, window)
    variance_HW = ndimage.uniform_filter(np.square(od_HW), window)
    variance_HW -= np.square(mean_HW, out=mean_HW)
    return np.asarray(variance_HW > _UNEVEN**2)


def _clean(mask_HW: np.ndarray, mpp: float) -> np.ndarray:
    """A mask without gaps, specks and holes."""
    closed_HW = _close(mask_HW, round(_CLOSE_UM / mpp))
    return ~_drop_specks(~_drop_specks(closed_HW, mpp), mpp)


def _close(mask_HW: np.ndarray, reach: int) -> np.ndarray:
    if reach < 1:
        return mask_HW
    # Beyond the edge there is nothing, which an erosion would eat into the tissue.
    padded_HW = np.pad(mask_HW, reach)
    closed_HW: np.ndarray = ndimage.binary_closing(padded_HW, _draw_disk(reach))
    return closed_HW[reach:-reach, reach:-reach]


def _draw_disk(reach: int) -> np.ndarray:
    offset = np.arange(-reach, reach + 1)
    return np.hypot(offset[:, None], offset) <= reach


def _drop_specks(mask_HW: np.ndarray, mpp: float) -> np.ndarray:
    label_HW, count = ndimage.label(mask_HW)
    size_n = np.zeros(count + 1, np.int64)
    for label_W in label_HW:
        size_n += np.bincount(label_W, minlength=count + 1)
    large_n = size_n * mpp**2 >= _LEAST_UM2
    large_n[0] = False
    return np.asarray(large_n[label_HW])


def _find_ink(pixels: np.ndarray, scanned_HW: np.ndarray, mpp: float) -> np.ndarray:
    """Where a pen was: blue, green and black strokes, bool (H, W)."""
    hue_HW, saturation_HW, value_HW = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV")), -1, 0)
    first, last = _INK_HUES
    ink_HW = scanned_HW & (hue_HW >= first) & (hue_HW <= last) & (saturation_HW > _INK_SATURATION)
    ink_HW |= (value_HW < _BLACK) & (saturation_HW < _INK_SATURATION)
    # Dense, bluish nuclei have these colours too, and are no stroke.
    thin, wide = (max(1, round(um / mpp)) for um in (_STROKE_UM, _STROKE_UM + 2 * _RIM_UM))
    return np.asarray(ndimage.maximum_filter(ndimage.minimum_filter(ink_HW, thin), wide))


def _measure_blur(slide: Slide, mask_HW: np.ndarray, downsample: float) -> float:
    """The share of spots, spread over the tissue, that are much less sharp than the median one."""
    mpp = max(_SPOT_MPP, slide.mpp)
    side = slide.find_side(_SPOT_SIDE, mpp)
    # Tissue pixels down to each row.
    sum_H = np.cumsum(mask_HW.sum(1))
    places = []
    for number in np.linspace(0, sum_H[-1] - 1, min(_SPOTS, sum_H[-1])).astype(int):
        row = int(np.searchsorted(sum_H, number, "right"))
        column = np.flatnonzero(mask_HW[row])[number - sum_H[row]]
        x, y = (math.floor((at + 0.5) * downsample - side / 2) for at in (column, row))
        places.append((x, y))

    def measure(place: tuple[int, int]) -> float:
        return measure_focus(slide.read(*place, _SPOT_SIDE, _SPOT_SIDE, mpp))

    focus = list(in_threads(measure, places, _THREADS))
    return float(np.mean(np.array(focus) < _BLURRED * np.median(focus))) if focus else 0.0


def measure_focus(pixels: np.ndarray) -> float:
    """How sharp an image is: the variance of its Laplacian, in units of its own."""
    grey_HW = pixels.mean(-1, dtype=np.float32)
    return float(ndimage.laplace(grey_HW).var() / max(float(grey_HW.var()), 1.0))


def _list_notes(tissue: Tissue) -> list[str]:
    if tissue.is_empty:
        return ["less than 0.1 % of it is tissue: it may be empty, or not stained"]
    notes = []
    if tissue.pen > _PEN_NOTED:
        notes.append(f"{tissue.pen:.0%} of its tissue looks like pen or dye, and is scored like the rest")
    if tissue.blurred > _BLUR_NOTED:
        notes.append(f"{tissue.blurred:.0%} of its tissue is much less sharp than the rest")
    return notes
