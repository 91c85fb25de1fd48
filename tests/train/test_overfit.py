"""Sixteen real pairs are learnt by heart: what stands between the pixels and the loss is whole."""

import numpy as np
import pytest

from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.train.launch import train_under


@pytest.mark.parametrize("hallucination", ["own", "shared"])
def test_sixteen_real_pairs_are_learnt_without_error(real_data, tissue_config, change, tmp_path, hallucination):
    root = real_data / "bci-thumbs"
    build(ShardOptions(layout="bci", root=str(root), out=str(tmp_path / "shards"), split="group:1,0,0", mpp=2.8))
    config = change(
        tissue_config,
        run={"dir": str(tmp_path)},
        data={"shards": [str(tmp_path / "shards")], "augment": "none"},
        teacher={"dir": str(tmp_path / "teacher"), "epochs": 60.0},
        latents={"dir": str(tmp_path / "latents")},
        student={"dir": str(tmp_path / "student"), "epochs": 100.0, "hallucination": hallucination},
        train={"batch": 8, "lr": 3e-3, "warmup": 0.2, "evaluate_every": 10_000},
    )
    shards = ShardSet.open(config.shard_dirs).of_split("train")
    assert sum(shard.samples for shard in shards) == 16
    assert train_under(config, "teacher")
    cache_latents(config, shards, workers=0)
    assert train_under(config, "student")
    for folder, kind in ((config.teacher.dir, "teacher"), (config.student.dir, "student")):
        scored, _ = score_shards(load_scorer(folder, kind), shards, threads=1)
        assert len(np.unique(scored.label)) >= 3
        assert (scored.answer == scored.label).all(), kind
