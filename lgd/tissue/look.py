"""What is common to the patches of a virtual slide: its stains, its scanner, and the architecture of its tissue."""

from dataclasses import dataclass

import numpy as np

# Optical density of red, green and blue light. Ruifrok and Johnston 2001; eosin and the two hematoxylins are moved
# more than half way towards what Macenko's method finds on BCI's patches, whose pink absorbs blue light and whose
# counterstain is greyish.
_HEMATOXYLIN, _EOSIN, _DAB = (0.63, 0.68, 0.35), (0.23, 0.88, 0.41), (0.268, 0.570, 0.776)
_COUNTERSTAIN = (0.60, 0.64, 0.48)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Look:
    """A slide's look; a vector has red, green and blue."""

    hematoxylin: np.ndarray
    eosin: np.ndarray
    counterstain: np.ndarray
    dab: np.ndarray
    hematoxylin_amount: float
    eosin_amount: float
    dab_amount: float
    counter: float
    haze: float
    he_white: np.ndarray
    ihc_white: np.ndarray
    gamma: np.ndarray
    blur: float
    noise: float
    share: float
    nest_size: float
    cords: float
    lumen: float
    cleft: float
    fibre: float
    basophilia: float
    pink: float
    lymphocytes: float
    pitch: float
    girth: float


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a slide's look. It never sees the level."""
    grey = rng.random() < 0.3
    white = rng.uniform(170, 205) if grey else rng.uniform(228, 250)
    # Arguments are worked out in their order, and so are the draws.
    vectors = [_tilt(rng, vector) for vector in (_HEMATOXYLIN, _EOSIN, _COUNTERSTAIN, _DAB)]
    hematoxylin, eosin, dab = rng.lognormal(0.0, (0.22, 0.22, 0.10))
    return Look(
        hematoxylin=vectors[0],
        eosin=vectors[1],
        counterstain=vectors[2],
        dab=vectors[3],
        hematoxylin_amount=hematoxylin,
        eosin_amount=eosin,
        dab_amount=dab,
        counter=rng.uniform(0.16, 0.36),
        haze=rng.uniform(0.0, 0.06),
        he_white=white * rng.normal(1.0, (0.008, 0.008, 0.008)),
        ihc_white=np.minimum(white * rng.uniform(1.0, 1.03), 252.0) * rng.normal(1.0, (0.006, 0.006, 0.008)),
        gamma=rng.normal(1.0, 0.03, 3),
        blur=rng.uniform(0.55, 1.0),
        noise=rng.uniform(0.8, 2.0),
        share=rng.uniform(0.35, 0.75),
        nest_size=rng.uniform(13.0, 24.0),
        cords=rng.uniform(0.0, 0.9),
        lumen=rng.uniform(0.0, 0.30) if rng.random() < 0.5 else 0.0,
        cleft=rng.uniform(0.6, 2.5) if rng.random() < 0.4 else 0.0,
        fibre=rng.uniform(0.25, 0.65),
        basophilia=rng.uniform(0.07, 0.17),
        pink=rng.uniform(0.13, 0.26),
        lymphocytes=rng.uniform(0.0, 0.25),
        pitch=rng.normal(1.0, 0.05),
        girth=rng.normal(1.0, 0.05),
    )


def _tilt(rng: np.random.Generator, vector: tuple[float, float, float]) -> np.ndarray:
    """A stain vector turned by a few degrees, as batches of dye differ."""
    turned = np.maximum(np.array(vector) + rng.normal(0.0, 0.018, 3), 0.01)
    unit: np.ndarray = turned / np.linalg.norm(turned)
    return unit
