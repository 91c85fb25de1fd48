"""LGD's table of published encoders, `encoders.yaml`: what must be known of one beside its files, and its terms.

Files on the hub are often stale, and some lack what the network cannot be built without. A row states what the
authors, or programs that use the encoder, state; no row was tried with the real weights. The config of a run goes
before the table, and the table before an encoder's own files.
"""

import functools
import importlib.resources
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from lgd.base.errors import ConfigError
from lgd.base.plain_yaml import read_yaml
from lgd.base.records import Line, Record
from lgd.config import Config
from lgd.config_sections import Pool
from lgd.models.spec import EncoderMpp, Facts, Mean, Size, Std

STATED = ("pool", "mean", "std", "mpp", "arguments")
"""The fields of a config that state something of an encoder."""


_OTHERWISE = {"univ1": "uni", "univ2": "uni2h", "uni2": "uni2h", "conchv1": "conch", "phikonv1": "phikon"}
_OTHERWISE |= {"conchv15": "conch15"}
"""What TRIDENT and STAMP call some encoders, of letters and digits alone."""


class Known(Record):
    """A row of the table; None where a fact is not known."""

    name: Line
    """As it is known."""
    load: Line
    """The name that loads it, or, where none does, what its authors' code calls it."""
    instead: Line | None = None
    """What to do where LGD cannot load it."""
    arguments: dict[str, object] = Field(default_factory=dict)
    px: Size | None
    mpp: EncoderMpp | None
    """Micrometres a pixel; None where it is not known, or the encoder was trained at several."""
    mean: Mean | None
    std: Std | None
    pool: Pool | None
    dim: Annotated[int, Field(ge=1)] | None
    """Length of the pooled vector."""
    licence: Line | None
    gate: Line
    """Whether terms must be accepted before the weights can be had."""
    source: Line
    checked: Line
    """When, and how."""

    @property
    def facts(self) -> Facts:
        """What it states of the encoder."""
        return Facts(
            pool=self.pool,
            mean=self.mean,
            std=self.std,
            size=self.px,
            mpp=self.mpp,
            licence=self.licence,
            arguments=self.arguments,
        )


@functools.cache
def read_table() -> tuple[Known, ...]:
    """All rows."""
    text = (importlib.resources.files("lgd.models") / "encoders.yaml").read_text("utf-8")
    content = read_yaml(text).value
    shared: dict[str, dict[str, object]] = content["shared"]
    return tuple(Known.from_json({**shared.get(row.pop("like", ""), {}), **row}) for row in content["encoders"])


def stated_in(config: Config, section: Literal["teacher", "student"]) -> Facts:
    """What a run's config states of an encoder; `ConfigError` for what none can have."""
    values = getattr(config, section)
    try:
        return Facts.from_json({name: getattr(values, name) for name in STATED if hasattr(values, name)})
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


def state_inputs(config: Config, section: Literal["teacher", "student"]) -> dict[str, JsonValue]:
    """What of it a result depends on; nothing where the config states nothing."""
    return {name: value for name, value in stated_in(config, section).as_json().items() if value not in (None, {})}


def find_known(name: str) -> Known | None:
    """The row of a name, at whatever revision; None where there is none."""
    plain = _plain(name)
    return next((row for row in read_table() if _plain(row.load) == plain), None)


def find_published(name: str) -> Known | None:
    """The row of an encoder by whatever a tool calls it, such as uni_v2 or hoptimus0; None where there is none."""
    asked = {_letters(name), _letters(_plain(name).rpartition("/")[2])}
    asked |= {_OTHERWISE[one] for one in asked if one in _OTHERWISE}
    rows = ((row, {_letters(row.name), _letters(_plain(row.load).rpartition("/")[2])}) for row in read_table())
    return next((row for row, names in rows if names & asked), None)


def look_up(name: str) -> Facts:
    """What the table states of an encoder; `ValueError` with what to do for one that LGD cannot load."""
    row = find_known(name)
    if row is None:
        return Facts()
    if row.instead:
        raise ValueError(f"LGD cannot load {row.name}: {row.instead}")
    return row.facts


def _letters(name: str) -> str:
    """A name without what tools write in different ways."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _plain(name: str) -> str:
    """The hub knows no case, and a revision is not part of a row."""
    return name.partition("@")[0].lower()
