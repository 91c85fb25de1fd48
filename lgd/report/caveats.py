"""What a reader must know before believing a score: computed from the data, from the scores and from retrieval.

One of it is what colour alone says of the level: a logistic regression on an H&E's stain and background, blind to every
shape. Where laboratory or scanner goes with the level, a network can learn the stain instead of the tissue, and
held-out patches that share the stain do not show it. What this row reaches, such a network can reach too.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from lgd.config_sections import LEVEL_NAMES
from lgd.metrics import Floats, Ints, Predictions
from lgd.report.results import Difference, ModelScores, Retrieval, format_interval
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.archive import Shard
from lgd.shards.layouts import LAYOUTS
from lgd.shards.shard_set import ShardSet
from lgd.stain.deconvolve import rgb_to_od
from lgd.stain.targets import estimate_white
from lgd.store.probe import ProbeDocument
from lgd.stream.reader import Reader, in_batches, stream

ONE_TRAINING = (
    "One training of each network stands behind these scores, and another one moves them: no difference between "
    "networks is shown here. lgd ablate --seeds N trains each several times."
)
UNTAUGHT = (
    "No patch of the training split had a label: the network gives no level, nothing is scored, and what it "
    "hallucinates is measured by retrieval alone."
)
PROBE_ROW = f"{TEACHER_ROW}, probe"
"""The row of a teacher that no label taught."""
UNTAUGHT_TEACHER = (
    "No label taught the teacher, and too few labels are there to read levels off its latents: its row of scores is "
    "empty. What its latents are worth is measured by retrieval."
)
WITHOUT_TEACHER = (
    "{} of {} patches of this split have no second image (IHC): the teacher, which reads it, has no row here, and no "
    "query can look for its own IHC."
)
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
FEW_GROUPS = 10
"""Below this many slides a bootstrap interval means little."""
FEW_OF_A_LEVEL = 3
"""Below this many slides a level's sensitivity is that of these slides."""
FEW_LEVEL_0 = 50
"""Below this many patches of level 0 its sensitivity and AUC mean little."""


def probe_caveat(probe: ProbeDocument, learnt: Sequence[str]) -> str:
    """What must be known of the row of a teacher that learnt no label, but what is named, if anything."""
    taught = f"it learnt {' and '.join(learnt)}, and no label" if learnt else "it is a pretrained encoder as it is"
    return (
        f"{PROBE_ROW}: no label taught the teacher ({taught}). Its levels are those of a logistic regression on its "
        f"latents of {probe.describe()}. What the latents hold beyond a linear map it does not show, and students that "
        "are taught soft levels are taught these."
    )


def caveats_of(shards: ShardSet, predictions: Predictions, taught_labels: bool = True) -> list[str]:
    """What a reader must know before believing a score of `predictions` on a run's shards, most serious first.

    Without `taught_labels` the levels of predictions are unknown, whatever the patches have.
    """
    known, virtual = predictions.labelled(), any(one.virtual for one in shards.manifests)
    # One of another package is not imported for this.
    names = dict.fromkeys(manifest.layout for manifest in shards.manifests)
    layouts = [LAYOUTS[name] for name in names if name in LAYOUTS]
    found = []
    if virtual:
        found.append("The tissue is virtual: drawn by a program. Nothing here says anything about real tissue.")
    if any(one.may_leak for one in shards.manifests):
        found.append(
            "Slides are unknown, so the split may leak: patches of one slide can be in training and in this split, "
            "and recognising the slide then passes for scoring HER2. The intervals treat the patches of a slide as "
            "independent and are too narrow."
        )
    # Some group has several patches, and no group has patches of two levels.
    pairs = set(zip(known.groups, known.level.tolist(), strict=True))
    shared = len(pairs) == len(set(known.groups)) < len(known.keys)
    if known.keys and (any(layout.labels_slides for layout in layouts) or shared) and not virtual:
        found.append(
            "A level is that of the whole slide, not of the patch: a patch can look unlike its level, and its score "
            "cannot be checked against the brown on it."
        )
    if not virtual:
        found += [caveat for layout in layouts for caveat in layout.caveats]
    taught = shards.count_labels("train")
    if any(taught[name] for name in LEVEL_NAMES) and (untaught := [name for name in LEVEL_NAMES if not taught[name]]):
        found.append(f"No patch of level {', '.join(untaught)} was in training: the networks can never predict it.")
    if known.keys:
        found += _caveats_of_counts(known)
        if unlabelled := len(predictions.keys) - len(known.keys):
            found.append(f"{unlabelled} of {len(predictions.keys)} patches have no level and are not scored.")
    else:
        found += ["No patch of this split has a level: there is nothing to score."] if taught_labels else []
        if (groups := len(set(predictions.groups))) < FEW_GROUPS:
            found.append(f"Slides or source patches that ask: only {groups}. The intervals mean little.")
    found += [caveat for manifest in shards.manifests for caveat in manifest.caveats]
    found.append(
        "This is an independent design of what the abstract of LGD-Net (arXiv:2602.17793) states: no number here is "
        "the paper's. It is for research and not for diagnosis."
    )
    return list(dict.fromkeys(found))


def _caveats_of_counts(known: Predictions) -> list[str]:
    found = []
    patches = np.bincount(known.level, minlength=len(LEVEL_NAMES))
    behind = Counter(level for _, level in set(zip(known.groups, known.level.tolist(), strict=True)))
    groups = len(set(known.groups))
    if groups < FEW_GROUPS:
        found.append(f"Slides or source patches that are scored: only {groups}. The intervals mean little.")
    if few := [f"{LEVEL_NAMES[level]} ({behind[level]})" for level in sorted(behind) if behind[level] < FEW_OF_A_LEVEL]:
        found.append(
            f"Levels that come from very few slides or source patches: {', '.join(few)}. Their sensitivity is that of "
            "these alone."
        )
    if absent := [name for name, count in zip(LEVEL_NAMES, patches, strict=True) if not count]:
        found.append(f"No patch of level {', '.join(absent)} is scored: no metric covers such patches.")
    if 0 < patches[0] < FEW_LEVEL_0:
        found.append(f"Patches of level 0 that are scored: only {patches[0]}. Telling 0 from 1+ is hardly measured.")
    return found


def colour_shortcut_caveats(models: Sequence[ModelScores], differences: Sequence[Difference]) -> list[str]:
    """Where stain and background go with the level, a network may have learnt them and not the tissue."""
    found = []
    for model in models:
        kappa = model.by_patch.metrics["kappa"]
        if model.name == COLOUR and kappa.low is not None and kappa.low > 0:
            found.append(
                "Stain and background alone, without any shape, predict the level with a kappa of "
                f"{format_interval(kappa)} here. A network can learn them too, and loses that on slides of another "
                "laboratory or scanner."
            )
    for row in differences:
        kappa = row.metrics["kappa"]
        if row.minus == COLOUR and kappa.low is not None and kappa.low <= 0:
            found.append(
                f"{row.of} is not shown to beat stain and background alone: its kappa minus theirs is "
                f"{format_interval(kappa, '+.3f')}."
            )
    return found


def chance_retrieval_caveats(retrieval: Retrieval | None) -> list[str]:
    """Levels can look well while all latents are alike: the mean of the teacher's is a fair guess of each."""
    owns = [(row.name, row.own_pair) for row in retrieval.embeddings if row.own_pair] if retrieval else []
    return [
        f"{name}: they find their own IHC no better than by chance. Nothing of the IHC was learnt that distinguishes "
        "one patch from another, and what queries find means little."
        for name, own in owns
        if own.mean_rank.high is not None and own.mean_rank.high >= own.chance_median_rank
    ]


def colour_only(training: Sequence[Shard], scored: Sequence[Shard], threads: int) -> Predictions | None:
    """Fit on the labelled patches of some shards, and score all patches of others in their order.

    None where training has labels of fewer than two levels: nothing can be fitted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _, _, level_n, colour_n9 = _colours(training, threads, _FIT_ROWS)
    labelled_n = level_n >= 0
    if len(np.unique(level_n[labelled_n])) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(colour_n9[labelled_n], level_n[labelled_n])
    keys, groups, level_n, colour_n9 = _colours(scored, threads)
    probability_n4 = np.zeros((len(keys), len(LEVEL_NAMES)))
    if keys:
        probability_n4[:, model.classes_] = model.predict_proba(colour_n9)
    return Predictions(name=COLOUR, keys=keys, groups=groups, level=level_n, probability=probability_n4)


def _colours(shards: Sequence[Shard], threads: int, most: int = 0) -> tuple[list[str], list[str], Ints, Floats]:
    """Key, group, level and colour of all patches, or of `most` evenly spaced ones."""
    reader = Reader(shards, ("he",), _SIZE)
    rows = range(0, reader.total, max(1, -(-reader.total // most)) if most else 1)
    keys, groups, levels, colours = [], [], [], [np.empty((0, 9))]
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
