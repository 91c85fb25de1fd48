"""How many modules one reads to follow the data, apart from those of files and words: no flow may spread over more."""

import sys
import threading
from pathlib import Path

import pytest

import lgd
from lgd.retrieval.queries import query
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store
from lgd.train.loop import take_step
from lgd.train.prepare import Prepared
from lgd.train.tasks import StudentTask
from lgd.train.world import join_world

ROOT = Path(lgd.__file__).parent


def read_modules(function):
    """The modules with a frame while `function` runs, also in threads that it starts."""
    seen = set()

    def note(frame, event, argument):
        seen.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    inside = [Path(file).relative_to(ROOT) for file in seen if file.startswith(f"{ROOT}/")]
    return sorted(str(file.with_suffix("")) for file in inside if file.parts[0] not in ("base", "io"))


@pytest.fixture(scope="module")
def prepared(tissue_run):
    config = tissue_run
    with join_world() as world:
        run = Prepared(ShardSet.open(config.shard_dirs), StudentTask(config, ShardSet.open(config.shard_dirs)), world)
        yield run
        run.reader.close()


def test_one_pair_into_a_shard(tissue, tmp_path):
    he = next(iter(sorted((tissue / "HE" / "train").iterdir())))
    csv = tmp_path / "pairs.csv"
    for stain in ("HE", "IHC"):
        (tmp_path / f"{stain}.png").write_bytes((tissue / stain / "train" / he.name).read_bytes())
    csv.write_text("he,ihc,label,split,mpp\nHE.png,IHC.png,2+,train,0.5\n")
    options = ShardOptions(layout="csv", root=str(csv), out=str(tmp_path / "out"))
    names = read_modules(lambda: build(options))
    assert len(names) <= 8, names


def test_one_sample_into_a_batch(prepared):
    next(prepared.batches.draw_augmented(0, 1))
    names = read_modules(lambda: next(prepared.batches.draw_augmented(0, 1)))
    assert len(names) <= 8, names


def test_one_training_step(prepared):
    micro, _ = next(prepared.batches.draw_augmented(0, 1))
    names = read_modules(lambda: take_step(prepared.learner, 0, micro, False)())
    assert len(names) <= 8, names


def test_one_latent_into_an_answer(tissue_run):
    store = Store(tissue_run.latents.dir)
    key = store.parts[0].array("key")[0].decode()
    names = read_modules(lambda: query(None, store, keys=[key], k=3))
    assert len(names) <= 8, names
