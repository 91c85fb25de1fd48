import itertools

import numpy as np
import pytest
import torch

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.config import Config
from lgd.config_sections import Data, Train
from lgd.shards.shard_set import ShardFolder
from lgd.store.cache import cache_latents
from lgd.store.store import Rows, Store
from lgd.stream.plan import Plan, World, d4
from lgd.stream.reader import Reader, stream
from lgd.train.batch import Batches, augment, collate

TARGETS = ("pooled", "map", "nuclei", "membrane")


@pytest.fixture(scope="module")
def joined(tissue_run):
    """The training shards' reader (H&E) and their parts."""
    shards = [shard for shard in ShardFolder.open(tissue_run.shard_dirs[0]).shards if shard.split == "train"]
    return Reader(shards, ("he",), 64), Rows(Store(tissue_run.latents.dir).parts_of(shards))


@pytest.fixture(scope="module")
def eight_views(tissue_run, change, tmp_path_factory):
    """The same with all eight views stored."""
    latents = {"dir": str(tmp_path_factory.mktemp("views")), "views": 8}
    config = change(tissue_run, latents=latents)
    shards = [shard for shard in ShardFolder.open(config.shard_dirs[0]).shards if shard.split == "train"]
    store = cache_latents(config, shards, workers=0).store
    return config, Reader(shards, ("he",), 64), Rows(store.parts_of(shards))


def batches(reader, parts, world=None, first=0, steps=4, threads=2, accumulate=1, turn=True, batch=8, seed=3):
    """The micro-batches of each step from step `first` on."""
    plan = Plan(reader.sizes, seed=seed, lanes=4)
    data = Data(threads=threads, augment="d4" if turn else "none")
    config = Config(data=data, train=Train(batch=batch, accumulate=accumulate))
    start, world = first * batch, world or World()
    taken = list(Batches(config, reader, plan, world, parts).draw(start, steps))
    assert [step.position for step in taken] == [(first + 1 + step) * batch for step in range(steps)]
    return [step.micro for step in taken]


def gather(reader, numbers):
    """The samples of these numbers, as one batch of the stream."""
    (samples,) = stream(reader, [numbers], threads=1)
    return samples


def naive_row(parts, key, name):
    """Search all parts for a key."""
    found = [part.array(name)[row] for part in parts.parts for row in np.flatnonzero(part.array("key") == key.encode())]
    assert len(found) == 1
    return found[0].astype(np.float32)


def test_stored_rows_are_those_of_the_sample(joined):
    reader, parts = joined
    for step in batches(reader, parts):
        for batch in step:
            for row, key in enumerate(batch.keys):
                sample = reader.read(int(batch.number_B[row]))
                assert sample.key == key and int(batch.label_B[row]) == sample.label
                assert np.array_equal(batch.images["he"][row].permute(1, 2, 0), sample.images["he"])
                for name in TARGETS:
                    there = naive_row(parts, key, name)
                    there = there[0] if name in ("pooled", "map") else there
                    assert np.array_equal(batch.stored[name][row], there), name


def test_with_eight_views_the_row_is_that_of_the_drawn_view(eight_views):
    _, reader, parts = eight_views
    seen = set()
    for (batch,) in batches(reader, parts):
        for row, key in enumerate(batch.keys):
            view = int(batch.view_B[row])
            seen.add(view)
            for name in ("pooled", "map"):
                assert np.array_equal(batch.stored[name][row], naive_row(parts, key, name)[view])
    assert len(seen) >= 6


def test_training_turns_image_map_and_grids_alike(joined, tissue_run, change):
    reader, parts = joined
    config = change(tissue_run, data={"augment": "d4"})
    (batch,) = batches(reader, parts, steps=1)[0]
    before = {name: tensor.clone() for name, tensor in batch.stored.items()}
    turned = augment(batch, config)
    for row, view in enumerate(batch.view_B.tolist()):
        one = torch.tensor([view])
        assert torch.equal(turned.images["he"][row], d4(batch.images["he"][row : row + 1], one)[0])
        assert torch.equal(turned.stored["map"][row], d4(before["map"][row : row + 1], one)[0])
        for name in ("nuclei", "membrane"):
            assert torch.equal(turned.stored[name][row], d4(before[name][row : row + 1], one, (1, 2))[0])
        assert torch.equal(turned.stored["pooled"][row], before["pooled"][row])
    assert not torch.equal(turned.stored["nuclei"], before["nuclei"])


def test_a_stored_view_is_not_turned_again(eight_views):
    config, reader, parts = eight_views
    (batch,) = batches(reader, parts, steps=1)[0]
    before = {name: tensor.clone() for name, tensor in batch.stored.items()}
    turned = augment(batch, config)
    assert torch.equal(turned.stored["map"], before["map"])
    assert not torch.equal(turned.stored["nuclei"], before["nuclei"])


def test_stain_jitter_is_of_the_he_only_and_drawn_by_sample_and_epoch(joined, tissue_run):
    reader, parts = joined
    (one,), (again,) = (batches(reader, parts, first=3, steps=1)[0] for _ in range(2))
    first, second = (augment(batch, tissue_run).images["he"] for batch in (one, again))
    assert torch.equal(first, second) and not torch.equal(first, d4(one.images["he"], one.view_B).float())
    other = collate(gather(reader, one.number_B), one.epoch_B + 1, None, None, target=find_target("her2"), values=None)
    plain = collate(gather(reader, one.number_B), one.epoch_B, None, None, target=find_target("her2"), values=None)
    later, sooner = (augment(batch, tissue_run).images["he"] for batch in (other, plain))
    assert not torch.equal(later, sooner)
    other.images["ihc"] = other.images["he"]
    assert torch.equal(augment(other, tissue_run).images["ihc"], other.images["he"])


def test_light_jitter_comes_after_that_of_the_stain(joined, tissue_run, change):
    """One factor an H&E, where nothing is overexposed; and it is off by default."""
    reader, parts = joined
    (batch,) = batches(reader, parts, first=3, steps=1)[0]
    lighter = change(tissue_run, data={"light_jitter": 0.2})
    plain, lit = (augment(batch, config).images["he"] for config in (tissue_run, lighter))
    factor = torch.where((lit < 255) & (plain > 20), lit / plain, torch.nan).flatten(1)
    middle = factor.nanmedian(1, keepdim=True).values
    assert ((factor - middle).abs().nan_to_num() < 1e-4).all() and len(middle.unique()) == len(middle)
    assert ((middle - 1).abs() > 0.01).any()


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_together_see_the_same_samples(joined, size, accumulate):
    reader, _ = joined
    whole = batches(reader, None, first=1)
    ranks = [batches(reader, None, World(rank=rank, size=size), first=1, accumulate=accumulate) for rank in range(size)]
    for step, (batch,) in enumerate(whole):
        micro = [one for rank in ranks for one in rank[step]]
        assert all(len(one) == 8 // size // accumulate for one in micro)
        facts = {
            (int(n), int(e), int(v))
            for one in micro
            for n, e, v in zip(one.number_B, one.epoch_B, one.view_B, strict=True)
        }
        assert facts == set(zip(batch.number_B.tolist(), batch.epoch_B.tolist(), batch.view_B.tolist(), strict=True))
        assert sum(len(one) for one in micro) == 8


def test_an_epoch_shows_each_sample_once_and_batches_run_on(joined):
    reader, _ = joined
    seen = [
        (int(e), int(n))
        for (batch,) in batches(reader, None, steps=5)
        for e, n in zip(batch.epoch_B, batch.number_B, strict=True)
    ]
    assert len(seen) == 40 and set(seen) == set(itertools.product((0, 1), range(20)))


def taken(micro):
    """All that a rank sees of a step, sample by sample."""
    return [
        (
            *(int(batch.epoch_B[row]), int(batch.number_B[row]), key, int(batch.view_B[row]), int(batch.label_B[row])),
            *(tensor[row].numpy().tobytes() for tensor in (*batch.images.values(), *batch.stored.values())),
        )
        for batch in micro
        for row, key in enumerate(batch.keys)
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_goes_on_exactly_at_another_world_size(joined, seed):
    """From the position alone, after each of five cuts."""
    reader, parts = joined
    options = {"batch": 12, "seed": seed}
    whole = [taken(micro) for micro in batches(reader, parts, steps=6, **options)]
    for before, after in ((1, 2), (2, 1), (2, 2), (4, 3)):
        for cut in range(1, 6):
            resumed = []
            for size, first, steps in ((before, 0, cut), (after, cut, 6 - cut)):
                ranks = [
                    batches(reader, parts, World(rank=r, size=size), first, steps, threads=1 + r % 2, **options)
                    for r in range(size)
                ]
                # The ranks take the positions of a step in turn.
                resumed += [
                    [sample for row in zip(*map(taken, step), strict=True) for sample in row]
                    for step in zip(*ranks, strict=True)
                ]
            assert resumed == whole, (before, after, cut)


def test_steps_are_drawn_as_they_are_needed(joined):
    reader, _ = joined
    plan = Plan(reader.sizes, seed=3, lanes=4)
    drawn = []
    draw = plan.samples
    plan.samples = lambda positions: drawn.append(positions) or draw(positions)
    config = Config(data=Data(threads=1), train=Train(batch=4))
    some = Batches(config, reader, plan, World()).draw(0, steps=10**9)
    next(some)
    some.close()
    assert len(drawn) < 20


def test_turning_can_be_left_out(joined):
    reader, _ = joined
    assert all(int(batch.view_B.max()) == 0 for (batch,) in batches(reader, None, turn=False))


def test_a_row_of_another_sample_is_refused(joined):
    reader, parts = joined
    sample = reader.read(1)
    with pytest.raises(DataError, match=rf"row 1, is of .*, but the shard's sample is {sample.key}"):
        collate(
            gather(reader, [1]),
            np.zeros(1, np.int64),
            Rows(parts.parts[1:]),
            None,
            target=find_target("her2"),
            values=None,
        )
