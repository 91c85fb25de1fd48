"""What happens to a store when caching is killed, a disk is full, bits flip, or somebody hands over a forged one."""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from lgd.cli import main
from lgd.errors import DataError
from lgd.files import digest_of, write_json, xxh3
from lgd.pipeline import all_shards as shards_of
from lgd.store.cache import cache_latents
from lgd.store.index import build_index
from lgd.store.latents import Store
from lgd.store.search import Searcher, problems
from lgd.store.sidecar import is_complete
from lgd.store.supervision import recipe_of

pytestmark = pytest.mark.faults


# ---- caching that is killed ----


def fill(config):
    os.setpgid(0, 0)
    cache_latents(config, shards_of(config), workers=0)


@pytest.fixture(scope="module")
def forks():
    """Processes that have imported everything: a start takes a tenth of a second instead of six."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "h5py", "lgd.store.cache", "lgd.models.teacher", __name__])
    return context


def test_caching_that_is_killed_goes_on_with_the_unfinished_parts(
    small_parts, change, contents, forks, fault_count, tmp_path
):
    """Kills at random moments; whatever was committed is whole and stays, and the end is as if nothing had happened."""
    dice, kills, rounds, kept = random.Random(0), 0, 0, []
    for attempt in range(2):
        # The first time the processes' server is started.
        began = time.monotonic()
        fill_and_wait(forks, change(small_parts, latents={"dir": str(tmp_path / f"timed-{attempt}")}), None)
    whole = time.monotonic() - began
    while kills < fault_count(100):
        config = change(small_parts, latents={"dir": str(tmp_path / f"round-{rounds}")})
        folder = Path(config.latents.dir)
        committed: dict[str, int] = {}
        for _ in range(4):
            # By the clock, which mostly meets the start, and in turn while a part further is written.
            further = len(committed) + dice.randrange(8) if kills % 2 else None
            killed = fill_and_wait(forks, config, dice.uniform(0.1, 0.9) * whole, further)
            there = committed_parts(folder, contents)
            assert committed.items() <= there.items(), "a finished part was made again"
            committed = there
            if not killed:
                break
            kills += 1
            kept.append(len(committed))
        finished = (folder / "store.json").exists()
        store, computed = cache_latents(config, shards_of(config), workers=0)
        assert computed == (0 if finished else len(shards_of(config)) - len(committed))
        assert committed.items() <= committed_parts(folder, contents).items()
        assert {path.name: path.read_bytes() for path in (folder / "parts").iterdir()} == contents
        assert store.digest == Store(small_parts.latents.dir).digest and store.verify() == []
        rounds += 1
        shutil.rmtree(folder)
    # The moments were spread over the run, or the test shows little.
    assert any(0 < parts < len(shards_of(small_parts)) for parts in kept), kept


def fill_and_wait(forks, config, seconds, parts=None):
    """Run caching in a process, killed after so many seconds, or when there are more than so many parts.

    Tells whether it was killed before its end.
    """
    process = forks.Process(target=fill, args=(config,))
    process.start()
    if parts is None:
        process.join(seconds)
    else:
        folder = Path(config.latents.dir) / "parts"
        while process.is_alive() and len(list(folder.glob("*.json"))) <= parts:
            time.sleep(0.001)
        time.sleep(seconds / 100)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def committed_parts(folder, contents):
    """Name -> time of change of the committed parts, each compared with the undisturbed one."""
    found = {}
    for sidecar in sorted((folder / "parts").glob("*.json")) if (folder / "parts").is_dir() else []:
        part = sidecar.with_suffix(".h5")
        assert part.read_bytes() == contents[part.name] and sidecar.read_bytes() == contents[sidecar.name]
        found[part.name] = part.stat().st_mtime_ns
    return found


def test_a_second_cacher_is_refused_and_told_who_is_at_work(small_parts, change, forks, tmp_path, capsys):
    config = change(small_parts, latents={"dir": str(tmp_path / "latents")})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    process = forks.Process(target=fill, args=(config,))
    process.start()
    while not (tmp_path / "latents" / ".owner.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert main(["cache-latents", "--config", str(tmp_path / "config.yaml")]) == 1
        told = capsys.readouterr().err
        assert re.search(rf"latents: process {process.pid} on \S+ is caching there, for 0\.\d minutes: wait", told), (
            told
        )
    finally:
        process.kill()
        process.join()
    # Its lock went with it; its name still lies there.
    assert (tmp_path / "latents" / ".owner.json").exists()
    assert main(["cache-latents", "--config", str(tmp_path / "config.yaml")]) == 0
    assert Store(config.latents.dir).verify() == [] and not (tmp_path / "latents" / ".owner.json").exists()


def test_ctrl_c_ends_caching_soon_and_the_same_command_goes_on(small_parts, change, tmp_path):
    config = change(small_parts, latents={"dir": str(tmp_path / "latents")})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    command = [sys.executable, "-m", "lgd", "cache-latents", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list((tmp_path / "latents" / "parts").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "lgd: interrupted" in told and "Traceback" not in told
    assert not list((tmp_path / "latents" / "parts").glob("*.tmp"))
    assert main(command[3:]) == 0 and Store(config.latents.dir).verify() == []


# ---- disks ----


@pytest.fixture
def disk(tmp_path):
    """`disk(options)`: mount, or change, a small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options):
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()}): run the tests as root")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


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
    store, computed = cache_latents(config, shards_of(config), workers=0)
    assert computed == len(shards_of(config)) - len(kept) and store.verify() == []


def test_a_read_only_folder_is_told(small_parts, change, disk):
    folder = disk("size=50m") / "latents"
    shutil.copytree(small_parts.latents.dir, folder)
    config = change(small_parts, latents={"dir": str(folder)})
    victim = sorted((folder / "parts").glob("*.json"))[0]
    whole = victim.read_bytes()
    victim.unlink()
    disk("ro")
    with pytest.raises(DataError, match=r"latents/\.lock cannot be written .Read-only file system.: get write access"):
        cache_latents(config, shards_of(config), workers=0)
    disk("rw")
    victim.write_bytes(whole)
    disk("ro")
    # What is complete is used from where it may not be written.
    assert cache_latents(config, shards_of(config), workers=0)[1] == 0


# ---- damage ----


@pytest.fixture
def indexed(copy_of):
    build_index(Store(copy_of.latents.dir), "auto", ["train"], recall=0.99, seed=0)
    return Path(copy_of.latents.dir)


def use(folder):
    """Everything that a reader does with a store: raises `DataError` for damage."""
    store = Store(folder)
    for part in store.parts:
        part.array("key")
    searcher = Searcher(store)
    searcher.search(np.ones((1, store.parts[0].array("pooled").shape[-1]), np.float32), 3)


def test_every_flipped_bit_is_found_and_its_file_named(indexed, fault_count):
    use(indexed)
    assert Store(indexed).verify() == [] and problems(Store(indexed)) == []
    dice = random.Random(0)
    files = sorted(path for path in indexed.rglob("*") if path.is_file() and path.name != ".lock")
    kinds = [
        [p for p in files if p.match(pattern)] for pattern in ("parts/*.h5", "parts/*.json", "index/*", "store.json")
    ]
    assert all(kinds) and sum(map(len, kinds)) == len(files)
    for number in range(fault_count(200)):
        path = dice.choice(kinds[number % len(kinds)])
        whole = path.read_bytes()
        content = bytearray(whole)
        place = dice.randrange(len(content))
        content[place] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DataError) as raised:
            use(indexed)
        assert path.stem in str(raised.value), f"byte {place} of {path}: {raised.value}"
        found = whats_wrong(indexed)
        assert found and all(path.stem in problem for problem in found), f"byte {place} of {path}: {found}"
        path.write_bytes(whole)
    use(indexed)


def whats_wrong(folder):
    """What `lgd verify` tells."""
    from lgd.check import check

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
    folder, recipe, dice = Path(copy_of.latents.dir), recipe_of(copy_of), random.Random(1)
    shards = shards_of(copy_of)
    before = {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}
    for _ in range(fault_count(50)):
        shard = dice.choice(shards)
        path = next((folder / "parts").glob(f"{shard.name}-*.json"))
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        assert not is_complete(folder, shard, recipe)
    store, computed = cache_latents(copy_of, shards, workers=0)
    assert computed >= 1 and store.verify() == []
    assert {path.name: path.read_bytes() for path in (folder / "parts").iterdir()} == before


def test_a_file_of_no_part_is_told(copy_of):
    (Path(copy_of.latents.dir) / "parts" / "train-999999-abc.h5").write_bytes(b"what is this")
    (problem,) = Store(copy_of.latents.dir).verify()
    assert "train-999999-abc.h5 is of no part: remove it" in problem


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
    path, sidecar = part.path, json.loads(part.path.with_suffix(".json").read_text())
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        kept = {other: file[other][:] for other in file if other != name}
    entry = sidecar["datasets"][name]
    with h5py.File(path, "w", libver="latest") as file:
        for other, array in kept.items():
            file.create_dataset(other, data=array)
        forge(file, name, tuple(entry["shape"]), entry["dtype"], secret)
    with open(path, "ab") as stream:
        # The places that the sidecar names are in the file, so that only HDF5's own account is wrong.
        stream.write(bytes(max(0, len(whole) - path.stat().st_size)))
    if forge is no_hdf5:
        path.write_bytes(bytes(len(whole)))
    sidecar |= {"bytes": path.stat().st_size, "xxh3": xxh3(io.BytesIO(path.read_bytes()))}
    agree(folder, sidecar)

    with pytest.raises(DataError, match=rf"part {path} is no HDF5 file of ours|HDF5 finds other datasets") as raised:
        Store(folder).parts[0].array(name)
    assert "SECRET" not in str(raised.value)
    assert [problem for problem in Store(folder).verify() if str(path) in problem]


def test_a_declared_size_of_terabytes_is_refused_by_the_sidecar(copy_of):
    folder = Path(copy_of.latents.dir)
    sidecar = json.loads(Store(folder).parts[0].path.with_suffix(".json").read_text())
    sidecar["datasets"]["pooled"]["shape"] = [2, 1, 5 * 10**11]
    agree(folder, sidecar)
    with pytest.raises(DataError, match="rows of shape"):
        Store(folder).parts[0].array("pooled")


def agree(folder, sidecar):
    """Write a forged sidecar, with its digest and that of store.json made right."""
    sidecar["digest"] = digest_of({name: value for name, value in sidecar.items() if name != "digest"})
    write_json(folder / "parts" / f"{sidecar['name']}.json", sidecar)
    document = json.loads((folder / "store.json").read_text())
    for entry in document["parts"]:
        if entry["name"] == sidecar["name"]:
            entry["digest"] = sidecar["digest"]
    document["digest"] = digest_of({name: value for name, value in document.items() if name != "digest"})
    write_json(folder / "store.json", document)
