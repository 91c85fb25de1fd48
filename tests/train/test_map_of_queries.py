"""The map that queries go through, as training leaves it: that of numpy on the network and the pairs of the run."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lgd.base.errors import OnBad
from lgd.models.loading import load_student
from lgd.models.query_map import RIDGE
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.store.cache import cache_latents
from lgd.store.parts import read_all, read_labels
from lgd.store.store import Store
from lgd.stream.reader import Reader
from lgd.train.deepspeed_engine import deepspeed_problem
from lgd.train.launch import train_under, worker
from lgd.train.targets import partners
from tests.support.forks import run_ranks
from tests.support.sockets import free_ports

needs_deepspeed = pytest.mark.skipif(deepspeed_problem() is not None, reason=str(deepspeed_problem()))


@pytest.fixture(scope="module")
def base(tissue, tissue_run, change, tmp_path_factory):
    """The teacher of `tissue_run`, and a store of shards of seven that have few levels. Do not change its folder."""
    folder = tmp_path_factory.mktemp("map")
    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.5,0.25,0.25", "labelled": 1}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(folder / "shards"), shard_size=7, mpp=0.46, **split))
    config = change(
        tissue_run,
        run={"dir": str(folder / "run")},
        data={"shards": [str(folder / "shards")]},
        latents={"dir": str(folder / "latents")},
    )
    cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
    return config


def naive_map(config, without=()):
    """Streams -> latents: ridge regression in float64 on all pairs of the training split but those of some numbers."""
    student, _ = load_student(config.student.dir)
    shards = ShardSet.open(config.shard_dirs).of_split("train")
    reader, parts = Reader(shards, ("he",), 64), Store(config.latents.dir).parts_of(shards)
    assert (read_labels(parts) < 0).any(), "unlabelled pairs count"
    numbers = [number for number in range(reader.total) if number not in without]
    images = np.stack([reader.read(number).images["he"] for number in numbers])
    with torch.no_grad():
        x = student(torch.from_numpy(images).permute(0, 3, 1, 2))["streams"].numpy().astype(np.float64)
    source = np.arange(reader.total)
    if config.student.pairs != "own":
        source = partners(read_labels(parts), config.student.pairs == "within-level", config.run.seed)
    y = read_all(parts, "pooled")[:, 0].astype(np.float64)[source[numbers]]
    mean, scale = x.mean(0), x.std(0)
    scale[scale <= 1e-6 * abs(mean)] = np.inf
    z = (x - mean) / scale
    weights = np.linalg.solve(z.T @ z + RIDGE * len(x) * np.eye(x.shape[1]), z.T @ (y - y.mean(0)))
    return student.query_map, lambda streams: (streams - mean) / scale @ weights + y.mean(0), x


def assert_as_naive(config, without=()):
    fitted, naive, streams = naive_map(config, without)
    expected = naive(streams)
    with torch.no_grad():
        found = fitted(torch.from_numpy(streams)).numpy()
    # Float32 sums in another order, and the network in batches of another size.
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.std())
    assert expected.std(0).max() > 0


def student_of(base, change, tmp_path, **sections):
    own = {"dir": str(tmp_path / "student"), "epochs": 1.2} | sections.pop("student", {})
    return change(base, student=own, **sections)


@pytest.mark.parametrize("pairs", ["own", "shuffled", "within-level"])
def test_it_is_fitted_on_the_pairs_that_taught(base, change, tmp_path, pairs):
    config = student_of(base, change, tmp_path, student={"pairs": pairs})
    assert train_under(config, "student")
    assert_as_naive(config)


@pytest.fixture(scope="module")
def aligned(base, change, tissue, tmp_path_factory):
    """As `base`, of a CSV: the first pair is misaligned, the alignment of the second unknown, the others aligned."""
    folder = tmp_path_factory.mktemp("aligned")
    for stain in ("HE", "IHC"):
        shutil.copytree(tissue / stain, folder / stain)
    rows = ["he,ihc,level,slide,split,alignment"]
    for number, line in enumerate((tissue / "truth.csv").read_text().splitlines()[1:]):
        key, slide, split, level = line.split(",")[:4]
        files = [f"{stain}/{split}/{key}.png" for stain in ("HE", "IHC")]
        rows.append(f"{files[0]},{files[1]},{level},{slide},{split},{ {0: '-0.5', 1: ''}.get(number, '2.5') }")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(folder / "pairs.csv"), out=str(folder / "shards"), mpp=0.46, labelled=1))
    config = change(
        base,
        run={"dir": str(folder / "run")},
        data={"shards": [str(folder / "shards")]},
        latents={"dir": str(folder / "latents")},
    )
    cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
    return config


def test_a_misaligned_pair_counts_neither_in_training_nor_in_the_map(aligned, change, tmp_path, caplog):
    """Its weight reaches both through KEY.json."""
    reader = Reader(ShardSet.open(aligned.shard_dirs).of_split("train"), ("he",))
    metas = [reader.read(number).meta for number in range(reader.total)]
    (misaligned,) = (number for number, meta in enumerate(metas) if meta.alignment == -0.5)
    assert [meta.alignment for meta in metas].count(None) == 1
    config = student_of(aligned, change, tmp_path, student={"full_alignment": 2.0})
    assert train_under(config, "student")
    assert_as_naive(config, without=[misaligned])
    assert "changes nothing" not in caplog.text
    plain = student_of(aligned, change, tmp_path, student={"dir": str(tmp_path / "plain")})
    assert train_under(plain, "student")
    digests = [load_student(one.student.dir)[1].weights_sha256 for one in (config, plain)]
    assert digests[0] != digests[1]


def test_weights_of_pairs_without_alignment_are_said_to_change_nothing(base, change, tmp_path, caplog):
    plain = student_of(base, change, tmp_path, student={"dir": str(tmp_path / "plain")})
    weighed = student_of(base, change, tmp_path, student={"full_alignment": 2.0})
    assert train_under(plain, "student") and "alignment" not in caplog.text
    assert train_under(weighed, "student")
    assert "student.full_alignment is 2, and none of the first 8 pairs has an alignment" in caplog.text
    digests = [load_student(config.student.dir)[1].weights_sha256 for config in (plain, weighed)]
    assert digests[0] == digests[1]


def test_a_sample_that_training_skips_is_left_out(base, change, tmp_path):
    shutil.copytree(base.shard_dirs[0], tmp_path / "shards")
    shard = ShardFolder.open(tmp_path / "shards").shards[0]
    assert shard.split == "train"
    entry = shard.open()[1][3, shard.roles.index("he")]
    config = student_of(
        base, change, tmp_path, data={"shards": [str(tmp_path / "shards")], "on_bad": OnBad(1)}, student={"epochs": 3}
    )
    with shard.path.open("r+b") as file:
        file.seek(int(entry["offset"]) + int(entry["length"]) // 2)
        file.write(b"\0\1\2\3")
    assert train_under(config, "student")
    assert_as_naive(config, without=[3])


def test_a_student_that_hallucinates_nothing_has_none(base, change, tmp_path):
    config = student_of(base, change, tmp_path, student={"method": "distil", "distil_weight": 1.0})
    assert train_under(config, "student")
    student, _ = load_student(config.student.dir)
    assert not [name for name in student.state_dict() if "query" in name]


def rank_main(rank, size, port, *arguments):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    worker(*arguments, stop=None)


@pytest.mark.parametrize("stage", [None, *(pytest.param(number, marks=needs_deepspeed) for number in (1, 3))])
def test_several_processes_fit_it_together(base, change, tmp_path, stage):
    """With parameters that are partitioned, a forward pass is one of all ranks."""
    config = student_of(base, change, tmp_path)
    if stage is not None:
        config = change(config, train={"engine": "deepspeed"})
        config = replace(config, deepspeed={"zero_optimization": {"stage": stage}})
    (port,) = free_ports(1)
    arguments = (config, ShardSet.open(config.shard_dirs), "student")
    run_ranks(rank_main, 2, 2, port, *arguments)
    assert (Path(config.student.dir) / "config.json").is_file()
    assert_as_naive(config)
