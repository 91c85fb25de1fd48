"""The look of a virtual slide: colours and amounts of its dyes, its glass, its scanner, and its kind of tissue."""

import numpy as np

# Optical density of red, green and blue light. Ruifrok and Johnston 2001; eosin and the two hematoxylins are moved
# more than half way towards what Macenko's method finds on BCI's patches, whose pink absorbs blue light and whose
# counterstain is greyish.
_HEMATOXYLIN, _EOSIN, _DAB = (0.63, 0.68, 0.35), (0.23, 0.88, 0.41), (0.268, 0.570, 0.776)
_COUNTERSTAIN = (0.60, 0.64, 0.48)


class Look:
    """A slide's look, which never sees the level; a stain's vector has red, green and blue."""

    def __init__(self, rng: np.random.Generator) -> None:
        grey = rng.random() < 0.3
        white = rng.uniform(170, 205) if grey else rng.uniform(228, 250)
        vectors = (_HEMATOXYLIN, _EOSIN, _COUNTERSTAIN, _DAB)
        self.hematoxylin, self.eosin, self.counterstain, self.dab = [_tilt(rng, vector) for vector in vectors]
        self.hematoxylin_amount, self.eosin_amount, self.dab_amount = rng.lognormal(0.0, (0.22, 0.22, 0.10))
        self.counter = rng.uniform(0.16, 0.36)
        self.haze = rng.uniform(0.0, 0.06)
        self.he_white = white * rng.normal(1.0, (0.008, 0.008, 0.008))
        self.ihc_white = np.minimum(white * rng.uniform(1.0, 1.03), 252.0) * rng.normal(1.0, (0.006, 0.006, 0.008))
        self.gamma = rng.normal(1.0, 0.03, 3)
        self.blur = rng.uniform(0.55, 1.0)
        self.noise = rng.uniform(0.8, 2.0)
        self.share = rng.uniform(0.35, 0.75)
        self.nest_size = rng.uniform(13.0, 24.0)
        self.cords = rng.uniform(0.0, 0.9)
        self.lumen = rng.uniform(0.0, 0.30) if rng.random() < 0.5 else 0.0
        self.cleft = rng.uniform(0.6, 2.5) if rng.random() < 0.4 else 0.0
        self.fibre = rng.uniform(0.25, 0.65)
        self.basophilia = rng.uniform(0.07, 0.17)
        self.pink = rng.uniform(0.13, 0.26)
        self.lymphocytes = rng.uniform(0.0, 0.25)
        self.pitch = rng.normal(1.0, 0.05)
        self.girth = rng.normal(1.0, 0.05)


def _tilt(rng: np.random.Generator, vector: tuple[float, float, float]) -> np.ndarray:
    """A stain vector turned by a few degrees, as batches of dye differ."""
    turned = np.maximum(np.array(vector) + rng.normal(0.0, 0.018, 3), 0.01)
    unit: np.ndarray = turned / np.linalg.norm(turned)
    return unit
