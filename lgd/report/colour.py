"""What colour alone says of the label: a model of an H&E's stain and background, blind to every shape.

Where laboratory or scanner goes with the label, a network can learn the stain instead of the tissue, and held-out
patches that share the stain do not show it. What this row reaches, such a network can reach too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lgd.base.labels import Labels, as_labels, find_known
from lgd.base.target import Target
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats
from lgd.scoring.predict import SITES
from lgd.shards.archive import Shard
from lgd.shards.manifest import PatchMeta
from lgd.stain.deconvolve import rgb_to_od
from lgd.stain.targets import estimate_white
from lgd.stream.reader import Reader, in_batches, stream

COLOUR = "colour only"
"""Its row in a table."""
_SIZE = 64
# Evenly spaced over the training split.
_FIT_ROWS = 20_000
_ALPHAS = np.logspace(-2, 4, 7)


def describe_colour(target: Target) -> str:
    """What a reader must know of the row."""
    model = "ridge" if target.is_number else "logistic"
    return (
        f"{COLOUR}: a {model} regression, fitted on the training split, on the mean and standard deviation of each "
        "channel's optical density and on the background. It sees no shape: what it reaches may be of laboratory and "
        "scanner."
    )


class Colours(NamedTuple):
    """The colour of some patches, and what is known of them."""

    metas: list[PatchMeta]
    colour_n9: Floats

    def read_labels(self, target: Target) -> Labels:
        """(n,) their labels."""
        return as_labels(target, [meta.label for meta in self.metas])

    def read_sites(self) -> dict[str, list[str]]:
        """The center and the scanner of each, where any is known."""
        sites = {name: [getattr(meta, name) or "" for meta in self.metas] for name in SITES}
        return {name: values for name, values in sites.items() if any(values)}


def read_training_colours(shards: Sequence[Shard], threads: int) -> Colours:
    """The colour of training patches: of all, or of evenly spaced ones."""
    return read_colours(shards, threads, _FIT_ROWS)


def colour_only(training: Colours, scored: Sequence[Shard], target: Target, threads: int) -> Predictions | None:
    """Fit on labelled training patches, and score all patches of some shards in their order.

    None where training has fewer than two different labels: nothing can be fitted.
    """
    if (answer := fit_colours(training, target)) is None:
        return None
    found = read_colours(scored, threads)
    return Predictions(
        target=target,
        name=COLOUR,
        keys=[meta.key for meta in found.metas],
        groups=[meta.group for meta in found.metas],
        label=found.read_labels(target),
        output=answer(found.colour_n9),
        sites=found.read_sites(),
    )


def fit_colours(training: Colours, target: Target) -> Callable[[Floats], Floats] | None:
    """What colours (n, 9) say, as (n, K), fitted on labelled patches; None of fewer than two different labels."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    label_n = training.read_labels(target)
    known_n = find_known(label_n)
    label_n, colour_n9 = label_n[known_n], training.colour_n9[known_n]
    if len(np.unique(label_n)) < 2:
        return None
    model = make_pipeline(StandardScaler(), RidgeCV(_ALPHAS) if target.is_number else LogisticRegression(max_iter=1000))
    model.fit(colour_n9, label_n)

    def answer(colour_n9: Floats) -> Floats:
        output_nK = np.zeros((len(colour_n9), target.width))
        if len(colour_n9) and target.is_number:
            output_nK[:, 0] = model.predict(colour_n9).clip(*(target.range or (-np.inf, np.inf)))
        elif len(colour_n9):
            output_nK[:, model.classes_] = model.predict_proba(colour_n9)
        return output_nK

    return answer


def read_colours(shards: Sequence[Shard], threads: int, most: int = 0) -> Colours:
    """The colour of all patches, or of `most` evenly spaced ones."""
    reader = Reader(shards, ("he",), _SIZE)
    rows = range(0, reader.total, max(1, -(-reader.total // most)) if most else 1)
    metas, colours = list[PatchMeta](), [np.empty((0, 9))]
    for samples, images in stream(reader, in_batches(rows, 64), threads=threads):
        metas += [sample.meta for sample in samples]
        colours.append(summarise_colour(images["he"]))
    reader.close()
    return Colours(metas, np.concatenate(colours))


def summarise_colour(image_BHW3: np.ndarray) -> Floats:
    """Mean and standard deviation of the optical density, and the background's, of each channel: (B, 9)."""
    rgb_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2)
    od_B3HW, white_B311 = rgb_to_od(rgb_B3HW), rgb_to_od(estimate_white(rgb_B3HW))
    parts = od_B3HW.mean((2, 3)), od_B3HW.std((2, 3)), white_B311.flatten(1)
    return torch.cat(parts, dim=1).double().numpy()
