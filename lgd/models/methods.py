"""How a student is trained: a class a method, and the one registry that holds them.

A method says what it needs from the feature store, which network it trains and from which weights, its losses, and its
name in a table. A baseline is added here and nowhere else. One in another package is named
`python:package.module:name`, in `student.method`:

    class Consistent(Method):
        title = "consistent"

        def losses(self, out, batch):
            return super().losses(out, batch) | {"spread": out["features"].float().var(dim=1)}

        def weights(self, progress):
            return {"level": 1.0, "spread": 0.1 * progress}
"""

from collections.abc import Mapping

from pydantic import JsonValue

from lgd.base.errors import ConfigError, require
from lgd.base.extensions import FORM, is_python, load_object
from lgd.base.target import Target
from lgd.config import Config
from lgd.models import losses
from lgd.models.known import state_inputs
from lgd.models.losses import Lesson, Terms
from lgd.models.method import DISTIL
from lgd.models.method import LgdNet as LgdNet
from lgd.models.method import Method as Method
from lgd.models.student import Outputs, TwoStreamStudent
from lgd.shards.manifest import Values


class HeOnly(Method):
    """The morphology stream alone."""

    title = "H&E-only"
    retrieves_by = "features"


class TwoStream(Method):
    """The fused network, both encoders from the same start, taught the label only."""

    title = "two streams"
    network = TwoStreamStudent

    def fields(self) -> tuple[str, ...]:
        return ("hallucination",)

    def inputs(self) -> dict[str, JsonValue]:
        stated = {f"teacher_{name}": value for name, value in state_inputs(self.config, "teacher").items()}
        return super().inputs() | {"teacher_encoder": self.config.teacher.encoder} | stated


class Distil(Method):
    """The same network, also taught the labels that the teacher gives, and no latents (label-only distillation)."""

    title = "label distillation"
    network = TwoStreamStudent
    # The teacher's labels are read off its stored latents.
    needs = ("pooled",)
    uses_soft_labels = True

    def __init__(self, config: Config, target: Target, values: Values | None = None) -> None:
        super().__init__(config, target, values)
        require(
            config.student.distil_weight > 0,
            f"student.method is {config.student.method} and student.distil_weight is 0: nothing would be distilled; "
            "set it to 1",
        )

    @classmethod
    def row_fields(cls, config: Config) -> Mapping[str, float | str]:
        return {"distil_weight": config.student.distil_weight or 1.0}

    def fields(self) -> tuple[str, ...]:
        return ("hallucination", *DISTIL)

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        soft_BK = self.soft_labels(batch.stored["pooled"])
        distilled_B = losses.distillation_loss(out["logits"], soft_BK, self.config.student.distil_temperature)
        return super().losses(out, batch) | {"distil": distilled_B}

    def weights(self, progress: float) -> dict[str, float]:
        return super().weights(progress) | {"distil": self.config.student.distil_weight}


METHODS: dict[str, type[Method]] = {"he-only": HeOnly, "two-stream": TwoStream, "distil": Distil, "lgd": LgdNet}
"""The methods by their names in `student.method`, in the order of a table."""
BASELINE, PROPOSED = "he-only", "lgd"
"""What each run is compared with, and what all of a comparison are."""
DISTILLATION = "distil"
"""What a gain of latents over the same teacher's labels is measured against."""


def find_method(name: str) -> type[Method]:
    """The method of a name, which is imported where it is outside LGD; `ConfigError` for an unknown one."""
    if not is_python(name):
        if name not in METHODS:
            raise ConfigError(f"student.method is {name!r:.120}: use one of {', '.join(METHODS)}, or {FORM}")
        return METHODS[name]
    method = load_object(name, "student.method")
    if isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "title", None), str):
        return method
    raise ConfigError(
        f"student.method is {name}, which is no method: derive it from lgd.models.methods.Method, with a `title`"
    )
