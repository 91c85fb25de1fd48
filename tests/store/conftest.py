"""A store of many small parts, and how it is filled."""

import shutil
from pathlib import Path

import pytest
from filling import contents_of

from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents


@pytest.fixture(scope="module")
def small_parts(tissue, tissue_run, change, tmp_path_factory):
    """A run with the teacher of `tissue_run` over 25 shards of two patches, its store filled. Do not change it."""
    from lgd.shards.builder import build
    from lgd.shards.options import ShardOptions

    folder = tmp_path_factory.mktemp("small")
    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.5,0.25,0.25"}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(folder / "shards"), shard_size=2, mpp=0.46, **split))
    config = change(tissue_run, data={"shards": [str(folder / "shards")]}, latents={"dir": str(folder / "latents")})
    cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
    return config


@pytest.fixture
def copy_of(small_parts, change, tmp_path):
    """The run of `small_parts` with a copy of its store, to damage."""
    shutil.copytree(small_parts.latents.dir, tmp_path / "latents")
    return change(small_parts, latents={"dir": str(tmp_path / "latents")})


@pytest.fixture(scope="module")
def contents(small_parts):
    """Layer/name -> content of every file of the undisturbed parts."""
    return contents_of(Path(small_parts.latents.dir))
