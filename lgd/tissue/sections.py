"""Two neighbouring sections of one virtual tissue, stained, lit and scanned: an H&E/IHC pair with known truth.

Stains are amounts in optical density (base 10) and become light by Beer-Lambert:
`I = I0 * 10 ** -(sum_s amount_s * vector_s)`. Each section reads its own random stream, and what the IHC shows (a HER2
level, or a share of positive nuclei) enters the H&E through one number only, the grade (see `grade_of`): at coupling 0
the H&E of a patch is the same, byte for byte, whatever its level or share. `Scene.beyond` adds a second number, the
elongation of the tumour's nuclei (see `elongation_of`), which says nothing of the level, and of how many cells are
stained within it.
"""

from typing import Literal, NamedTuple

import numpy as np

from lgd.tissue.centers import Center, tint
from lgd.tissue.drawing import MPP, TUMOUR, Cells, Tissue, draw_tissue
from lgd.tissue.look import Look
from lgd.tissue.painting import mark_nuclei, paint_he, paint_ihc, scan
from lgd.tissue.staining import NuclearStain, Nuclei, cut_patch, draw_expression, stain_membranes, stain_nuclei

Stain = Literal["membranes", "nuclei"]
"""What is brown in the IHC."""

# One random stream for each of these, so that none can leak into another.
_LOOK, _LEVEL, _GRADE, _TISSUE, _HE, _IHC, _SHORTCUT, _NUCLEI, _CENTER, WHOLE, _ELONGATION = range(11)

_GLASS = (248.0, 228.0, 205.0, 180.0)
"""Brightness of the H&E's glass where it is set: from white to the grey of BCI."""
_STRENGTHS = (0.65, 0.85, 1.12, 1.45)
"""Amounts of hematoxylin and eosin where the strength of the stain is set; slides' own have a deviation of 0.22 in
their logarithm."""


def slide_level(seed: int, slide: int) -> int:
    """Level 0..3 of a slide: each four slides in a row hold every level once, in a drawn order."""
    return int(open_stream(_LEVEL, seed, slide // 4).permutation(4)[slide % 4])


def slide_height(seed: int, slide: int) -> float:
    """Where a slide of nuclear stain lies, 0..3: in the quarter of this range that has its `slide_level`."""
    return 0.75 * (slide_level(seed, slide) + open_stream(_NUCLEI, seed, slide, 0).random())


def share_at(height: float) -> float:
    """The share of positive tumour nuclei at a height of 0..3: from 1 to 90 %, half of the heights below 23 %."""
    return 0.01 + 0.89 * (height / 3) ** 2


def center_of(seed: int, slide: int, centers: int, share: float = 0.0) -> Center:
    """The center of a slide: 4 * centers slides in a row give each center each level (or quarter of shares) once.

    Of this `share` of the slides it goes with the level instead: the lowest levels lie in the first centers.
    """
    level, rng = slide_level(seed, slide), open_stream(_CENTER, seed, slide)
    if rng.random() >= share:
        return Center((slide // 4 + level) % centers, centers)
    first = level * centers // 4
    return Center(int(rng.integers(first, max(first + 1, (level + 1) * centers // 4))), centers)


class Scene(NamedTuple):
    """What is drawn otherwise than usual."""

    stain: Stain = "membranes"
    strength: int | None = None
    """How strongly the H&E is stained, 0..3, where that may give the slide's level away; None for the slide's own."""
    glass: int | None = None
    """How grey its background is, likewise."""
    center: Center | None = None
    beyond: float = 0.0
    """How much of the share of stained cells within a level the elongation of nuclei says, 0..1; at 0 none are
    elongated."""


class _Intent(NamedTuple):
    """What a patch is to show."""

    truth: dict[str, float]
    height: float
    """Its level, 0..3; between levels where nuclei are stained."""
    barren: bool
    """Hardly any tumour."""


_USUAL = Scene()


def draw_pair(
    seed: int,
    slide: int,
    patch: int,
    size: int = 256,
    coupling: float = 0.7,
    level: float | None = None,
    scene: Scene = _USUAL,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Draw patch number `patch` of slide number `slide`: a pure function of its arguments.

    `level` is the slide's (0..3; None for `slide_level` or `slide_height`): another one shows the same tissue at
    another level, or, of nuclei, at another share of positive ones (see `share_at`). Returns the H&E and the IHC,
    (size, size, 3) uint8 RGB at 0.46 um/px, not aligned pixel by pixel, and the truth: nuclei and tumour_nuclei
    (centres inside the H&E), discordant (0 or 1), and
    - of membranes: level, patch_level, membrane_od (mean DAB optical density, base 10, on the IHC's tumour membranes),
      membrane_completeness (0..1, of the stained cells; 0 without any), stained_fraction (of the tumour cells),
      and with `scene.beyond` elongation (0..1, of the tumour's nuclei);
    - of nuclei: slide_percent (the slide's share), percent (share of the IHC's tumour nuclei in this patch that are
      positive; nan without any), positive_od (mean DAB optical density of its positive nuclei, haze left out), and
      ihc_nuclei, ihc_tumour_nuclei, ihc_positive_nuclei, ihc_positive_tumour_nuclei (middles inside the IHC).
    """
    intent, tissue, cells, grade = _prepare(seed, slide, patch, size, coupling, level, scene)
    look = tissue.look
    rng = open_stream(_HE, seed, slide, patch)
    cut = cut_patch(rng, tissue, cells, size, neighbouring=False)
    counts = _count_nuclei(cut.cells, size)
    he = scan(rng, look, paint_he(cut, tissue, mark_nuclei(rng, cut.cells, grade)), look.he_white)
    rng = open_stream(_IHC, seed, slide, patch)
    cut = cut_patch(rng, tissue, cells, size, neighbouring=True)
    truth = intent.truth
    if scene.stain == "nuclei":
        stained, _ = stain_nuclei(rng, cut, _choose_nuclear(seed, slide, intent), look.dab_amount)
    else:
        expression = draw_expression(rng, int(truth["patch_level"]), truth.get("elongation", 0.0), scene.beyond)
        stained = stain_membranes(rng, cut, expression, look.dab_amount, exactly=bool(scene.beyond))
        if not stained.measured.pop("tumour_cells"):
            truth["patch_level"] = 0
    ihc = scan(rng, look, paint_ihc(cut, tissue, stained), look.ihc_white)
    return he, ihc, {**truth, **counts, **stained.measured}


def list_nuclei(
    seed: int, slide: int, patch: int, size: int = 256, coupling: float = 0.7, center: Center | None = None
) -> Nuclei:
    """The nuclei of the IHC that `draw_pair` draws of these arguments and the stain `nuclei`, one by one."""
    intent, tissue, cells, _ = _prepare(seed, slide, patch, size, coupling, None, Scene("nuclei", center=center))
    rng = open_stream(_IHC, seed, slide, patch)
    cut = cut_patch(rng, tissue, cells, size, neighbouring=True)
    return stain_nuclei(rng, cut, _choose_nuclear(seed, slide, intent), tissue.look.dab_amount)[1]


def _prepare(
    seed: int,
    slide: int,
    patch: int,
    size: int,
    coupling: float,
    level: float | None,
    scene: Scene,
) -> tuple[_Intent, Tissue, Cells, float]:
    """What a patch is to show, the block of tissue from which both sections are cut, its cells and grade."""
    look = draw_look(seed, slide, scene)
    if scene.stain == "nuclei":
        intent = _intend_nuclei(seed, slide, patch, slide_height(seed, slide) if level is None else level)
    else:
        intent = _intend_membranes(seed, slide, patch, slide_level(seed, slide) if level is None else int(level))
    grade = grade_of(seed, slide, patch, intent.height, coupling)
    if scene.beyond:
        intent.truth["elongation"] = elongation_of(seed, slide, patch)
    rng = open_stream(_TISSUE, seed, slide, patch)
    tissue, cells = draw_tissue(rng, look, grade, size, intent.barren, intent.truth.get("elongation", 0.0))
    return intent, tissue, cells, grade


def draw_look(seed: int, slide: int, scene: Scene) -> Look:
    """The look of a slide, which all its patches have."""
    look = Look(open_stream(_LOOK, seed, slide))
    if scene.center is not None:
        tint(open_stream(_CENTER, seed), look, scene.center)
    if scene.strength is not None:
        own = _STRENGTHS[scene.strength] * open_stream(_SHORTCUT, seed, slide, 0).lognormal(0.0, 0.08, 2)
        look.hematoxylin_amount, look.eosin_amount = own
    if scene.glass is not None:
        look.he_white = _GLASS[scene.glass] * open_stream(_SHORTCUT, seed, slide, 1).normal(1.0, 0.008, 3)
    return look


def shortcut_of(seed: int, slide: int, share: float) -> int:
    """The strength of a slide's H&E stain, or the grey of its background, where it gives the level away.

    For this `share` of the slides it is the slide's level, for all others any.
    """
    rng = open_stream(_SHORTCUT, seed, slide)
    reveals, other = rng.random() < share, int(rng.integers(4))
    return slide_level(seed, slide) if reveals else other


def grade_of(seed: int, slide: int, patch: int, level: float, coupling: float) -> float:
    """The latent grade in [0, 1] behind the H&E's morphology: the level's part, the slide's own, and patch cut.

    `level` is 0..3, and between them where nuclei are stained.
    """
    own = open_stream(_GRADE, seed, slide).random()
    noise = open_stream(_GRADE, seed, slide, patch).normal(0.0, 0.10)
    return float(np.clip(coupling * level / 3 + (1 - coupling) * own + noise, 0.0, 1.0))


def elongation_of(seed: int, slide: int, patch: int) -> float:
    """How drawn-out the nuclei of a patch's tumour are, in [0, 1]: the slide's own, and noise of the patch."""
    own = open_stream(_ELONGATION, seed, slide).random()
    noise = open_stream(_ELONGATION, seed, slide, patch).normal(0.0, 0.10)
    return round(float(np.clip(own + noise, 0.0, 1.0)), 4)


def open_stream(*key: int) -> np.random.Generator:
    """The random numbers of one purpose, named by its numbers, of which none is below 0."""
    # With the length, because NumPy gives (1, 2) and (1, 2, 0) the same stream.
    return np.random.default_rng((len(key), *key))


def _intend_membranes(seed: int, slide: int, patch: int, level: int) -> _Intent:
    """One patch in ten is discordant: the level beside the slide's, or hardly any tumour."""
    rng = open_stream(_LEVEL, seed, slide, patch)
    discordant, barren, step = rng.random() < 0.1, rng.random() < 0.4, rng.choice((-1, 1))
    beside = level + step if 0 <= level + step <= 3 else level - step
    shown = beside if discordant and not barren else level
    truth: dict[str, float] = {"level": level, "patch_level": int(shown), "discordant": int(discordant)}
    return _Intent(truth, shown, discordant and barren)


def _intend_nuclei(seed: int, slide: int, patch: int, height: float) -> _Intent:
    """Patches lie around their slide; one in ten is discordant: far from it, or with hardly any tumour."""
    rng = open_stream(_LEVEL, seed, slide, patch)
    discordant, barren, step = rng.random() < 0.1, rng.random() < 0.4, rng.choice((-1, 1))
    shown = height + rng.normal(0.0, 0.2)
    if discordant and not barren:
        shown = shown + step if 0 <= shown + step <= 3 else shown - step
    truth: dict[str, float] = {"slide_percent": round(100 * share_at(height), 1), "discordant": int(discordant)}
    return _Intent(truth, float(np.clip(shown, 0.0, 3.0)), discordant and barren)


def _choose_nuclear(seed: int, slide: int, intent: _Intent) -> NuclearStain:
    """How nuclei stain: darkly or faintly by slide, and in one slide of three the cytoplasm too."""
    rng = open_stream(_NUCLEI, seed, slide)
    density, bleed = rng.uniform(0.4, 1.4), rng.uniform(0.05, 0.3)
    return NuclearStain(share=share_at(intent.height), density=density, bleed=bleed if rng.random() < 0.3 else 0.0)


def _count_nuclei(cells: Cells, size: int) -> dict[str, int]:
    """Of the H&E: nuclei whose middles lie in it."""
    centre = cells.yx + cells.offset
    seen = ((centre >= 0) & (centre < size * MPP)).all(-1) & (cells.density > 0)
    return {"nuclei": int(seen.sum()), "tumour_nuclei": int((seen & (cells.kind == TUMOUR)).sum())}
