import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lgd.base.errors import DataError
from lgd.stream.plan import World
from lgd.train import checkpoint
from lgd.train.checkpoint import Best, Checkpoint, Progress, adopt, complete, load, name_step, problems, save
from lgd.train.engine import MOMENTS
from lgd.train.world import take_from_rank_0
from tests.support.forks import run_ranks
from tests.support.sockets import free_ports

RUN = {"seed": 0, "train": {"lr": 0.1, "batch": 8}}


def find(folder, inputs):
    return checkpoint.find(folder, inputs, World())


def progress(step, **others):
    return Progress(**{"step": step, "position": 8 * step, "inputs": RUN, "skipped": (step,), "best": Best()} | others)


def some(step, **others):
    torch.manual_seed(step)
    weights = {"conv.weight": torch.randn(2, 3), "head.bias": torch.randn(4)}
    moments = {f"{name}|{moment}": torch.rand_like(t) for name, t in weights.items() for moment in MOMENTS}
    return Checkpoint(progress(step, **others), weights, moments)


def assert_same(a, b):
    for name in ("step", "position", "inputs", "skipped", "best"):
        assert getattr(a.progress, name) == getattr(b.progress, name)
    assert a.weights.keys() == b.weights.keys() and a.moments.keys() == b.moments.keys()
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert all(torch.equal(tensor, b.moments[name]) for name, tensor in a.moments.items())


def test_what_is_saved_reads_back(tmp_path):
    path = save(tmp_path, some(5), keep=2)
    assert_same(load(path, RUN), some(5))
    assert problems(path) == []


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    start = Checkpoint(progress(0, skipped=()), {"w": torch.ones(2)}, {})
    assert load(save(tmp_path, start, keep=1), RUN).moments == {}


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 10, 100):
        save(tmp_path, some(step), keep=2)
    assert [path.name for path in complete(tmp_path)] == ["step-00000010", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("calls", range(4))
@pytest.mark.faults
def test_an_interrupted_save_leaves_the_older_one(tmp_path, monkeypatch, calls):
    """`os.replace` publishes each of three files and then the folder: it fails at each of them in turn."""
    save(tmp_path, some(1), keep=1)
    real, done = os.replace, []

    def fails(*args):
        if len(done) == calls:
            raise OSError("no space left")
        done.append(args)
        real(*args)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, some(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_same(find(tmp_path, RUN), some(1))


@pytest.mark.faults
def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(tmp_path):
    save(tmp_path, some(1), keep=2)
    # A kill leaves the folder under its temporary name, here as full as it can be.
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.77.tmp")
    assert find(tmp_path, RUN).progress.step == 1
    save(tmp_path, some(3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, some(3), keep=1)
    newer = Checkpoint(progress(3, skipped=()), some(4).weights, {})
    save(tmp_path, newer, keep=1)
    assert_same(find(tmp_path, RUN), newer)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save(tmp_path, some(1), keep=1)
    other = {"seed": 0, "train": {"lr": 0.2, "batch": 8}, "order": "new"}
    with pytest.raises(DataError) as caught:
        find(tmp_path, other)
    assert str(caught.value).splitlines() == [
        f"checkpoint {path} is of another run:",
        "  order: None in the checkpoint, new asked for",
        "  train.lr: 0.1 in the checkpoint, 0.2 asked for",
        "Go on with the same inputs, name another folder, or start anew with --train.resume never",
    ]


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors"])
@pytest.mark.faults
def test_a_damaged_one_is_refused_and_named(tmp_path, file):
    save(tmp_path, some(1), keep=2)
    path = save(tmp_path, some(2), keep=2) / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find(tmp_path, RUN)
    assert f"{path} does not match its digest: delete {path.parent}" in str(caught.value)
    shutil.rmtree(path.parent)
    assert find(tmp_path, RUN).progress.step == 1


@pytest.mark.parametrize(
    "state",
    [{"format": "other/1"}, [], {"format": checkpoint.State.FORMAT}, {"format": checkpoint.State.FORMAT, "xxh3": 3}],
)
def test_a_strange_state_is_refused(tmp_path, state):
    path = save(tmp_path, some(1), keep=2)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state\.json: .*: delete the folder to go on from an older one"):
        load(path, RUN)


def test_resume_finds_the_newest():
    assert find(Path("none"), RUN) is None


def test_the_best_is_kept_beside_the_newest(tmp_path):
    best, scores = Best(), [0.1, 0.5, float("nan"), 0.4, 0.5]
    for step, score in enumerate(scores, 1):
        best = best.after(step, score)
        assert (best.step == step) == (step <= 2)
        save(tmp_path, some(step, best=best), keep=1)
    assert [path.name for path in complete(tmp_path)] == ["step-00000002", "step-00000005"]
    found = find(tmp_path, RUN)
    best = found.progress.best
    assert (best.step, best.score, best.stale) == (2, 0.5, 3)
    assert load(tmp_path / name_step(best.step), RUN).progress.step == 2


def test_a_path_becomes_the_newest(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for step in (1, 2, 3):
        path = save(ours, some(step), keep=3)
    adopt(ours, path.with_name("step-00000002"), RUN)
    assert_same(find(ours, RUN), some(2))
    assert [path.name for path in complete(ours)] == ["step-00000001", "step-00000002"]
    foreign = save(theirs, some(2, position=5, best=Best(step=1, score=0.3)), keep=1)
    adopt(ours, foreign, RUN)
    assert find(ours, RUN).progress.position == 5 and problems(foreign) == []
    assert sorted(path.name for path in ours.iterdir()) == ["step-00000001", "step-00000002"]
    adopt(tmp_path / "new", foreign, RUN)
    assert find(tmp_path / "new", RUN).progress.best == Best(), "the best of its run stayed there"


def test_a_path_without_a_whole_checkpoint_changes_nothing(tmp_path):
    path = save(tmp_path, some(2), keep=3)
    with pytest.raises(DataError, match=r"train\.resume: .*gone is not a complete checkpoint"):
        adopt(tmp_path, tmp_path / "gone", RUN)
    other = shutil.copytree(path, tmp_path / "other")
    (other / "weights.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"weights\.safetensors does not match its digest"):
        adopt(tmp_path, other, RUN)
    assert_same(find(tmp_path, RUN), some(2))


def hide_newest(folder):
    """A listing that is older than the folder, as that of another node's disk cache."""
    checkpoint.complete = lambda folder: complete(folder)[:-1]


def lose_newest(folder):
    shutil.rmtree(folder / name_step(2))


def flip_a_bit(folder):
    with (folder / name_step(2) / "moments.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def replace_weights(folder):
    other = some(2)
    other.weights["head.bias"][0] += 1
    save(folder, other, keep=2)


def go_further(folder):
    save(folder, some(3), keep=2)


SPOILED = [hide_newest, lose_newest, flip_a_bit, replace_weights, go_further]


def find_as_rank(rank, folder, port):
    """Process: what rank 0 decides, and what `find` gives in it and in rank 1, whose own copy is spoiled."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # It gives other answers on rank 1, where the folder looks older.
    results = {"decided": [take_from_rank_0(lambda answer=answer: (rank == 0) == answer) for answer in (True, False)]}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results["decided"].append(take_from_rank_0(lambda: rank == 0))
    for spoil in SPOILED:
        own = folder / spoil.__name__ / str(rank)
        for step in (1, 2):
            save(own, some(step), keep=2)
        if rank == 1:
            spoil(own)
        try:
            results[spoil.__name__] = checkpoint.find(own, RUN, World(rank=rank, size=2)).progress.step
        except DataError as error:
            results[spoil.__name__] = list(error.args)
        checkpoint.complete = complete
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_ranks_that_see_another_folder_do_as_rank_0_or_say_so(tmp_path):
    (port,) = free_ports(1)
    run_ranks(find_as_rank, 2, tmp_path, port)
    results, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert results["decided"] == others["decided"] == [True, False, True]
    assert results["hide_newest"] == others["hide_newest"] == 2
    assert results["go_further"] == others["go_further"] == 2
    for spoil, told in {
        "lose_newest": "state.json is missing: it is no complete checkpoint",
        "flip_a_bit": "moments.safetensors does not match its digest",
        "replace_weights": "step 2, position 16, digest ",
    }.items():
        first, zero, one, remedy = results[spoil]
        # Folders of other names, but one message.
        assert (
            first.startswith("the ranks do not read the same checkpoint") and [zero, one, remedy] == others[spoil][1:]
        )
        assert zero.startswith("  rank 0 on ") and ": step 2, position 16, digest " in zero
        assert one.startswith("  rank 1 on ") and told in one and zero[8:] != one[8:]
        assert "on a shared disk or at a url" in remedy
