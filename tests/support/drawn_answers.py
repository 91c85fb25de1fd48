"""Predictions of drawn answers, to any target."""

import numpy as np

from lgd.base.target import Target, find_target
from lgd.labels.predictions import Predictions

HER2 = find_target("her2")
KI67 = find_target("ki67")
STATUS = find_target("her2-binary")
GRADE = Target(name="Grade", kind="ordinal", classes=("1", "2", "3", "4", "5"), unit=None)
SUBTYPE = Target(name="Subtype", kind="class", classes=("ductal", "lobular", "other"), unit=None)
HSCORE = Target(name="H-score", kind="number", classes=(), unit=None)
ALL = (HER2, KI67, STATUS, GRADE, SUBTYPE, HSCORE)


def draw_answers(target=HER2, name="LGD-Net", skill=1.0, slides=12, each=5, label=None, groups=None, **more):
    """A model of some skill on patches of slides that each have one class, or values near one."""
    random = np.random.default_rng(len(name))
    n = slides * each if label is None else len(label)
    if target.is_number:
        low, high = target.range or (0.0, 300.0)
        spread = high - low
        if label is None:
            of_slide = np.random.default_rng(99).uniform(low + 0.2 * spread, high - 0.2 * spread, slides)
            label = np.repeat(of_slide, each) + np.random.default_rng(98).normal(0, 0.05 * spread, n)
        label = np.asarray(label, np.float64)
        centre = low + spread / 2
        known = np.where(np.isnan(label), centre, label)
        share = skill / (1 + skill)
        output = centre + share * (known - centre) + random.normal(0, 0.1 * spread, n)
        output = np.where(np.isnan(label).all(), np.nan, output).clip(low, high)[:, None]
    else:
        label = np.repeat(np.arange(slides) % target.width, each) if label is None else np.asarray(label, np.int64)
        odds = np.exp(random.normal(size=(n, target.width)) + skill * np.eye(target.width)[np.maximum(label, 0)])
        output = odds / odds.sum(1, keepdims=True)
    groups = [f"s{row // each}" for row in range(n)] if groups is None else list(groups)
    keys = [f"patch-{row}" for row in range(n)]
    return Predictions(target=target, name=name, keys=keys, groups=groups, label=label, output=output, **more)
