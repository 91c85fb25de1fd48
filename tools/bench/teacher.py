"""A teacher for `decode`, trained on virtual tissue in a minute or two.

Its patches are 256 px wide and shrunk by the factor by which `decode` shrinks the large ones, so it sees the same
magnification: drawing and training on 1024 px would take 16 times as long and teach a fully convolutional encoder
with a mean over its map nothing else.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from lgd.config_files import load_config
from lgd.io.files import read_json
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.train.launch import train_under
from tools.bench.measure import Settings

_SIDE = 256


def train_teacher(settings: Settings, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Train a teacher under `folder`; returns its folder, and what it was trained on."""
    began = time.monotonic()
    tissue, shards, run = folder / "tissue", folder / "tissue-shards", folder / "teacher-run"
    size = max(32, _SIDE * settings.size // settings.side)
    options = {
        "run.dir": run,
        "data.shards": shards,
        "data.size": size,
        "data.threads": settings.workers,
        "teacher.epochs": settings.epochs,
        "train.workers": 0,
        "train.engine": "torch",
        "train.batch": 16,
        # As in configs/demo.yaml: from random weights a short warm-up keeps the loss at chance for longer.
        "train.lr": 3e-3,
        "train.warmup": 0.3,
    }
    # Training tells its progress, which must not mix with results.
    with contextlib.redirect_stdout(sys.stderr):
        synthesise(SynthOptions(out=str(tissue), pairs=settings.lessons, size=_SIDE, seed=1, workers=settings.workers))
        truth = str(tissue / "truth.csv")
        build(ShardOptions(layout="bci", root=str(tissue), out=str(shards), split="keep:0.2", slides=truth, mpp=0.46))
        train_under(load_config(overrides=[f"--{name}={value}" for name, value in options.items()]), "teacher")
    model = read_json(run / "teacher" / "config.json")
    return run / "teacher", {
        "trained_on": f"{settings.lessons} virtual patches of {_SIDE} px, shrunk to {size}",
        "epochs": settings.epochs,
        "validation": model["validation"],
        "seconds": round(time.monotonic() - began, 1),
    }
