"""What `lgd synth` draws, as its options."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lgd.base.arguments import check_bounds
from lgd.base.errors import require
from lgd.config_sections import NotNegative, Positive, Share
from lgd.tissue.sections import Stain

_OF_PATCHES = ("pairs", "size", "slides", "stain", "beyond", "shortcut", "shortcut_in", "test")
_OF_SLIDES = ("slide_size", "shift", "warp", "unregistered")
ADDED: dict[str, int | float | str | None] = {"stain": "membranes", "beyond": 0.0, "centers": 0, "slides_only": 0}
ADDED |= {"slide_size": 3000, "shift": 0.0, "warp": 0.0, "unregistered": 0.0}
"""Options that the recipe names only where they are not as here: earlier sets were drawn without them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthOptions:
    """What to draw, and where to."""

    out: str
    """Folder that is written; new, empty, or made before with the same options."""
    pairs: Positive = 640
    """Pairs of patches."""
    size: Annotated[int, Field(ge=64, multiple_of=16)] = 256
    """Side of a patch, in pixels of 0.46 um; a multiple of 16."""
    seed: NotNegative = 0
    """Seed of everything drawn."""
    slides: NotNegative = 0
    """Virtual slides, with the levels balanced over them; 0 for one slide per 8 pairs, and at least 8."""
    coupling: Share = 0.7
    """How much the H&E's morphology reveals of the level: 0 nothing, 1 much."""
    stain: Stain = "membranes"
    """What the IHC shows: membranes of the four HER2 levels, or nuclei of which a share is positive, as of Ki67."""
    beyond: Share = 0.0
    """How much the H&E reveals of the share of stained cells within a level, by the elongation of nuclei, which says
    nothing of the level: 0 nothing, 1 all."""
    centers: NotNegative = 0
    """Deal the slides to so many virtual centers of unequal stain and scanner, each with all levels; 0 for none."""
    shortcut: Share | None = None
    """Give each slide's H&E one of four strengths of stain (see shortcut_in), which reveals the level of this share of
    the training slides and nothing in the folder `test`: 0 is the control of 0.9, with the same test images. By default
    each slide has a strength of its own. Of nuclei, the quarter of the shares counts as the level."""
    shortcut_in: Literal["stain", "background", "center"] = "stain"
    """Where the shortcut is: in the strength of stain, in a background from white to grey, or in the center."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the slides in the folder `test`."""
    slides_only: NotNegative = 0
    """Draw so many pairs of whole slides (pyramidal TIFF) instead of patches."""
    slide_size: Annotated[int, Field(ge=512)] = 3000
    """Side of a whole slide, in pixels of 0.46 um."""
    shift: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Move the IHC of each whole slide by so many micrometres, in a drawn direction."""
    warp: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Bend the IHC of each whole slide smoothly, by so many micrometres (standard deviation)."""
    unregistered: Share = 0.0
    """Share of the whole slides whose IHC lies 150 to 300 um beside its place."""
    workers: NotNegative = 0
    """Processes that draw; 0 for one a CPU."""

    def __post_init__(self) -> None:
        require(bool(self.out), "out is empty: name the folder to write")
        check_bounds(self)
        others, given = (_OF_PATCHES, "give no") if self.slides_only else (_OF_SLIDES, "give slides_only with")
        wrong = [f.name for f in dataclasses.fields(self) if f.name in others and getattr(self, f.name) != f.default]
        require(not wrong, f"slides_only is {self.slides_only}: {given} {' and no '.join(wrong)}")
        require(
            not self.slides_only or 4 * self.centers <= self.slides_only,
            f"centers is {self.centers} but slides_only is {self.slides_only}: use at least 4 slides a center",
        )
        require(
            not self.beyond or self.stain == "membranes",
            f"beyond is {self.beyond:g} and stain is {self.stain}: it is of levels, which membranes have",
        )
        require(self.slides <= self.pairs, f"slides is {self.slides}: use 0 to pairs ({self.pairs})")
        require(
            bool(self.slides_only) or 4 * self.centers <= self.slide_count,
            f"centers is {self.centers} but there are {self.slide_count} slides: use at least 4 slides a center, that "
            "each may have all levels",
        )
        require(
            self.shortcut_in != "center" or (self.centers > 1 and self.shortcut is not None),
            "shortcut_in is center: give shortcut, and centers of 2 or more",
        )
        require(
            self.test == 0 or self.slide_count >= 2,
            f"test is {self.test} but there is one slide only: use at least 2 slides, or test 0",
        )

    @property
    def slide_count(self) -> int:
        """The number of slides, with the default filled in."""
        return self.slides or min(self.pairs, max(8, -(-self.pairs // 8)))
