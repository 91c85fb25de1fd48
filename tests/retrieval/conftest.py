"""A store of known vectors, without images."""

import numpy as np
import pytest
from filling import RECIPE

from lgd.base.target import find_target
from lgd.retrieval.index import build_index
from lgd.shards.archive import Shard
from lgd.store.commit import commit
from lgd.store.store import Store
from lgd.store.writer import shard_writer


@pytest.fixture(scope="session")
def write_store():
    """Write and index a store; a part is its split and rows of (key, slide, level, vector), level -1 for unknown."""

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
                idx_sha256="0" * 64,
                extensions={},
                keeps_files=True,
                target=find_target("her2"),
            )
            keys, slides, levels, vectors = zip(*rows, strict=True)
            with shard_writer(folder, shard, RECIPE) as writer:
                writer.add(
                    {
                        "pooled": np.array(vectors, np.float16)[:, None],
                        "label": np.array([np.nan if level < 0 else level for level in levels], np.float32),
                        "key": np.array(keys, "S"),
                        "slide": np.array(slides, f"S{max(1, *map(len, slides))}"),
                    }
                )
            shards.append(shard)
        store = commit(folder, RECIPE, shards, sources=[str(folder / "gone")])
        build_index(store, shards, "Flat", list(gallery), recall=0.99, seed=0)
        return store

    return write
