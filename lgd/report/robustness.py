"""Robustness: every network scored again on images as another scanner or laboratory would have made them.

Every change is applied to the decoded uint8 image of the network's input size: after the shrinking, where a real
scanner's change comes before it. A blur of one pixel or a JPEG block of eight therefore covers more tissue than at
native resolution. The H&E is changed for students, the IHC for the teacher.

Draws are a hash of seed and key, so they depend neither on the order of the samples nor on how batches are cut, and a
patch is drawn alike for every strength and network. Strengths were fixed before any network was scored under them.

Shapes: B batch, H and W pixels, 3 channels or stains.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from lgd.config import Config
from lgd.labels.predictions import Predictions, paired_differences, score_with_intervals
from lgd.report.columns import list_robust
from lgd.report.results import AtStrength, ChangeText, ModelRobustness, Robustness, UnderChange
from lgd.scoring.predict import Scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.image import decode, encode
from lgd.stain.deconvolve import H_DAB, H_E, rgb_to_od
from lgd.stain.targets import estimate_white
from lgd.stream.plan import draw

logger = logging.getLogger(__name__)

Images = np.ndarray
"""uint8 (B, H, W, 3)."""

TURN = 25.0
"""Degrees that a stain's vector turns at a stain shift of 1. Hematoxylin lies 39 degrees from eosin and 37 from DAB: at
the strongest shift a stain turns by 10, a quarter of the way to the other."""
GREY, WHITE = (165.0, 180.0), (230.0, 250.0)
"""Brightness of the glass: BCI's grey backgrounds, and white ones as scanners and the virtual tissue have them."""
_BRIGHT = 200.0
"""Glass above it counts as white. In 16 BCI pairs grey ended at 190, and white began there at 205."""


class Change(ChangeText):
    """One way in which images change, at its strengths."""

    strengths: dict[float, str]
    """Strength -> how a table names it; 0, the image as it is, is not among them."""
    apply: Callable[[str, float, int, Images, Sequence[str]], Images]
    """(role, strength, seed, images, keys) -> images; the role, he or ihc, says which stains they hold."""


def stain_shift(role: str, strength: float, seed: int, image_BHW3: Images, keys: Sequence[str]) -> Images:
    """Scale the amounts of an image's two stains by 1 - strength to 1 + strength, and turn their vectors.

    Each stain has its own uniform draw, and turns by `TURN` * strength degrees in a random direction; a stain takes no
    light away from a channel less than not at all. Optical density is relative to the image's own background, which
    stays; what the two stains do not explain stays too.
    """
    u_B4 = torch.from_numpy(_uniform(keys, seed, "stain", 4))
    stains_33 = H_E if role == "he" else H_DAB
    amount_B2 = 1 + strength * (2 * u_B4[:, :2] - 1)
    return _restain(image_BHW3, stains_33, amount_B2, _turned(stains_33, TURN * strength, 2 * math.pi * u_B4[:, 2:]))


def _turned(stains_33: torch.Tensor, degrees: float, direction_B2: torch.Tensor) -> torch.Tensor:
    """(B, 2, 3): the first two rows turned by an angle, each towards its direction (radians) around it."""
    angle = math.radians(degrees)
    residual_3 = stains_33[2].expand(2, 3)
    # The residual is perpendicular to both stains, and its cross product with one to the two of them.
    side_23 = torch.linalg.cross(residual_3, stains_33[:2])
    towards_B23 = direction_B2.cos()[..., None] * side_23 + direction_B2.sin()[..., None] * residual_3
    turned_B23 = math.cos(angle) * stains_33[:2] + math.sin(angle) * towards_B23
    return torch.nn.functional.normalize(turned_B23.clamp(min=0), dim=-1)


def _restain(image_BHW3: Images, stains_33: torch.Tensor, amount_B2: torch.Tensor, stains_B23: torch.Tensor) -> Images:
    """Unmix by one stain matrix, scale the amounts, mix by the other two vectors; the residual stays."""
    rgb_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2)
    od_B3HW = rgb_to_od(rgb_B3HW, estimate_white(rgb_B3HW))
    # As in `lgd.stream.plan.stain_jitter`: only the added OD is worked out, so that no change changes nothing.
    new_B33 = torch.cat([amount_B2[..., None] * stains_B23, stains_33[2].expand(len(stains_B23), 1, 3)], dim=1)
    change_B33 = torch.linalg.inv(stains_33) @ new_B33 - torch.eye(3, dtype=new_B33.dtype)
    added_B3HW = torch.einsum("bchw,bcs->bshw", od_B3HW, change_B33.to(od_B3HW))
    return _as_uint8((rgb_B3HW * torch.pow(10.0, -added_B3HW)).permute(0, 2, 3, 1).numpy())


def other_background(role: str, strength: float, seed: int, image_BHW3: Images, keys: Sequence[str]) -> Images:
    """Light a white-backed image as grey ones are lit, and a grey-backed one as white ones are.

    The whole image is multiplied, as by another exposure, by the power `strength` of the ratio of the two backgrounds:
    at 1 its glass has the other brightness. A patch without glass is judged by its brightest tissue.
    """
    u_B2 = _uniform(keys, seed, "background", 2)
    own_B = estimate_white(torch.from_numpy(image_BHW3).permute(0, 3, 1, 2)).mean((1, 2, 3)).numpy()
    grey_B, white_B = (low + (high - low) * u_B2[:, n] for n, (low, high) in enumerate((GREY, WHITE)))
    gain_B = (np.where(own_B > _BRIGHT, grey_B, white_B) / own_B) ** strength
    return _as_uint8(image_BHW3 * gain_B.astype(np.float32)[:, None, None, None])


def recompressed(role: str, strength: float, seed: int, image_BHW3: Images, keys: Sequence[str]) -> Images:
    """Encode as JPEG of quality 100 - strength, and decode again."""
    quality = round(100 - strength)
    again = [decode(encode(image, "jpg", quality), key) for image, key in zip(image_BHW3, keys, strict=True)]
    return np.stack(again)


def blurred(role: str, strength: float, seed: int, image_BHW3: Images, keys: Sequence[str]) -> Images:
    """Convolve with a Gaussian of `strength` pixels; the edges are mirrored."""
    from scipy.ndimage import gaussian_filter

    return _as_uint8(gaussian_filter(image_BHW3.astype(np.float32), (0, strength, strength, 0)))


def _as_uint8(image_BHW3: np.ndarray) -> Images:
    return np.ascontiguousarray(np.rint(image_BHW3).clip(0, 255).astype(np.uint8))


def _uniform(keys: Sequence[str], seed: int, purpose: str, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (B, n), a function of seed, purpose and each sample's key."""
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    sample_B = np.frombuffer(digests, dtype="<i8")
    return draw(seed, np.zeros_like(sample_B), sample_B, f"robustness {purpose}", n)


CHANGES = (
    Change(
        name="stain",
        what="the amounts of the two stains scaled, and their vectors turned",
        strengths={strength: f"±{strength:.0%}, {TURN * strength:.3g}°" for strength in (0.05, 0.2, 0.4)},
        why="light and strong stain variation of Tellez et al. (Med Image Anal 58:101544, 2019), and twice the "
        "strong, beyond what laboratories show: DAB can turn red",
        apply=stain_shift,
    ),
    Change(
        name="background",
        what="white backgrounds lit as grey, grey ones as white",
        strengths={0.5: "half-way", 1.0: "the other"},
        why="half the way, and the whole way, to the other of the two backgrounds of BCI: a shortcut turned round",
        apply=other_background,
    ),
    Change(
        name="JPEG",
        what="compressed once more",
        strengths={10.0: "quality 90", 50.0: "quality 50", 80.0: "quality 20"},
        why="the quality of careful archives, of small files, and one whose blocks are seen",
        apply=recompressed,
    ),
    Change(
        name="blur",
        what="out of focus, a Gaussian in pixels of the network's input",
        strengths={0.5: "0.5 px", 1.0: "1 px", 2.0: "2 px"},
        why="hardly visible, visible, and one that wipes out membranes and chromatin",
        apply=blurred,
    ),
)


def measure(config: Config, networks: Sequence[tuple[Scorer, Predictions]], shards: Sequence[Shard]) -> Robustness:
    """Metrics of each network under each change (`list_robust`), and their paired difference to the unchanged images.

    `networks` were scored on the unchanged images of `shards`. One more pass over the split a network and strength.
    """
    resamples, seed, threads = config.report.bootstrap, config.run.seed, config.data.threads
    models = []
    for scorer, before in networks:
        changes, names = [], list_robust(before.measures)
        for change in CHANGES:
            logger.info("[report] %s: scoring the split under change of %s", scorer.name, change.name)
            rows = []
            for strength, label in change.strengths.items():
                alter = partial(change.apply, scorer.role, strength, seed)
                after, _ = score_shards(scorer, shards, threads=threads, alter=alter)
                metrics = score_with_intervals(after, resamples, seed, names)
                less = paired_differences(after, before, names, resamples, seed)
                rows.append(AtStrength(strength=strength, label=label, metrics=metrics, minus_unchanged=less))
            changes.append(UnderChange(name=change.name, at=tuple(rows)))
        unchanged = score_with_intervals(before, resamples, seed, names)
        models.append(ModelRobustness(name=before.name, unchanged=unchanged, changes=tuple(changes)))
    return Robustness(seed=seed, changes=CHANGES, models=tuple(models))
