"""run.json of a run's folder: what each stage was given, where it ran, and what it made (`lgd-run/1`)."""

import contextlib
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

import lgd
from lgd.base.environment import Environment
from lgd.metrics import Interval
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.io.documents import Document


Number = Annotated[float, Field(allow_inf_nan=False)]


class Trained(Record):
    """What training a teacher or a student came to."""

    weights_sha256: Sha256
    inputs: Sha256
    steps: Count
    engine: Line
    workers: Count
    validation: dict[Line, Number]


class Cached(Record):
    """What filling the feature store came to."""

    digest: Sha256
    rows: Count


class Indexed(Record):
    """What building the index came to."""

    factory: Line
    rows: Count
    recall_at_10: Number
    digest: Sha256


class Evaluated(Record):
    """What an evaluation came to: metrics by the models' names."""

    split: Line
    by_patch: dict[Line, dict[Line, Interval]]


class Ablated(Record):
    """What `lgd ablate` was asked for."""

    seeds: Count
    full: bool
    split: Line


Facts = Trained | Cached | Indexed | Evaluated | Ablated


class Stage(Record):
    """A stage that ended well."""

    folder: Line
    """What it made; a later stage of this name that makes the same takes this one's place."""
    verb: Line
    """The verb that was called; empty where Python called."""
    given: dict[Line, JsonValue]
    """Fields of the command line, and its `config` files."""
    differing: dict[Line, JsonValue]
    """Fields that are not as in config.yaml."""
    environment: Environment
    shards: dict[Line, Sha256]
    """Digests of the shard folders' manifests."""
    facts: Facts


class RunDocument(Document):
    """run.json: the stages by their names, of each name the newest last."""

    FORMAT: ClassVar = "lgd-run/1"
    ABSENT: ClassVar = "finish a stage of the run first"
    REMEDY: ClassVar = "move it elsewhere to keep what it says, and the next stage begins another"

    stages: dict[Line, Many[Stage]]
