"""Two builds into one folder, or one url, at once: one set, whole, and the other command is told."""

import contextlib
import os
import random
import time
import traceback
from typing import NamedTuple

import pytest
from test_builder import build_by, contents, make_bci, options

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.io import folders
from lgd.io.files import list_folder, read_bytes, read_json, write_json
from lgd.io.location import as_location
from lgd.io.locks import LOCK, exclusive
from lgd.shards import builder
from lgd.shards.builder import build
from lgd.shards.options import ShardJob
from lgd.shards.verify import verify
from tests.support.forks import FORKS

PAIRS = 8
KINDS = ({}, {"image": "jpeg:40"}, {"image": "png"}, {"salt": "x", "split": "group:0.5,0.25,0.25"})
"""Options of the builders; samples and shards of the first three have the same names."""


class Set(NamedTuple):
    """What a build makes alone."""

    options: dict
    manifest: object
    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bci(tmp_path_factory.mktemp("two") / "bci", PAIRS, side=64)


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """What each kind of build makes alone."""
    sets = []
    for number, kind in enumerate(KINDS):
        out = tmp_path_factory.mktemp("alone") / str(number)
        began = time.monotonic()
        manifest, _ = build(options(root, out, shard_size=2, **kind))
        sets.append(Set({"shard_size": 2, **kind}, manifest, contents(out), time.monotonic() - began))
    return sets


def after(jobs_done, act):
    """Map jobs one by one; `act()` is called when so many shards are done."""

    def map_jobs(function, jobs):
        for number, job in enumerate(jobs):
            if number == jobs_done and isinstance(job, ShardJob):
                act()
            yield function(job)

    return map_jobs


def interrupt():
    raise KeyboardInterrupt


# ---- one at a time ----


def test_a_second_builder_is_told_who_builds_and_changes_nothing(root, alone, tmp_path, capsys):
    out = tmp_path / "out"

    def build_too():
        before = contents(out)
        asked = ["--layout", "bci", "--root", str(root), "--out", str(out), "--shard-size", "2"]
        for more in ([], ["--image", "jpeg:40"]):
            capsys.readouterr()
            assert main(["build-shards", *asked, *more]) == 1
            message = capsys.readouterr().err
            assert message.startswith(f"lgd: {out}: process {os.getpid()} on ")
            assert " is building shards there, for 0.0 minutes: wait until it is done, or end it" in message
        assert contents(out) == before

    manifest, built = build_by(after(1, build_too), options(root, out, **alone[0].options))
    assert built and manifest == alone[0].manifest and contents(out) == alone[0].files


def test_a_finished_set_is_reused_while_somebody_has_its_lock(root, alone, tmp_path):
    """As from where nothing can be written: it is only read."""
    out = tmp_path / "out"
    build(options(root, out, **alone[0].options))
    with exclusive(out, "digging"):
        assert build(options(root, out, **alone[0].options)) == (alone[0].manifest, False)
        with pytest.raises(DataError, match=r"another shard set \(other options\)"):
            build(options(root, out, **alone[1].options))


def test_a_name_that_a_killed_build_left_in_its_lock_is_nothing(root, alone, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).write_text('{"doing": "building shards", "pid": 1, "host": "h", "since": 0.0}')
    assert build(options(root, out, **alone[0].options))[1] and contents(out) == alone[0].files
    # A build that is killed at its very end leaves a finished set.
    (out / LOCK).write_text("{}")
    assert not build(options(root, out, **alone[0].options))[1] and contents(out) == alone[0].files


# ---- what is taken over ----


@pytest.mark.parametrize("entry", ["ours", "theirs", "none"])
def test_a_whole_tar_of_other_options_is_not_taken_over(root, alone, tmp_path, entry):
    """It has the keys, the samples, the size and the checksums that it should have, and another image."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for out, number in ((ours, 1), (theirs, 2)):
        with pytest.raises(KeyboardInterrupt):
            build_by(after(2, interrupt), options(root, out, **alone[number].options))
    names = ["train-000000.tar", "train-000000.idx", *([".train-000000.json"] if entry == "theirs" else [])]
    for name in names:
        (ours / name).write_bytes((theirs / name).read_bytes())
    if entry == "none":
        (ours / ".train-000000.json").unlink()
    kept = (ours / "train-000001.tar").stat().st_mtime_ns
    assert build(options(root, ours, **alone[1].options)) == (alone[1].manifest, True)
    assert contents(ours) == alone[1].files and (ours / "train-000001.tar").stat().st_mtime_ns == kept


def test_a_build_whose_folder_is_another_ones_stops(root, alone, tmp_path):
    """Where no lock kept them apart, as between hosts whose file system has none."""
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        build_by(after(0, interrupt), options(root, other, **alone[1].options))

    def take_over():
        (out / ".building.json").write_bytes((other / ".building.json").read_bytes())

    for done, act in ((1, take_over), (2, (out / ".building.json").unlink)):
        with pytest.raises(DataError, match=r"out is not being built by this command any more .*: let the other build"):
            build_by(after(done, act), options(root, out, **alone[0].options))
        assert not (out / "manifest.json").exists()
        assert len(list(out.glob("*.tar"))) == done
        for path in out.iterdir():
            path.unlink()


# ---- many pairs that really meet ----


def run_builder(environment, asked, barrier, delay, results):
    """Process: build, and tell when, and how it ended."""
    os.environ.update(environment)
    barrier.wait(60)
    time.sleep(delay)
    began = time.monotonic()
    try:
        outcome = "built" if build(asked)[1] else "reused"
    except DataError as error:
        outcome = str(error)
    except BaseException:  # noqa: BLE001 - an outcome of this process
        outcome = traceback.format_exc()
    results.put((began, time.monotonic(), outcome))


def run_pair(asked, delay, environment=None, kill_after=None):
    """Two builders; (began, ended, outcome) of each, or None for the first one if it was killed."""
    barrier, queues = FORKS.Barrier(3), [FORKS.SimpleQueue(), FORKS.SimpleQueue()]
    processes = [
        FORKS.Process(target=run_builder, args=(environment or {}, one, barrier, wait, queue))
        for one, wait, queue in zip(asked, (0.0, delay), queues, strict=True)
    ]
    for process in processes:
        process.start()
    barrier.wait(60)
    if kill_after is not None:
        time.sleep(kill_after)
        processes[0].kill()
    for process in processes:
        process.join(120)
        assert not process.is_alive()
    return [None if queue.empty() else queue.get() for queue in queues]


def is_refusal(outcome):
    """Whether a builder was refused as it should be, in one message."""
    return "\n" not in outcome and any(
        part in outcome
        for part in (" is building shards there, for ", "holds another shard set", "holds an unfinished")
    )


@pytest.mark.faults
def test_of_two_builders_one_makes_its_set_and_the_other_is_refused(root, alone, fault_count, tmp_path):
    dice, count, met = random.Random(0), fault_count(100), 0
    for number in range(count):
        first, second = (dice.randrange(len(KINDS)) for _ in range(2))
        out = tmp_path / f"out{number}"
        asked = [options(root, out, **alone[kind].options) for kind in (first, second)]
        ends = run_pair(asked, dice.choice([0.0, dice.random()]) * alone[first].seconds)
        outcomes = [outcome for _, _, outcome in ends]
        assert outcomes.count("built") == 1, outcomes
        winner = outcomes.index("built")
        same = first == second and outcomes[1 - winner] == "reused"
        assert same or is_refusal(outcomes[1 - winner]), outcomes
        assert contents(out) == alone[(first, second)[winner]].files, outcomes
        met += max(began for began, _, _ in ends) < min(ended for _, ended, _ in ends)
    print(f"{met} of {count} pairs met")
    assert met > 0.7 * count


@pytest.mark.faults
def test_what_a_killed_builder_left_goes_on_or_is_refused(root, alone, fault_count, tmp_path):
    dice, count, killed = random.Random(1), fault_count(50), 0
    for number in range(count):
        kinds = [dice.randrange(len(KINDS)) for _ in range(2)]
        out = tmp_path / f"out{number}"
        asked = [options(root, out, **alone[kind].options) for kind in kinds]
        # Half the time the other one comes after the kill.
        delay = dice.choice([0.0, 1.5]) * alone[kinds[0]].seconds
        ends = run_pair(asked, delay, kill_after=dice.random() * alone[kinds[0]].seconds)
        killed += ends[0] is None
        assert all(end is None or end[2] in ("built", "reused") or is_refusal(end[2]) for end in ends), ends
        made = []
        for kind in dice.sample(kinds, 2):
            try:
                made.append((kind, build(options(root, out, **alone[kind].options))[0]))
            except DataError as error:
                assert is_refusal(str(error)), error
        assert made, "one of the two goes on"
        for kind, manifest in made:
            assert manifest == alone[kind].manifest and contents(out) == alone[kind].files
    print(f"{killed} of {count} were killed")
    assert killed > 0.3 * count


@pytest.mark.faults
def test_two_builders_into_one_url_are_not_mixed_unnoticed(root, alone, fault_count, s3_server):
    s3_server.create_bucket(Bucket="two")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    dice, count, met = random.Random(2), fault_count(10), 0
    for number in range(count):
        first, second = dice.sample(range(len(KINDS)), 2)
        out = f"s3://two/out{number}"
        asked = [options(root, out, **alone[kind].options) for kind in (first, second)]
        ends = run_pair(asked, 0.0, environment)
        outcomes = [outcome for _, _, outcome in ends]
        assert outcomes.count("built") <= 1, outcomes
        for outcome in outcomes:
            assert outcome == "built" or is_refusal(outcome) or "is not being built by this command" in outcome, outcome
        if "built" in outcomes:
            found = {name: read_bytes(as_location(out) / name) for name in list_folder(out)}
            assert found == alone[(first, second)[outcomes.index("built")]].files or verify(out)
        met += max(began for began, _, _ in ends) < min(ended for _, ended, _ in ends)
    print(f"{met} of {count} pairs met")
    assert met > 0.7 * count


def test_the_first_marker_at_a_url_stays(root, alone, s3_server):
    s3_server.create_bucket(Bucket="first")
    out = "s3://first/out"
    with pytest.raises(KeyboardInterrupt):
        build_by(after(1, interrupt), options(root, out, **alone[0].options))
    # Of an entry that another build wrote nothing is taken.
    built = read_json(f"{out}/.train-000000.json")
    assert built["building"] == read_json(f"{out}/.building.json")["digest"]
    with pytest.raises(DataError, match="holds an unfinished build of something else"):
        build(options(root, out, **alone[1].options))
    with contextlib.suppress(FileNotFoundError):
        write_json(f"{out}/.train-000000.json", built | {"building": "0" * 64})
    assert build(options(root, out, **alone[0].options)) == (alone[0].manifest, True)
    assert {name: read_bytes(as_location(out) / name) for name in list_folder(out)} == alone[0].files


def test_files_that_another_builder_begins_meanwhile_are_not_foreign(tmp_path, monkeypatch):
    """It is refused by the lock, which it is about to ask for."""

    def list_then_write(folder):
        names = list_folder(folder)
        (tmp_path / "train-000000.tar").write_bytes(b"")
        return names

    monkeypatch.setattr(builder, "list_folder", list_then_write)
    monkeypatch.setattr(folders, "list_folder", list_then_write)
    assert builder._open_target(tmp_path) == tmp_path
