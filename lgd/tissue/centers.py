"""Virtual centers: hospitals whose stains, and scanners whose light and lens, are unequal.

A center has its own batches of dye (their colours and amounts), a scanner its own white, gamma, sharpness and noise.
Several centers may have the same scanner. Each property is spread evenly over them, in a drawn order of its own, so
that no two are alike.
"""

from typing import NamedTuple

import numpy as np

from lgd.tissue.look import Look

_STAINS = ("hematoxylin", "eosin", "counterstain", "dab")


class Center(NamedTuple):
    """One of several virtual centers, counted from 0."""

    number: int
    of: int

    @property
    def scanner(self) -> int:
        """The number of its scanner: N centers have N // 2 + 1 of them."""
        return self.number % (self.of // 2 + 1)


def tint(rng: np.random.Generator, look: Look, center: Center) -> None:
    """Give a slide's look what its center and scanner are known for; `rng` is alike for all slides of a world."""
    # Center: how far the colours of its dyes are turned, and their amounts.
    for stain in _STAINS:
        turned = np.maximum(getattr(look, stain) + rng.normal(0.0, 0.04, (center.of, 3))[center.number], 0.01)
        setattr(look, stain, turned / np.linalg.norm(turned))
    for amount in ("hematoxylin_amount", "eosin_amount", "dab_amount", "counter"):
        setattr(look, amount, getattr(look, amount) * np.exp(_spread(rng, center.of, 0.35)[center.number]))
    # Scanner: the slide's own white and gamma keep their casts, and its sharpness a part of its spread.
    scanners = center.of // 2 + 1
    white = 215.0 + _spread(rng, scanners, 32.0)[center.scanner]
    look.ihc_white = np.minimum(white / look.he_white.mean() * look.ihc_white, 252.0)
    look.he_white = white / look.he_white.mean() * look.he_white
    look.gamma = look.gamma * (1 + _spread(rng, scanners, 0.12)[center.scanner])
    look.blur = (0.95 + _spread(rng, scanners, 0.4)[center.scanner]) * (look.blur / 0.775) ** 0.25
    look.noise = look.noise * np.exp(_spread(rng, scanners, 0.4)[center.scanner])


def _spread(rng: np.random.Generator, count: int, reach: float) -> np.ndarray:
    """Numbers from -reach to +reach at equal distances, in a drawn order; 0 where there is one."""
    return rng.permutation(np.linspace(-reach, reach, count) if count > 1 else np.zeros(1))
