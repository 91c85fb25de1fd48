"""What a reader must know before believing a score: computed from the data, from the scores and from retrieval."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lgd.base.target import Target
from lgd.labels.measures import Measures
from lgd.labels.predictions import Predictions
from lgd.models.description import TeacherConfig
from lgd.report.colour import COLOUR
from lgd.report.columns import name_briefly
from lgd.report.results import Difference, ModelScores, Retrieval, format_interval
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.layouts import LAYOUTS
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import ProbeDocument

ONE_TRAINING = (
    "One training of each network stands behind these scores, and another one moves them: no difference between "
    "networks is shown here. lgd ablate --seeds N trains each several times."
)
UNTAUGHT = (
    "No patch of the training split had a label: the network gives no {}, nothing is scored, and what it "
    "hallucinates is measured by retrieval alone."
)
PROBE_ROW = f"{TEACHER_ROW}, probe"
"""The row of a teacher that no label taught."""
UNTAUGHT_TEACHER = (
    "No label taught the teacher, and too few labels are there to read {}s off its latents: its row of scores is "
    "empty. What its latents are worth is measured by retrieval."
)
WITHOUT_TEACHER = (
    "{} of {} patches of this split have no second image (IHC): the teacher, which reads it, has no row here, and no "
    "query can look for its own IHC."
)
FEW_GROUPS = 10
"""Below this many slides a bootstrap interval means little."""
FEW_OF_A_CLASS = 3
"""Below this many slides a class's sensitivity is that of these slides."""
FEW_LOWEST = 50
"""Below this many patches of the lowest class its sensitivity and AUC mean little."""


def probe_caveat(probe: ProbeDocument, teacher: TeacherConfig | None, target: Target) -> str:
    """What must be known of the row of a teacher that learnt no label; None is one that was not made here."""
    word, soft = target.label_word, "" if target.is_number else "soft "
    model = "ridge" if target.is_number else "logistic"
    taught = "it is a pretrained encoder as it is"
    if teacher and teacher.learns:
        taught = f"it learnt {' and '.join(teacher.learns)}, and no label"
    elif teacher and teacher.source == "random":
        taught = "its weights are random, and nobody trained it"
    return (
        f"{PROBE_ROW}: no label taught the teacher ({taught}). Its {word}s are those of a {model} regression on its "
        f"latents of {probe.describe()}. What the latents hold beyond a linear map it does not show, and students that "
        f"are taught {soft}{word}s are taught these."
    )


def caveats_of(shards: ShardSet, predictions: Predictions, taught_labels: bool = True) -> list[str]:
    """What a reader must know before believing a score of `predictions` on a run's shards, most serious first.

    Without `taught_labels` the labels of predictions are unknown, whatever the patches have.
    """
    target, word = predictions.target, predictions.target.label_word
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
            f"and recognising the slide then passes for scoring {target.name}. The intervals treat the patches of a "
            "slide as independent and are too narrow."
        )
    # Some group has several patches, and no group has patches of two labels.
    pairs = set(zip(known.groups, known.label.tolist(), strict=True))
    shared = len(pairs) == len(set(known.groups)) < len(known.keys)
    if known.keys and (any(layout.labels_slides for layout in layouts) or shared) and not virtual:
        found.append(
            f"A {word} is that of the whole slide, not of the patch: a patch can look unlike its {word}, and its score "
            "cannot be checked against the brown on it."
        )
    if not virtual:
        found += [caveat for layout in layouts for caveat in layout.caveats]
    if target.is_number:
        found += _caveats_of_values(shards, known)
    else:
        found += _caveats_of_training(shards, target)
    if known.keys:
        found += _caveats_of_counts(known)
        if unlabelled := len(predictions.keys) - len(known.keys):
            found.append(f"{unlabelled} of {len(predictions.keys)} patches have no {word} and are not scored.")
    else:
        found += [f"No patch of this split has a {word}: there is nothing to score."] if taught_labels else []
        if (groups := len(set(predictions.groups))) < FEW_GROUPS:
            found.append(f"Slides or source patches that ask: only {groups}. The intervals mean little.")
    found += [caveat for manifest in shards.manifests for caveat in manifest.caveats]
    found.append(
        "This is an independent design of what the abstract of LGD-Net (arXiv:2602.17793) states: no number here is "
        "the paper's. It is for research and not for diagnosis."
    )
    return list(dict.fromkeys(found))


def _caveats_of_training(shards: ShardSet, target: Target) -> list[str]:
    splits = [manifest.splits["train"] for manifest in shards.manifests if "train" in manifest.splits]
    taught = {name: sum(split.labels.get(name, 0) for split in splits) for name in target.classes}
    lacking = [name for name in target.classes if not taught[name]]
    if not 0 < len(lacking) < len(target.classes):
        return []
    word = target.label_word
    return [f"No patch of {word} {', '.join(lacking)} was in training: the networks can never predict it."]


def _caveats_of_counts(known: Predictions) -> list[str]:
    target, word, found = known.target, known.target.label_word, []
    groups = len(set(known.groups))
    if groups < FEW_GROUPS:
        found.append(f"Slides or source patches that are scored: only {groups}. The intervals mean little.")
    if target.is_number:
        return found
    names = target.classes
    patches = np.bincount(known.label.astype(np.int64), minlength=len(names))
    behind = Counter(label for _, label in set(zip(known.groups, known.label.tolist(), strict=True)))
    if few := [f"{names[label]} ({behind[label]})" for label in sorted(behind) if behind[label] < FEW_OF_A_CLASS]:
        found.append(
            f"{word.capitalize()}s that come from very few slides or source patches: {', '.join(few)}. Their "
            "sensitivity is that of these alone."
        )
    if absent := [name for name, count in zip(names, patches, strict=True) if not count]:
        found.append(f"No patch of {word} {', '.join(absent)} is scored: no metric covers such patches.")
    if target.is_ordered and 0 < patches[0] < FEW_LOWEST:
        found.append(
            f"Patches of {word} {names[0]} that are scored: only {patches[0]}. Telling {names[0]} from {names[1]} is "
            "hardly measured."
        )
    return found


def _caveats_of_values(shards: ShardSet, known: Predictions) -> list[str]:
    """Where the values that are scored lie outside those of training, or do not vary."""
    target, word, taught, found = known.target, known.target.label_word, shards.summarise_values("train"), []
    if taught is not None and taught.least == taught.most:
        found.append(
            f"Every training {word} is {target.format_label(taught.least)}: the networks learnt to answer that, "
            "whatever they see."
        )
    elif taught is not None:
        for beyond, bound, side in (
            (known.label > taught.most, taught.most, "above"),
            (known.label < taught.least, taught.least, "below"),
        ):
            if count := int(beyond.sum()):
                found.append(
                    f"No training {word} is {side} {target.format_label(bound)}, and {count} of {len(known.keys)} "
                    "scored patches are: how the networks answer to such was never taught."
                )
    if known.keys and len(np.unique(known.label)) == 1:
        alike = target.format_label(float(known.label[0]))
        found.append(f"Every scored {word} is {alike}: no correlation is defined, and a constant answer would do.")
    return found


def colour_shortcut_caveats(
    models: Sequence[ModelScores], differences: Sequence[Difference], measures: Measures
) -> list[str]:
    """Where stain and background go with the label, a network may have learnt them and not the tissue."""
    # By a metric that chance gives 0 of, and by the one of comparisons.
    above_chance = "pearson" if measures.target.is_number else "kappa"
    main, sign = measures.main, -1 if measures.main in measures.lower_is_better else 1
    found = []
    for model in models:
        score = model.by_patch.metrics[above_chance]
        if model.name == COLOUR and score.low is not None and score.low > 0:
            found.append(
                f"Stain and background alone, without any shape, predict the {measures.target.label_word} with a "
                f"{name_briefly(measures, above_chance)} of {format_interval(score)} here. A network can learn them "
                "too, and loses that on slides of another laboratory or scanner."
            )
    for row in differences:
        less = row.metrics[main]
        if row.minus != COLOUR or less.low is None or less.high is None:
            continue
        if min(sign * less.low, sign * less.high) <= 0:
            found.append(
                f"{row.of} is not shown to beat stain and background alone: its {name_briefly(measures, main)} "
                f"minus theirs is {format_interval(less, '+.3f')}."
            )
    return found


def chance_retrieval_caveats(retrieval: Retrieval | None) -> list[str]:
    """Labels can look well while all latents are alike: the mean of the teacher's is a fair guess of each."""
    owns = [(row.name, row.own_pair) for row in retrieval.embeddings if row.own_pair] if retrieval else []
    return [
        f"{name}: they find their own IHC no better than by chance. Nothing of the IHC was learnt that distinguishes "
        "one patch from another, and what queries find means little."
        for name, own in owns
        if own.mean_rank.high is not None and own.mean_rank.high >= own.chance_median_rank
    ]
