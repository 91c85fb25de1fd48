"""Fixtures shared by all tests."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import hypothesis
import pytest

from lgd.config import Config
from lgd.config_files import load_config

# Small tensors: more threads only fight each other when the machine runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test is not timed: another process may have the cores.
hypothesis.settings.register_profile("lgd", deadline=None)
hypothesis.settings.load_profile("lgd")

# A background job of a shell ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test` prints what the processes of pytest that crash leave in this folder. It is no other process's that a test
# starts.
_CRASH_LOGS = os.environ.pop("LGD_CRASH_LOGS", "")
_crash_log: TextIO | None = None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist the folder."""
    node.workerinput["crash_logs"] = _CRASH_LOGS


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Have the stacks of a crash written to a log; pytest has chosen standard error for them before."""
    global _crash_log
    folder = getattr(config, "workerinput", {}).get("crash_logs", _CRASH_LOGS)
    if folder:
        _crash_log = Path(folder, str(os.getpid())).open("w")  # noqa: SIM115 - open until the process ends
        faulthandler.enable(_crash_log)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Keep the name of the test that begins."""
    if _crash_log:
        _crash_log.seek(0)
        _crash_log.truncate()
        print(nodeid, file=_crash_log, flush=True)


# A minute and more each. `make test` gives whole files to its two processes, which end together when the short ones are
# last.
_LONG = ("test_ray_faults.py", "test_run_at_url.py", "test_train_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the short files of the last folder at the end."""
    items.sort(key=lambda item: item.path.parent.name == "train" and item.path.name not in _LONG)


@pytest.fixture(autouse=True, scope="session")
def short_waits() -> Iterator[None]:
    """A remote's faults that last are waited for a second, not a minute."""
    from lgd.io import calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_FIRST_PAUSE", 0.05)
        patch.setattr(calls, "_PATIENCE", 1.0)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real patches, which LGD_REAL_DATA names."""
    named = os.environ.get("LGD_REAL_DATA")
    if not named:
        pytest.skip("no real patches: set LGD_REAL_DATA to their folder")
    folder = Path(named)
    if not (folder / "bci-native").is_dir():
        pytest.fail(f"LGD_REAL_DATA is {named}, but {folder / 'bci-native'} is missing")
    return folder


@pytest.fixture(scope="session")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs of virtual tissue, 128 pixels wide, in BCI's layout. No test may change it."""
    from lgd.tissue.synth import synthesise
    from lgd.tissue.synth_options import SynthOptions

    folder = tmp_path_factory.mktemp("tissue") / "bci"
    synthesise(SynthOptions(out=str(folder), pairs=48, size=128, slides=12, workers=1))
    return folder


def build_tissue_shards(tissue: Path, out: Path, he_size: int = 0) -> Path:
    """Shards of `tissue`, 8 pairs in each: 20 pairs in train, 8 in val and 20 in test."""
    from lgd.shards.builder import build
    from lgd.shards.options import ShardOptions

    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.5,0.25,0.25"}
    asked = {"shard_size": 8, "mpp": 0.46, "he_size": he_size}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(out), **asked, **split))
    return out


@pytest.fixture(scope="session")
def small_he_shards(tissue: Path) -> Path:
    """The shards of `tissue_config`, with the H&E at its `data.size` too. No test may change them."""
    return build_tissue_shards(tissue, tissue.parent / "small-he-shards", he_size=64)


@pytest.fixture(scope="session")
def tissue_config(tissue: Path) -> Config:
    """A small run over shards of `tissue` in which nothing is trained yet; its folders are those of `tissue_run`."""
    shards = build_tissue_shards(tissue, tissue.parent / "shards")
    options = {
        "run.dir": tissue.parent / "run",
        "data.shards": shards,
        "data.size": 64,
        "data.threads": 1,
        "teacher.epochs": 2,
        "latents.map": 2,
        "student.epochs": 2,
        "train.workers": 0,
        "train.engine": "torch",
        "train.batch": 8,
        "report.bootstrap": 10,
    }
    return load_config(overrides=[f"--{name}={value}" for name, value in options.items()])


@pytest.fixture(scope="session")
def tissue_run(tissue_config: Config) -> Config:
    """A run with a trained teacher, a filled store, an index and a trained student. No test may change its folder."""
    from lgd.retrieval.index import build_index
    from lgd.shards.shard_set import ShardSet
    from lgd.store.cache import cache_latents
    from lgd.train.launch import train_under

    config = tissue_config
    train_under(config, "teacher")
    shards = ShardSet.open(config.shard_dirs).shards
    store = cache_latents(config, shards, workers=0).store
    build_index(store, shards, "auto", ["train"], recall=0.99, seed=0, components=config.latents.components)
    train_under(config, "student")
    return config


@pytest.fixture(scope="session")
def change() -> Callable[..., Config]:
    """`change(config, student={"dir": ..., "epochs": 1})`: a run with some fields of some sections replaced."""

    def changed(config: Config, **sections: dict[str, Any]) -> Config:
        return replace(config, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})

    return changed


@pytest.fixture(scope="session")
def fault_count() -> Callable[[int], int]:
    """`fault_count(300)`: how many of so many faults to try; a tenth, unless LGD_FAULTS is `all` (`make faults`)."""
    share = 1 if os.environ.get("LGD_FAULTS") == "all" else 10
    return lambda number: -(-number // share)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(options)`: mount, or change, a small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()}): run the tests as root")
        mounted = True
        return folder

    yield mount
    if mounted:
        # Lazily: what failed may hold a file open until it is collected.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., Any]]:
    """`alone(function, *arguments)`: what a function gives in another process, which has no other thread."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def s3_server():
    """A client of an S3 server of the module's own on loopback, which the environment names to everybody."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # s3fs keeps the address and the keys of its first use.
        s3fs.S3FileSystem.clear_instance_cache()
        yield boto3.client("s3")
    s3fs.S3FileSystem.clear_instance_cache()
    # All servers of a process share what they hold.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", b"").close()
    server.stop()
