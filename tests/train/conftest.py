"""A run of 200 steps over many small shards, for what may happen on its way."""

from dataclasses import replace

import pytest

from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.train.launch import train_under


@pytest.fixture(scope="session")
def long_run(tissue, tissue_config, change, tmp_path_factory):
    """A run of LGD-Net with a trained teacher and a filled store, and no student yet. Do not change its folder.

    Its training split has seven shards: three or more for each of two ranks.
    """
    from lgd.shards.builder import build
    from lgd.shards.options import ShardOptions

    folder = tmp_path_factory.mktemp("long")
    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.75,0.15,0.1"}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(folder / "shards"), shard_size=4, mpp=0.46, **split))
    config = change(
        tissue_config,
        run={"dir": str(folder / "run")},
        data={"shards": [str(folder / "shards")], "size": 32},
        teacher={"dir": str(folder / "teacher"), "epochs": 1},
        latents={"dir": str(folder / "latents"), "map": 1},
        train={"lr": 1e-4, "evaluate_every": 100},
    )
    train_under(config, "teacher")
    shards = ShardSet.open(config.shard_dirs).of_split("train")
    assert len(shards) >= 6
    cache_latents(config, [*shards, *ShardSet.open(config.shard_dirs).of_split("val")], workers=0)
    epochs = 200 * config.train.batch / sum(shard.samples for shard in shards)
    return change(config, student={"dir": str(folder / "student"), "epochs": epochs})


@pytest.fixture(scope="session")
def undisturbed(long_run):
    """`long_run` with its student trained in one go, in this process, by the plain PyTorch engine."""
    train_under(long_run, "student")
    return long_run


@pytest.fixture
def disturbed(long_run, change, tmp_path):
    """`disturbed(name, stage)`: the run of `long_run` in folders of its own, with a checkpoint every five steps.

    With a ZeRO stage the engine is DeepSpeed, else the plain one of PyTorch, unless `engine` is among the fields of
    `train` that are given.
    """

    def made(name="student", stage=None, **train):
        config = change(
            long_run,
            run={"dir": str(tmp_path / f"run-{name}")},
            student={"dir": str(tmp_path / name)},
            train={"checkpoint_every": 5, "engine": "torch" if stage is None else "deepspeed"} | train,
        )
        return config if stage is None else replace(config, deepspeed={"zero_optimization": {"stage": stage}})

    return made
