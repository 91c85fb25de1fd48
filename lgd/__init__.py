"""LGD: HER2 scoring from H&E alone, taught to hallucinate the latents of a frozen IHC teacher.

    import lgd

    rows = lgd.predict("runs/demo/student", ["he.png", array, image])
    answers = lgd.query("runs/demo/student", "runs/demo/latents", "he.png", k=5)

What is listed here is the public API; it is imported on first use, so that `import lgd` costs nothing.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

# A program that imports lgd sees what it logs only where the program asks for it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lgd.config import Config
    from lgd.data.shard_set import ShardSet
    from lgd.data.shards import build_shards
    from lgd.evaluate.predict import load_scorer, predict
    from lgd.evaluate.retrieve import query
    from lgd.options import load_config
    from lgd.store.latents import Store

__all__ = [
    "Config",
    "ShardSet",
    "Store",
    "__version__",
    "build_shards",
    "load_config",
    "load_scorer",
    "predict",
    "query",
]

_MODULES = {
    "Config": "lgd.config",
    "ShardSet": "lgd.data.shard_set",
    "Store": "lgd.store.latents",
    "build_shards": "lgd.data.shards",
    "load_config": "lgd.options",
    "load_scorer": "lgd.evaluate.predict",
    "predict": "lgd.evaluate.predict",
    "query": "lgd.evaluate.retrieve",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
