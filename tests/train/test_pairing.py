"""Whose latents a sample is taught with, and what they are told apart from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import assert_same_curve, log_of

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.config import Config
from lgd.config_sections import Data, Train
from lgd.models.losses import Negatives
from lgd.models.methods import Distil, LgdNet
from lgd.models.teacher import load_teacher
from lgd.shards.shard_set import ShardFolder
from lgd.store.parts import read_all, read_labels
from lgd.store.store import Store
from lgd.stream.plan import Plan, World
from lgd.stream.reader import Reader
from lgd.train.batch import Batches
from lgd.train.launch import train_under
from lgd.train.log import Log
from lgd.train.targets import Queue, Targets, partners


@pytest.fixture(scope="module")
def shards(tissue_run):
    return [shard for shard in ShardFolder.open(tissue_run.shard_dirs[0]).shards if shard.split == "train"]


@pytest.fixture(scope="module")
def parts(tissue_run, shards):
    return Store(tissue_run.latents.dir).parts_of(shards)


@pytest.fixture
def lgd(tissue_run, change, tmp_path):
    """`lgd(name, **fields)`: `tissue_run` with another student."""

    def made(name, train=None, **fields):
        return change(tissue_run, student={"dir": str(tmp_path / name), **fields}, train=train or {})

    return made


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40), st.booleans(), st.integers(0, 5))
@settings(max_examples=100)
def test_partners_are_a_permutation_of_others_within_their_level(levels, within, seed):
    level_n = np.array(levels)
    partner_n = partners(level_n, within, seed)
    assert sorted(partner_n) == list(range(len(level_n)))
    if within:
        assert np.array_equal(level_n[partner_n], level_n)
    alone = np.array([(level_n == level).sum() == 1 if within else len(level_n) == 1 for level in level_n])
    assert np.array_equal(partner_n == np.arange(len(level_n)), alone)
    assert np.array_equal(partner_n, partners(level_n, within, seed))


@pytest.mark.parametrize("pairs", ["own", "shuffled", "within-level"])
def test_a_partner_gives_all_but_the_nuclei(parts, pairs):
    targets, own = Targets(parts, pairs, seed=3), Targets(parts)
    total = int(targets.first[-1])
    number_n = np.arange(total)
    part_n, row_n = targets.address(number_n)
    keys = [parts[p].array("key")[row].decode() for p, row in zip(part_n, row_n, strict=True)]
    found, plain = targets.read(part_n, row_n, keys), own.read(part_n, row_n, keys)
    source_n = targets.source(number_n)
    assert (pairs == "own") == np.array_equal(source_n, number_n)
    for name in plain:
        assert np.array_equal(found[name], plain[name] if name == "nuclei" else plain[name][source_n]), name
    if pairs == "within-level":
        level_n = read_labels(parts)
        assert np.array_equal(level_n[source_n], level_n)


@pytest.mark.parametrize("size", [5, 8, 11, 1000])
def test_the_queue_is_what_the_plan_took_last_wherever_a_run_goes_on(parts, size):
    plan = Plan([part.rows for part in parts], seed=1, lanes=4)
    targets, all_nD = Targets(parts), read_all(parts, "pooled")[:, 0].astype(np.float32)
    through = Queue(targets, plan, size, turn=False)
    for end in range(8, 64, 8):
        taken = through.negatives(np.array([3]), end)
        _, expected = plan.samples(np.arange(max(0, end - size), end))
        assert taken.number_Q.tolist() == expected.tolist()
        assert np.array_equal(taken.pooled_QD.numpy(), all_nD[expected])
        assert taken.label_Q.tolist() == read_labels(parts)[expected].tolist()
        fresh = Queue(targets, plan, size, turn=False).negatives(np.array([3]), end)
        assert all(torch.equal(one, two) for one, two in zip(taken, fresh, strict=True))


def test_ranks_and_micro_batches_have_the_same_queue(parts, shards):
    reader = Reader(shards, ("he",), 64)
    plan = Plan(reader.sizes, seed=1, lanes=4)

    def steps(world, accumulate):
        targets = Targets(parts)
        queue = Queue(targets, plan, 20, turn=True)
        config = Config(data=Data(threads=1), train=Train(batch=8, accumulate=accumulate))
        return list(Batches(config, reader, plan, world, targets, queue).draw(8, steps=3))

    whole = steps(World(), 1)
    for rank in (0, 1):
        for one, part in zip(whole, steps(World(rank=rank, size=2), 2), strict=True):
            for batch in part.micro:
                assert torch.equal(batch.negatives.pooled_QD, one.micro[0].negatives.pooled_QD)
                assert batch.negatives.source_B.tolist() == batch.number_B.tolist()
                assert batch.negatives.label_B.tolist() == batch.label_B.tolist()


def test_the_contrast_leaves_out_the_same_level_and_the_same_sample(lgd, parts):
    """Where a level is unknown the teacher's stands for it."""
    method = LgdNet(lgd("masks", contrast_weight=0.1), find_target("her2"))
    pooled_nD = torch.from_numpy(read_all(parts, "pooled")[:, 0].astype(np.float32))
    teacher, _ = load_teacher(method.config.teacher.dir)
    said_n = teacher.head(pooled_nD + teacher.pooled_mean).argmax(dim=1)
    level_n = torch.from_numpy(read_labels(parts))
    hidden_n = torch.where(torch.arange(len(level_n)) % 3 == 0, -1, level_n)
    number = torch.arange(len(level_n))
    negatives = Negatives(number[:6], hidden_n[:6], pooled_nD, number, hidden_n)
    allowed = method.negative_mask(negatives, pooled_nD[:6])
    known = [int(said) if hidden < 0 else int(hidden) for said, hidden in zip(said_n, hidden_n, strict=True)]
    assert len(set(known)) > 1
    for b in range(6):
        assert allowed[b].tolist() == [known[q] != known[b] and q != b for q in range(len(known))]


def test_with_a_contrast_a_run_that_stops_goes_on_the_same(lgd, monkeypatch):
    """No queue is in a checkpoint, and none is missed."""
    fields = {"contrast_weight": 0.5, "contrast_queue": 12, "epochs": 2}
    straight, again = lgd("straight", **fields), lgd("again", **fields)
    assert train_under(straight, "student")
    lines = log_of(straight.student.dir)
    assert all(line["contrast"] > 0 for line in lines)
    assert lines[-1]["contrast"] != lines[0]["contrast"]
    real = Log.step

    def dies(self, step, values, waited):
        real(self, step, values, waited)
        if step == 3:
            raise MemoryError

    again = replace(again, train=replace(again.train, checkpoint_every=2))
    with monkeypatch.context() as patched:
        patched.setattr(Log, "step", dies)
        with pytest.raises(MemoryError):
            train_under(again, "student")
    assert train_under(again, "student")
    assert_same_curve(log_of(again.student.dir), lines)


def test_the_baselines_learn_what_they_are_told_and_nothing_else(lgd):
    lgd_net = {"level", "hallucination", "hallucination_map", "nuclei", "membrane"}
    terms = [
        ("two-stream", "two-stream", 0.0, {"level"}),
        ("distil", "distil", 1.0, {"level", "distil"}),
        ("lgd", "lgd", 0.0, lgd_net),
        ("lgd-distil", "lgd", 0.5, {*lgd_net, "distil"}),
    ]
    for name, method, weight, expected in terms:
        config = lgd(name, method=method, epochs=0.5, distil_weight=weight)
        assert train_under(config, "student")
        assert set(log_of(config.student.dir)[-1]) == expected | {"step", "loss", "lr", "grad_norm", "skipped"}
        assert not train_under(config, "student"), "it is finished"
    with pytest.raises(DataError, match="distil_temperature: 2.0 in the folder, 3.0 asked for"):
        train_under(lgd("distil", method="distil", epochs=0.5, distil_weight=1.0, distil_temperature=3.0), "student")
    assert not train_under(lgd("two-stream", method="two-stream", epochs=0.5, distil_temperature=3.0), "student")


def test_soft_levels_are_the_teachers(lgd, parts):
    method = Distil(lgd("soft", method="distil", distil_weight=1.0), find_target("her2"))
    teacher, _ = load_teacher(method.config.teacher.dir)
    pooled_nD = torch.from_numpy(read_all(parts, "pooled")[:, 0].astype(np.float32))
    naive = torch.stack([teacher.head(row + teacher.pooled_mean) for row in pooled_nD])
    torch.testing.assert_close(method.soft_labels(pooled_nD), naive, rtol=1e-5, atol=1e-5)


def test_shuffled_pairs_are_another_run(lgd):
    own = lgd("own", epochs=0.5)
    assert train_under(own, "student")
    for pairs in ("shuffled", "within-level"):
        with pytest.raises(DataError, match=f"pairs: None in the folder, {pairs} asked for"):
            train_under(lgd("own", epochs=0.5, pairs=pairs), "student")
        other = lgd(pairs, epochs=0.5, pairs=pairs)
        assert train_under(other, "student")
        one, two = log_of(own.student.dir)[0], log_of(other.student.dir)[0]
        assert one["hallucination"] != two["hallucination"] and one["membrane"] != two["membrane"]
        assert one["nuclei"] == two["nuclei"] and one["level"] == two["level"]
