"""What a patch is by its colours: nearly blank, or stained otherwise than with hematoxylin and eosin.

A scorer gives an answer for every image. What is said here goes beside it as a note; nothing is refused.

The rules are optical: hematoxylin and eosin both absorb more green light than blue, DAB absorbs more blue than
green, and what is grey absorbs both alike. In shares of the optical density over red, green and blue, green less
blue is 0.26 for hematoxylin, 0.76 for eosin, -0.13 for DAB (Ruifrok and Johnston) and 0 for grey. Three signs show
that a patch is no H&E:

- its tissue as a whole has less of that than halfway between hematoxylin and DAB (IHC, grey images, most photographs);
- more than 5 % of its tissue is brown: more blue absorbed than green, and more than red (IHC with little DAB);
- its tissue as a whole absorbs much more red than green (blue and green pictures, stains such as methylene blue).

The numbers were set on real patches of BCI and half of her2st, and tried on the real data that was left;
tests/stain/test_checks.py holds both to a note on 80 % of the IHC with DAB and 5 % of the H&E. What they cannot show:
hematoxylin alone, as an IHC without DAB has it, and red stains such as AEC or PAS pass for H&E; pigment (melanin,
hemosiderin) counts as brown; glass that is lit yellow by more than a tenth makes H&E look brown.

Shapes: H and W pixels, P pixels of a sample.
"""

from typing import NamedTuple

import numpy as np

NEARLY_BLANK = "nearly blank: hardly any tissue on it, so the result says little"
NO_HE = "does not look like H&E: its tissue is brown, grey or of other colours, not pink and blue-violet"

SETTINGS = {
    "side": 128,  # pixels of a side that are looked at: 256 px cost 0.7 ms, and larger images no more
    "glass_share": 0.02,  # the brightest pixels, by their darkest channel, are glass, if there is any
    "glass_cast": 0.9,  # least channel of the glass, in units of its brightest one; else it is tissue
    "glass_least": 140.0,  # BCI's grey glass is 165 to 180
    "tissue_od": 0.05,  # in any channel; real HER2 0 and 1+ tissue of BCI has it on 7 % of its pixels and more
    "tissue_least": 0.05,  # share of the pixels below which a patch is nearly blank
    "green_over_blue": 0.065,  # BCI and B4, C2, C3 of her2st: H&E above 0.10 (99 %), IHC with DAB below 0.02
    "red_over_green": 0.15,  # H&E of BCI and B4, C2, C3 below 0.09
    "brown_od": 0.1,  # of blue light; paler is noise
    "brown_over_red": 0.05,  # as a share: grey is not brown
    "brown_most": 0.05,  # share of the tissue; H&E of BCI and B4, C2, C3 below 0.012 (99.9 %)
}
"""Optical densities are base 10, after the patch's own glass was set to white."""

_S = SETTINGS
_MINUS_LOG = -np.log10(np.maximum(np.arange(256), 1)).astype(np.float32)


class Colours(NamedTuple):
    """What is measured on a patch."""

    tissue: float
    """Share of the pixels that are darker than glass."""
    green_over_blue: float
    """Green less blue optical density of the tissue, as a share of all three; nan without tissue."""
    red_over_green: float
    """Red less green, likewise."""
    brown: float
    """Share of the tissue that is brown."""


def find_notes(rgb_HW3: np.ndarray) -> list[str]:
    """What a reader of a patch's result must know of the patch: `NEARLY_BLANK`, or `NO_HE`, or nothing.

    `rgb_HW3` is uint8, of 32 px or more; at native size or shrunk to a network's.
    """
    colours = measure_colours(rgb_HW3)
    if colours.tissue < _S["tissue_least"]:
        return [NEARLY_BLANK]
    looks_like_he = (
        colours.green_over_blue >= _S["green_over_blue"]
        and colours.red_over_green <= _S["red_over_green"]
        and colours.brown <= _S["brown_most"]
    )
    return [] if looks_like_he else [NO_HE]


def measure_colours(rgb_HW3: np.ndarray) -> Colours:
    """Measure the tissue of a uint8 patch and its colours, on a regular sample of its pixels."""
    assert rgb_HW3.dtype == np.uint8 and rgb_HW3.shape[2] == 3, f"{rgb_HW3.dtype} {rgb_HW3.shape}"
    step = max(1, -(-max(rgb_HW3.shape[:2]) // int(_S["side"])))
    sample_HW3 = rgb_HW3[step // 2 :: step, step // 2 :: step]
    # Whole planes: NumPy takes ten times as long along an axis of three.
    pixel_3P = np.ascontiguousarray(sample_HW3.reshape(-1, 3).T)
    glass_3 = _estimate_glass(pixel_3P)
    dark_3P = pixel_3P < (glass_3 * 10 ** -_S["tissue_od"])[:, None]
    tissue_P = dark_3P[0] | dark_3P[1] | dark_3P[2]
    count = np.count_nonzero(tissue_P)
    if not count:
        return Colours(0.0, np.nan, np.nan, 0.0)
    red_P, green_P, blue_P = (
        _MINUS_LOG[plane_P[tissue_P]] + np.float32(np.log10(glass))
        for plane_P, glass in zip(pixel_3P, glass_3, strict=True)
    )
    red, green, blue = (float(od_P.mean(dtype=np.float64)) for od_P in (red_P, green_P, blue_P))
    total = red + green + blue
    brown_P = (blue_P > green_P) & (blue_P > _S["brown_od"])
    brown_P &= blue_P - red_P > _S["brown_over_red"] * (red_P + green_P + blue_P)
    return Colours(count / len(tissue_P), (green - blue) / total, (red - green) / total, float(brown_P.mean()))


def _estimate_glass(pixel_3P: np.ndarray) -> np.ndarray:
    """The unstained background, white, grey or tinted, as RGB.

    Its channels are those of the same pixels, and nearly equal: a patch without glass must not lose its stain.
    """
    darkest_P = pixel_3P.min(0)
    up_to_256 = np.bincount(darkest_P, minlength=256).cumsum()
    least = np.searchsorted(up_to_256, (1 - _S["glass_share"]) * len(darkest_P), side="right")
    glass_3 = np.median(pixel_3P[:, darkest_P >= least], axis=1)
    white_3: np.ndarray = np.maximum(glass_3, max(_S["glass_cast"] * glass_3.max(), _S["glass_least"]))
    return white_3
