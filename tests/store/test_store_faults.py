"""What happens to a store when caching is killed, a disk is full, bits flip, or somebody hands over a forged one."""

import functools
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from filling import contents_of

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.cli import main
from lgd.io.digests import digest_of, xxh3
from lgd.io.files import read_json, write_json
from lgd.io.locks import LOCK, read_owner
from lgd.ray_jobs.cluster import disconnect
from lgd.retrieval.index import build_index
from lgd.retrieval.search import Searcher, problems
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import Cacher, cache_latents, is_complete
from lgd.store.document import PATCHES, TEACHER
from lgd.store.recipes import recipe_of
from lgd.store.store import Store
from tests.support.forks import FORKS

pytestmark = pytest.mark.faults


# ---- caching that is killed ----


def fill(config):
    os.setpgid(0, 0)
    cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)


def test_caching_that_is_killed_goes_on_with_the_unfinished_parts(small_parts, change, contents, fault_count, tmp_path):
    """Kills at random moments; whatever was committed is whole and stays, and the end is as if nothing had happened."""
    dice, kills, rounds, kept = random.Random(0), 0, 0, []
    for attempt in range(2):
        # The first time the processes' server is started.
        began = time.monotonic()
        fill_and_wait(change(small_parts, latents={"dir": str(tmp_path / f"timed-{attempt}")}), None)
    whole = time.monotonic() - began
    while kills < fault_count(100):
        config = change(small_parts, latents={"dir": str(tmp_path / f"round-{rounds}")})
        folder = Path(config.latents.dir)
        committed: dict[str, int] = {}
        for _ in range(4):
            # By the clock, which mostly meets the start, and in turn while a part further is written.
            further = len(committed) + dice.randrange(8) if kills % 2 else None
            killed = fill_and_wait(config, dice.uniform(0.1, 0.9) * whole, further)
            there = committed_parts(folder, contents)
            assert committed.items() <= there.items(), "a finished part was made again"
            committed = there
            if not killed:
                break
            kills += 1
            kept.append(len(committed))
        finished = (folder / "store.json").exists()
        store, computed, _ = cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
        assert computed == (0 if finished else len(ShardSet.open(config.shard_dirs).shards) - len(committed))
        assert committed.items() <= committed_parts(folder, contents).items()
        assert contents_of(folder) == contents
        assert store.digest == Store(small_parts.latents.dir).digest and store.verify() == []
        rounds += 1
        shutil.rmtree(folder)
    # The moments were spread over the run, or the test shows little.
    assert any(0 < parts < len(ShardSet.open(small_parts.shard_dirs).shards) for parts in kept), kept


def fill_and_wait(config, seconds, parts=None):
    """Run caching in a process, killed after so many seconds, or when there are more than so many parts.

    Tells whether it was killed before its end.
    """
    process = FORKS.Process(target=fill, args=(config,))
    process.start()
    if parts is None:
        process.join(seconds)
    else:
        folder = Path(config.latents.dir) / "parts" / PATCHES
        while process.is_alive() and len(list(folder.glob("*.json"))) <= parts:
            time.sleep(0.001)
        time.sleep(seconds / 100)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture
def own_ray(monkeypatch):
    """A Ray of the test's own, whatever this machine has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    disconnect()


@pytest.mark.skipif(os.environ.get("LGD_FAULTS") != "all", reason="each of twenty workers takes five seconds to start")
def test_caching_whose_workers_are_killed_goes_on_by_itself(
    small_parts, change, contents, tmp_path, monkeypatch, own_ray, caplog
):
    """Twenty times, at a random moment from the first batch of a shard to after its last."""
    moments = {}

    def make_dying(real, config, recipe, bar):
        cacher = real(config, recipe, bar)

        def cache(shard):
            path = moments.pop(shard.path, None)
            if path is not None and not path.exists():
                moment = float(path.name)
                path.touch()
                threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
                cacher(shard)
                time.sleep(60)
            return cacher(shard)

        return cache

    dice, shards = random.Random(0), ShardSet.open(small_parts.shard_dirs).shards
    dying = dice.sample(shards, 20)
    moments |= {shard.path: tmp_path / f"{dice.uniform(0, 0.3)}" for shard in dying}
    monkeypatch.setattr("lgd.store.cache.Cacher", functools.partial(make_dying, Cacher))
    config = change(small_parts, latents={"dir": str(tmp_path / "latents")})
    with caplog.at_level(logging.WARNING):
        store, computed, _ = cache_latents(config, shards, workers=2)
    assert computed == len(shards) and len([*tmp_path.glob("0.*")]) == len(dying)
    lost = [line for line in caplog.messages if "the worker that had it died and is started again" in line]
    assert len(lost) >= len(dying) and all(any(str(shard.path) in line for line in lost) for shard in dying)
    assert contents_of(Path(config.latents.dir)) == contents and store.verify() == []


def committed_parts(folder, contents):
    """Name -> times of change of the committed parts of both layers, each compared with the undisturbed one."""
    found = {}
    for path in sorted((folder / "parts").rglob("*.json")):
        for file in (path, path.with_suffix(".h5")):
            assert file.read_bytes() == contents[f"{file.parent.name}/{file.name}"]
        found.setdefault(path.stem, []).append(path.with_suffix(".h5").stat().st_mtime_ns)
    return {name: times for name, times in found.items() if len(times) == 2}


def test_a_second_cacher_is_refused_and_told_who_is_at_work(small_parts, change, tmp_path, capsys):
    config = change(small_parts, latents={"dir": str(tmp_path / "latents")})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    process = FORKS.Process(target=fill, args=(config,))
    process.start()
    while read_owner(tmp_path / "latents" / LOCK) is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert main(["cache-latents", "--config", str(tmp_path / "config.yaml")]) == 1
        told = capsys.readouterr().err
        who = rf"latents: process {process.pid} on \S+ is caching latents there, for 0\.\d minutes: wait"
        assert re.search(who, told), told
    finally:
        process.kill()
        process.join()
    # Its lock went with it; its name still lies there.
    assert (tmp_path / "latents" / LOCK).exists()
    assert main(["cache-latents", "--config", str(tmp_path / "config.yaml")]) == 0
    assert Store(config.latents.dir).verify() == [] and not (tmp_path / "latents" / LOCK).exists()


def test_ctrl_c_ends_caching_soon_and_the_same_command_goes_on(small_parts, change, tmp_path):
    config = change(small_parts, latents={"dir": str(tmp_path / "latents")})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    command = [sys.executable, "-m", "lgd", "cache-latents", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list((tmp_path / "latents" / "parts").rglob("*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "lgd: interrupted" in told and "Traceback" not in told
    assert not list((tmp_path / "latents" / "parts").rglob("*.tmp"))
    assert main(command[3:]) == 0 and Store(config.latents.dir).verify() == []


# ---- disks ----


@pytest.mark.parametrize("kilobytes", [8, 80, 200])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(small_parts, change, contents, disk, kilobytes, capsys):
    folder = disk(f"size={kilobytes}k") / "latents"
    config = change(small_parts, latents={"dir": str(folder)})
    (folder.parent.parent / "config.yaml").write_text(config.as_yaml())
    # A process of its own: what HDF5 makes of a full disk shows when it ends.
    command = [sys.executable, "-m", "lgd", "cache-latents", "--config", str(folder.parent.parent / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("lgd: "))
    assert str(folder) in told and "no space is left" in told and "free some, or use another disk" in told
    assert not (folder / "store.json").exists() and not list(folder.rglob("*.tmp"))
    kept = committed_parts(folder, contents)
    disk("size=50m")
    store, computed, _ = cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
    assert computed == len(ShardSet.open(config.shard_dirs).shards) - len(kept) and store.verify() == []


FULL = """
import os, sys
from pathlib import Path
from lgd.shards.shard_set import ShardSet
from lgd.base.errors import DataError
from lgd.config_files import load_config
from lgd.retrieval.index import build_index
from lgd.store.store import Store
config = load_config(sys.argv[1])
folder = Path(config.latents.dir)
for kilobytes in range(0, 200, 4):
    disk = os.statvfs(folder)
    with open(folder.parent / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, disk.f_bavail * disk.f_bsize - 1024 * kilobytes)
    try:
        build_index(Store(folder), ShardSet.open(config.shard_dirs).shards, "auto", ["train"], recall=0.99, seed=0)
    except DataError as error:
        print(error)
    else:
        break
    finally:
        os.unlink(folder.parent / "ballast")
"""


def test_an_index_on_a_full_disk_is_told_and_leaves_nothing_half_written(small_parts, change, disk):
    """With room for nothing at first, and then for 4 kB more each time: it is full at every step of the way."""
    folder = disk("size=50m") / "latents"
    shutil.copytree(small_parts.latents.dir, folder)
    config = change(small_parts, latents={"dir": str(folder)})
    (folder.parent.parent / "config.yaml").write_text(config.as_yaml())
    # A process of its own: one that writes through a map dies of a full disk.
    command = [sys.executable, "-c", FULL, str(folder.parent.parent / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert all(str(folder / "index") in line and "no space is left" in line for line in told), told
    assert {suffix for line in told for suffix in (".faiss", ".npy") if suffix in line} == {".faiss", ".npy"}
    assert problems(Store(folder)) == [] and not list(folder.rglob("*.tmp"))


def test_a_read_only_folder_is_told(small_parts, change, disk):
    folder = disk("size=50m") / "latents"
    shutil.copytree(small_parts.latents.dir, folder)
    config = change(small_parts, latents={"dir": str(folder)})
    victim = sorted((folder / "parts" / PATCHES).glob("*.json"))[0]
    whole = victim.read_bytes()
    victim.unlink()
    disk("ro")
    with pytest.raises(DataError, match=r"latents/\.lgd\.lock cannot be written .Read-only file system.: get write"):
        cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)
    disk("rw")
    victim.write_bytes(whole)
    disk("ro")
    # What is complete is used from where it may not be written.
    assert cache_latents(config, ShardSet.open(config.shard_dirs).shards, workers=0)[1] == 0


# ---- damage ----


@pytest.fixture
def indexed(copy_of):
    build_index(
        Store(copy_of.latents.dir), ShardSet.open(copy_of.shard_dirs).shards, "auto", ["train"], recall=0.99, seed=0
    )
    return Path(copy_of.latents.dir)


def use(folder):
    """Everything that a reader does with a store: raises `DataError` for damage."""
    store = Store(folder)
    for part in store.parts:
        for name in part.layout:
            part.array(name)
        store.sources  # noqa: B018 - is read and checked
    searcher = Searcher(store)
    searcher.search(np.ones((1, store.parts[0].array("pooled").shape[-1]), np.float32), 3)


def test_every_flipped_bit_is_found_and_its_file_named(indexed, fault_count):
    use(indexed)
    assert Store(indexed).verify() == [] and problems(Store(indexed)) == []
    dice = random.Random(0)
    files = sorted(path for path in indexed.rglob("*") if path.is_file())
    kinds = [
        [p for p in files if p.match(pattern)]
        for pattern in ("parts/*/*.h5", "parts/*/*.json", "index/teacher/*", "latents/s*.json")
    ]
    assert all(kinds) and sum(map(len, kinds)) == len(files)
    for number in range(fault_count(200)):
        path = dice.choice(kinds[number % len(kinds)])
        whole = path.read_bytes()
        content = bytearray(whole)
        place = dice.randrange(len(content))
        content[place] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        if path.suffix != ".h5" or in_a_dataset(path, place):
            with pytest.raises(DataError) as raised:
                use(indexed)
            assert path.stem in str(raised.value), f"byte {place} of {path}: {raised.value}"
        found = whats_wrong(indexed)
        assert found and all(path.stem in problem for problem in found), f"byte {place} of {path}: {found}"
        path.write_bytes(whole)
    use(indexed)


def in_a_dataset(path, place):
    """Whether a reader meets this byte; only HDF5 knows of the rest. Keys are read from the patches alone."""
    datasets = read_json(path.with_suffix(".json"))["datasets"]
    datasets = [one for name, one in datasets.items() if name != "key" or path.parent.name == "patches"]
    sizes = [math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize for one in datasets]
    return any(one["offset"] <= place < one["offset"] + size for one, size in zip(datasets, sizes, strict=True))


def whats_wrong(folder):
    """What `lgd verify` tells."""
    from lgd.cli.contents import check

    try:
        return check(folder)[1]
    except DataError as error:
        return [str(error)]


def test_parts_that_changed_places_are_refused(copy_of):
    folder = Path(copy_of.latents.dir)
    one, other = (Path(part.path) for part in Store(folder).parts[:2])
    for suffixes in ([".h5"], [".json"], [".h5", ".json"]):
        for suffix in suffixes:
            swap(one.with_suffix(suffix), other.with_suffix(suffix))
        for part in Store(folder).parts[:2]:
            with pytest.raises(DataError, match=part.name):
                part.array("key")
        assert len(Store(folder).verify()) == 2
        for suffix in suffixes:
            swap(one.with_suffix(suffix), other.with_suffix(suffix))
    assert Store(folder).verify() == []


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_damaged_sidecar_is_not_taken_for_finished_work(copy_of, fault_count):
    folder, recipe, dice = Path(copy_of.latents.dir), recipe_of(copy_of, find_target("her2")), random.Random(1)
    shards = ShardSet.open(copy_of.shard_dirs).shards
    before = contents_of(folder)
    for _ in range(fault_count(50)):
        shard = dice.choice(shards)
        layer = dice.choice((PATCHES, TEACHER))
        path = next((folder / "parts" / layer).glob(f"{shard.name}-*.json"))
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        assert not is_complete(folder, layer, shard, recipe)
    store, computed, _ = cache_latents(copy_of, shards, workers=0)
    assert computed >= 1 and store.verify() == []
    assert contents_of(folder) == before


def test_a_file_of_no_part_is_told(copy_of):
    (Path(copy_of.latents.dir) / "parts" / TEACHER / "train-999999-abc.h5").write_bytes(b"what is this")
    (problem,) = Store(copy_of.latents.dir).verify()
    assert "train-999999-abc.h5 is of no part of store.json" in problem
    # It may be in use: nobody is told to remove it by hand.
    assert "--prune" in problem and ": remove it" not in problem


# ---- forged parts: every digest is right, but HDF5 itself would do something else than read rows ----

SECRET = b"SECRET" * 1000


def external_storage(file, name, shape, dtype, secret):
    file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def external_link(file, name, shape, dtype, secret):
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other.create_dataset("x", shape, dtype)
    file[name] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "x")


def soft_link(file, name, shape, dtype, secret):
    file.create_dataset("hidden", shape, dtype)
    file[name] = h5py.SoftLink("/hidden")


def virtual_dataset(file, name, shape, dtype, secret):
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "x", shape)
    file.create_virtual_dataset(name, layout)


def chunked(file, name, shape, dtype, secret):
    file.create_dataset(name, shape, dtype, chunks=True, compression="gzip")


def terabytes(file, name, shape, dtype, secret):
    file.create_dataset(name, (2 * 10**12 // np.dtype(dtype).itemsize,), dtype)


def group(file, name, shape, dtype, secret):
    file.create_group(name)


def no_hdf5(file, name, shape, dtype, secret):
    """What is written behind the file's back, below."""


FORGERIES = [external_storage, external_link, soft_link, virtual_dataset, chunked, terabytes, group, no_hdf5]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
@pytest.mark.parametrize("name", ["pooled", "key"])
def test_a_hostile_hdf5_file_is_refused_before_use(copy_of, tmp_path, forge, name):
    folder, secret = Path(copy_of.latents.dir), tmp_path / "secret"
    secret.write_bytes(SECRET)
    part = Store(folder).parts[0]
    path = part.files[PATCHES if name == "key" else TEACHER].path
    sidecar = json.loads(path.with_suffix(".json").read_text())
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        kept = {other: file[other][:] for other in file if other != name}
    entry = sidecar["datasets"][name]
    with h5py.File(path, "w", libver="latest") as file:
        for other, array in kept.items():
            file.create_dataset(other, data=array)
        forge(file, name, tuple(entry["shape"]), entry["dtype"], secret)
    with path.open("ab") as stream:
        # The places that the sidecar names are in the file, so that only HDF5's own account is wrong.
        stream.write(bytes(max(0, len(whole) - path.stat().st_size)))
    if forge is no_hdf5:
        path.write_bytes(bytes(len(whole)))
    content = path.read_bytes()
    sidecar |= {"bytes": len(content), "xxh3": xxh3(io.BytesIO(content))}
    for one in sidecar["datasets"].values():
        size = math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize
        one["xxh3"] = xxh3(io.BytesIO(content[one["offset"] : one["offset"] + size]))
    agree(folder, sidecar)

    # Rows are bytes of the file at a place; HDF5, which would follow a link out of it, is not asked for them.
    try:
        assert SECRET[:6] not in Store(folder).parts[0].array(name).tobytes()
    except DataError as error:
        assert f"{path}: a {name} is not UTF-8" in str(error)
    told = "".join(Store(folder).verify())
    assert f"part {path} is no HDF5 file of ours" in told or "HDF5 finds other datasets" in told
    assert "SECRET" not in told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("key", b"\xff\xfe", "a key is not UTF-8"),
        ("slide", b"\xff", "a slide is not UTF-8"),
        ("label", np.float32(99).tobytes(), "a label is none of 0 to 3"),
        ("label", np.float32(np.inf).tobytes(), "a label is none of 0 to 3"),
        ("label", np.float32(-1).tobytes(), "a label is none of 0 to 3"),
        ("label", np.float32(1.5).tobytes(), "a label is none of 0 to 3"),
    ],
)
def test_forged_rows_that_make_no_sense_are_refused(copy_of, capsys, name, value, told):
    folder = Path(copy_of.latents.dir)
    path = Store(folder).parts[0].files[PATCHES].path
    sidecar = json.loads(path.with_suffix(".json").read_text())
    content, entry = bytearray(path.read_bytes()), sidecar["datasets"][name]
    size = math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
    content[entry["offset"] : entry["offset"] + len(value)] = value
    path.write_bytes(content)
    entry["xxh3"] = xxh3(io.BytesIO(content[entry["offset"] : entry["offset"] + size]))
    agree(folder, sidecar | {"xxh3": xxh3(io.BytesIO(content))})
    with pytest.raises(DataError, match=f"part {path}: {told}: "):
        Store(folder).parts[0].array(name)
    assert told in "".join(Store(folder).verify())
    assert main(["query", "--store", str(folder), "--key", "k"]) == 1
    # The slides that it writes are those of the shards.
    written = main(["export-latents", "--store", str(folder), "--out", str(folder.parent / "out")])
    assert written == (name != "slide") and "Traceback" not in capsys.readouterr().err


def test_a_declared_size_of_terabytes_is_refused_by_the_sidecar(copy_of):
    folder = Path(copy_of.latents.dir)
    path = Store(folder).parts[0].files[TEACHER].path
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar["datasets"]["pooled"]["shape"] = [2, 1, 5 * 10**11]
    agree(folder, sidecar)
    with pytest.raises(DataError, match="field .datasets.pooled.shape"):
        Store(folder).parts[0].array("pooled")


def agree(folder, sidecar):
    """Write a forged sidecar, with its digest and that of store.json made right."""
    sidecar["digest"] = digest_of({name: value for name, value in sidecar.items() if name != "digest"})
    write_json(folder / "parts" / sidecar["layer"] / f"{sidecar['name']}.json", sidecar)
    document = json.loads((folder / "store.json").read_text())
    layer = document["patches"] if sidecar["layer"] == PATCHES else document["teachers"][TEACHER]
    number = [entry["name"] for entry in document["entries"]].index(sidecar["name"])
    layer["parts"][number] = sidecar["digest"]
    document["digest"] = digest_of({name: value for name, value in document.items() if name != "digest"})
    write_json(folder / "store.json", document)
