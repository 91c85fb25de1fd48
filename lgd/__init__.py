"""LGD: scoring from H&E alone, of HER2 or another label, taught to hallucinate the latents of a frozen IHC teacher.

    import lgd

    rows = lgd.predict("runs/demo/student", ["he.png", array, image])
    score = lgd.score_slide("runs/demo/student", "slide.svs", "out")
    answers = lgd.query("runs/demo/student", "runs/demo/latents", "he.png", k=5)

What is listed here is the public API; it is imported on first use, so that `import lgd` costs nothing.
"""

import importlib
import logging
from typing import TYPE_CHECKING

# A program that imports lgd sees what it logs only where the program asks for it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lgd.config import Config as Config
    from lgd.config_files import load_config as load_config
    from lgd.retrieval.queries import query as query
    from lgd.scoring.predict import load_scorer as load_scorer
    from lgd.scoring.predict import predict as predict
    from lgd.scoring.slides import score_slide as score_slide
    from lgd.shards.builder import build_shards as build_shards
    from lgd.shards.shard_set import ShardSet as ShardSet
    from lgd.store.store import Store as Store

_MODULES = {
    "Config": "lgd.config",
    "ShardSet": "lgd.shards.shard_set",
    "Store": "lgd.store.store",
    "build_shards": "lgd.shards.builder",
    "load_config": "lgd.config_files",
    "load_scorer": "lgd.scoring.predict",
    "predict": "lgd.scoring.predict",
    "query": "lgd.retrieval.queries",
    "score_slide": "lgd.scoring.slides",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
