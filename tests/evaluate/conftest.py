"""A store of known vectors, without images."""

import numpy as np
import pytest

from lgd.data.archive import Shard
from lgd.store.index import build_index
from lgd.store.latents import Store, commit
from lgd.store.parts import part_writer

RECIPE = {"teacher": "a" * 64}


@pytest.fixture(scope="session")
def write_store():
    """Write and index a store; a part is its split and rows of (key, slide, level, vector)."""

    def write(folder, parts, gallery=("train",)) -> Store:
        shards = []
        for number, (split, rows) in enumerate(parts):
            name = f"{split}-{number:06d}"
            shard = Shard(
                path=folder / f"{name}.tar",
                name=name,
                split=split,
                samples=len(rows),
                bytes=1,
                sha256=f"{number:064x}",
                extensions={},
            )
            keys, slides, levels, vectors = zip(*rows, strict=True)
            with part_writer(folder, shard, RECIPE) as writer:
                writer.add(
                    {
                        "pooled": np.array(vectors, np.float16)[:, None],
                        "level": np.array(levels, np.int8),
                        "key": np.array(keys, "S"),
                        "slide": np.array(slides, f"S{max(1, *map(len, slides))}"),
                    }
                )
            shards.append(shard)
        store = commit(folder, RECIPE, shards, {"shards": [str(folder / "gone")], "teacher": ""})
        build_index(store, "Flat", list(gallery), recall=0.99, seed=0)
        return store

    return write
