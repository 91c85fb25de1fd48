"""What a report holds in numbers: `metrics.json` and its parts, as `lgd evaluate` measures them."""

from typing import ClassVar, Literal

from pydantic import JsonValue

from lgd.base.records import Count, Line, Many, Measured, Record
from lgd.base.target import DEFAULT_TARGET, StatedTarget, Target, find_target
from lgd.io.documents import Document
from lgd.labels.conformal import Conformal, Coverage
from lgd.metrics import Interval
from lgd.shards.manifest import Values


class Agreement(Record):
    """How far predicted values lie from true ones (`lgd.report.agreement`)."""

    mean_difference: Interval
    lower_limit: Interval
    upper_limit: Interval


class Scores(Record):
    """How one model scored the patches, or the slides, whose label is known."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("agreement",)

    scored: Count
    groups: Count
    metrics: dict[str, Interval]
    confusion: Many[Many[Count]] | None
    """A row a true class, a column a predicted one; None of values."""
    agreement: Agreement | None = None
    """Of values."""


class AreaScores(Scores):
    """How one model scored slides by area, which gives no probability."""

    one_patch_decides: Count
    """Slides of so few patches that one alone raises the label."""


class ModelScores(Record):
    """One model by patch, and by slide in two ways; the ways are None where `no_slides` says why, and that by area also
    where the target knows no such rule.
    """

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


class Nearness(Interval):
    """Mean difference between the value of a query and those of its neighbours, over some queries."""

    chance: Measured
    """Of a random ranking."""
    best: Measured
    """Of the ranking by value."""
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


class Hubs(Record):
    """How evenly H&E queries find the IHCs of the scored split; the hundredth found most often are hubs."""

    hubs: Count
    first_answers: Interval
    """Share of the first answers that are hubs."""
    chance_first_answers: float
    answers: Interval
    """Share of the first `Retrieval.at` answers that are hubs of these."""
    chance_answers: float
    never_found: Interval
    """Share of the IHCs that are in no query's first `Retrieval.at` answers."""
    chance_never_found: float


class EmbeddingScores(Record):
    """What vectors of one kind find in the galleries."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("by_value",)

    name: str
    gallery: str
    by_level: dict[str, Precision]
    """`overall`, and the class of the queries; empty where labels are values."""
    own_pair: OwnPair | None
    hubs: Hubs | None
    by_value: Nearness | None = None
    """Where labels are values."""

    @property
    def asks(self) -> bool:
        """Whether any query has a label to compare with its neighbours'."""
        own = self.by_value or self.by_level["overall"]
        return own.queries > 0


class Retrieval(Record):
    """What retrieval is worth, by several embeddings."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("index", "index_recall")

    caveats: Many[str]
    at: Count
    """Neighbours behind an average precision or a mean difference, and answers behind hubs."""
    gallery_rows: Count
    embeddings: Many[EmbeddingScores]
    index: Line | None = None
    """Factory of the index that queries ask, where there is one."""
    index_recall: float | None = None
    """Share of their ten nearest latents that it gives to H&E queries of the student; None where it has none."""


class ChangeText(Record):
    """A change of the images in words: what it is, as the report describes it, and why it has these strengths."""

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


class AtSite(Record):
    """How one model scored the patches of a center, or of a scanner."""

    site: Line
    model: str
    scored: Count
    groups: Count
    metrics: dict[str, Interval]


class Association(Record):
    """How far the label goes with a site, over slides (`lgd.report.sites`)."""

    statistic: Literal["cramers_v", "eta_squared"]
    value: float
    chance: float
    """Mean of what is left where the labels of slides are drawn anew."""
    p: float
    """Share of such draws, the true one among them, that reach `value`."""
    slides: Count


class BySite(Record):
    """Scores by center, or by scanner."""

    kind: Literal["center", "scanner"]
    rows: Many[AtSite]
    association: Association | None
    """None where each slide is too much on its own to say."""
    trained: Many[Line] | None
    """Those of the training split; None where it was not looked at."""


class ModelSets(Record):
    """What the label sets of one model are worth; None by slide where slides have none."""

    name: str
    calibrated: Conformal
    by_patch: Coverage
    by_slide: Coverage | None


class Results(Document):
    """metrics.json; null stands where a number is undefined."""

    OPTIONAL: ClassVar[tuple[str, ...]] = (
        *("target", "values", "always_the_mean", "sites", "label_sets", "training_sites"),
    )

    FORMAT: ClassVar[str] = "lgd-report/3"
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
    """Labelled patches of each class, or of `known` values."""
    always_the_commonest_level: float | None
    """Accuracy of that; None of values."""
    slide_rules: dict[str, str]
    models: Many[ModelScores]
    differences: Many[Difference]
    retrieval: Retrieval | None
    robustness: Robustness | None

    # What follows is left out where it is None.
    target: StatedTarget | None = None
    """What is predicted; None for the default target."""
    values: Values | None = None
    """Of the labelled patches, where labels are values."""
    always_the_mean: float | None = None
    """MAE of always answering the mean of the training values."""
    sites: Many[BySite] | None = None
    label_sets: Many[ModelSets] | None = None
    """Of each model that has such sets; None where none has."""
    training_sites: dict[Line, dict[Line, Count]] | None = None
    """Center and scanner -> how many of the training patches that were looked at are of each; empty is unknown."""

    @property
    def predicted(self) -> Target:
        """What is predicted."""
        return self.target or find_target(DEFAULT_TARGET)


def state_target(target: Target) -> Target | None:
    """A target in a report, which does not state the default one."""
    return None if target == find_target(DEFAULT_TARGET) else target


def format_interval(interval: Interval, form: str = ".3f") -> str:
    """`0.712 [0.650, 0.770]`, a dash for what is undefined."""
    if interval.value is None:
        return "–"
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}} [–]"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def format_number(value: float | None) -> str:
    """A number, a dash for what is undefined."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:g}"
