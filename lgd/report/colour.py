"""What colour alone says of the level: a logistic regression on an H&E's stain and background, blind to every shape.

Where laboratory or scanner goes with the level, a network can learn the stain instead of the tissue, and held-out
patches that share the stain do not show it. What this row reaches, such a network can reach too.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lgd.config import LEVEL_NAMES
from lgd.metrics import Floats, Ints, Predictions
from lgd.shards.archive import Shard
from lgd.stain.deconvolve import rgb_to_od
from lgd.stain.targets import estimate_white
from lgd.stream.reader import Reader, in_batches, stream

COLOUR = "colour only"
"""Its row in a table."""
HOW = (
    f"{COLOUR}: a logistic regression, fitted on the training split, on the mean and standard deviation of each "
    "channel's optical density and on the background. It sees no shape: what it reaches may be of laboratory and "
    "scanner."
)
"""What a reader must know of the row."""
_SIZE = 64
# Evenly spaced over the training split.
_FIT_ROWS = 20_000


def colour_only(training: Sequence[Shard], scored: Sequence[Shard], threads: int) -> Predictions | None:
    """Fit on the labelled patches of some shards, and score all patches of others in their order.

    None where training has labels of fewer than two levels: nothing can be fitted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not training:
        return None
    _, _, level_n, colour_n9 = _colours(training, threads, _FIT_ROWS)
    labelled_n = level_n >= 0
    if len(np.unique(level_n[labelled_n])) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(colour_n9[labelled_n], level_n[labelled_n])
    keys, groups, level_n, colour_n9 = _colours(scored, threads)
    probability_n4 = np.zeros((len(keys), len(LEVEL_NAMES)))
    probability_n4[:, model.classes_] = model.predict_proba(colour_n9)
    return Predictions(name=COLOUR, keys=keys, groups=groups, level=level_n, probability=probability_n4)


def _colours(
    shards: Sequence[Shard], threads: int, most: int | None = None
) -> tuple[list[str], list[str], Ints, Floats]:
    """Key, group, level and colour of all patches, or of `most` evenly spaced ones."""
    reader = Reader(shards, ("he",), _SIZE)
    rows = range(reader.total)
    if most is not None and most < reader.total:
        rows = range(0, reader.total, -(-reader.total // most))
    keys, groups, levels, colours = [], [], [], []
    for samples, images in stream(reader, in_batches(rows, 64), threads=threads):
        keys += [sample.key for sample in samples]
        groups += [sample.meta.group for sample in samples]
        levels += [sample.level for sample in samples]
        colours.append(_colour(images["he"]))
    reader.close()
    return keys, groups, np.array(levels, np.int64), np.concatenate(colours)


def _colour(image_BHW3: np.ndarray) -> Floats:
    """Mean and standard deviation of the optical density, and the background's, of each channel: (B, 9)."""
    rgb_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2)
    od_B3HW, white_B311 = rgb_to_od(rgb_B3HW), rgb_to_od(estimate_white(rgb_B3HW))
    parts = od_B3HW.mean((2, 3)), od_B3HW.std((2, 3)), white_B311.flatten(1)
    return torch.cat(parts, dim=1).double().numpy()
