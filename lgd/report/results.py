"""What a report holds in numbers: `metrics.json` and its parts, as `lgd evaluate` measures them."""

from typing import ClassVar

from pydantic import JsonValue

from lgd.base.records import Count, Many, Measured, Record
from lgd.io.documents import Document
from lgd.metrics import Interval


class Scores(Record):
    """How one model scored the patches, or the slides, whose level is known."""

    scored: Count
    groups: Count
    metrics: dict[str, Interval]
    confusion: Many[Many[Count]]
    """A row a true level, a column a predicted one."""


class AreaScores(Scores):
    """How one model scored slides by area, which gives no probability."""

    one_patch_decides: Count
    """Slides of so few patches that one alone raises the level."""


class ModelScores(Record):
    """One model by patch, and by slide in two ways; the ways are None where `no_slides` says why."""

    name: str
    by_patch: Scores
    by_slide: Scores | None
    by_area: AreaScores | None
    area_minus_mean: dict[str, Interval] | None
    no_slides: str | None


class Difference(Record):
    """The student's metrics minus those of another model, paired by patch."""

    of: str
    minus: str
    metrics: dict[str, Interval]


class Precision(Interval):
    """Mean average precision of some queries, beside that of a random ranking."""

    chance: Measured
    queries: Count


class OwnPair(Record):
    """At which rank H&E queries find their own IHC, beside a blind guess (whose mean rank is its median rank)."""

    queries: Count
    gallery: Count
    median_rank: float
    chance_median_rank: float
    mean_rank: Interval
    recall_at_1: Interval
    chance_recall_at_1: float
    recall_at_5: Interval
    chance_recall_at_5: float
    recall_at_10: Interval
    chance_recall_at_10: float


class EmbeddingScores(Record):
    """What vectors of one kind find in the galleries."""

    name: str
    gallery: str
    by_level: dict[str, Precision]
    """`overall`, and the level of the queries."""
    own_pair: OwnPair | None


class Retrieval(Record):
    """What retrieval is worth, by several embeddings."""

    caveats: Many[str]
    at: Count
    """Neighbours behind an average precision."""
    gallery_rows: Count
    embeddings: Many[EmbeddingScores]


class ChangeText(Record):
    """A change of the images in words: what it is, and why it has these strengths."""

    name: str
    what: str
    why: str


class AtStrength(Record):
    """Scores under a change at one strength."""

    strength: float
    label: str
    metrics: dict[str, Interval]
    minus_unchanged: dict[str, Interval]


class UnderChange(Record):
    """Scores under one change, by its strengths."""

    name: str
    at: Many[AtStrength]


class ModelRobustness(Record):
    """One model on the images as they are, and under each change."""

    name: str
    unchanged: dict[str, Interval]
    changes: Many[UnderChange]


class Robustness(Record):
    """Models on images as another scanner or laboratory would have made them."""

    seed: Count
    changes: Many[ChangeText]
    models: Many[ModelRobustness]


class Results(Document):
    """metrics.json; null stands where a number is undefined."""

    FORMAT: ClassVar[str] = "lgd-report/2"
    ABSENT: ClassVar[str] = "run lgd evaluate"
    REMEDY: ClassVar[str] = "run lgd evaluate again"

    caveats: Many[str]
    provenance: dict[str, JsonValue]
    """Its `command` is shown as the way to reproduce the report."""
    resamples: Count
    seed: Count
    patches: Count
    labelled: Count
    groups: Count
    levels: dict[str, Count]
    always_the_commonest_level: float | None
    slide_rules: dict[str, str]
    models: Many[ModelScores]
    differences: Many[Difference]
    retrieval: Retrieval | None
    robustness: Robustness | None
