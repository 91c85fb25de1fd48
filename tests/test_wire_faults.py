"""Shards, a store, a model and a checkpoint at s3:// urls, read over a wire that harms them.

Whatever happens, what is read is right, or one error tells that it cannot be read; and when the wire is well again, so
is what is read, through the same cache.
"""

import collections
import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import s3fs
from wire import HARMS, Wire

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.io.files import read_json
from lgd.io.location import as_location
from lgd.retrieval.index import build_index
from lgd.retrieval.search import Searcher
from lgd.scoring.predict import load_scorer
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.store.cache import cache_latents
from lgd.store.store import Store
from lgd.stream.reader import Reader
from lgd.train import checkpoint

pytestmark = pytest.mark.faults


def read_shards(folder):
    reader = Reader(ShardFolder.open(folder).shards[:2], ("he", "ihc"), None)
    samples = [reader.read(number) for number in range(reader.total)]
    return [(s.key, s.meta, *(image.tobytes() for image in s.images.values())) for s in samples]


def read_store(folder):
    store = Store(folder)
    contents = [{name: part.array(name).tobytes() for name in part.layout} for part in store.parts]
    found = Searcher(store).search(np.array(store.parts[0].array("pooled")[:4, 0]), 5)
    return contents, [np.asarray(array).tobytes() for array in found]


def read_model(folder):
    scorer = load_scorer(folder)
    image_BHW3 = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return scorer.name, {name: array.tobytes() for name, array in scorer.score(image_BHW3).items()}


def read_checkpoint(folder, inputs):
    found = checkpoint.load(folder, inputs)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in found.weights.items()}
    moments = {name: tensor.numpy().tobytes() for name, tensor in found.moments.items()}
    return found.progress, tensors, moments


@pytest.fixture(scope="module")
def store(tissue_run, change, tmp_path_factory):
    """The folder of a store of two shards, with an index."""
    config = change(tissue_run, latents={"dir": str(tmp_path_factory.mktemp("store") / "latents")})
    shards = [ShardSet.open(config.shard_dirs).of_split(split)[0] for split in ("train", "val")]
    build_index(cache_latents(config, shards, workers=0).store, shards, "auto", ["train"], recall=0.99, seed=0)
    return Path(config.latents.dir)


@pytest.fixture(scope="module")
def artefacts(tissue_run, store):
    """Name -> what reads the artefact, and its folder."""
    step = checkpoint.complete(Path(tissue_run.student.dir, "checkpoints"))[-1]
    inputs = read_json(step / "state.json")["inputs"]
    return {
        "shards": (read_shards, Path(tissue_run.shard_dirs[0])),
        "store": (read_store, store),
        "model": (read_model, Path(tissue_run.student.dir)),
        "checkpoint": (functools.partial(read_checkpoint, inputs=inputs), step),
    }


@pytest.fixture(scope="module")
def wire(s3_server, artefacts):
    """A wire to a bucket that holds the artefacts."""
    s3_server.create_bucket(Bucket="harmed")
    for name, (_, folder) in artefacts.items():
        for path in folder.rglob("*"):
            if path.is_file() and "tensorboard" not in path.parts:
                s3_server.upload_file(str(path), "harmed", f"{name}/{path.relative_to(folder).as_posix()}")
    with pytest.MonkeyPatch.context() as patch, Wire(*s3_server.meta.endpoint_url.split("/")[2].split(":")) as wire:
        patch.setenv("AWS_ENDPOINT_URL", wire.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield wire


def harm_one(wire, dice, harm, requests, lasting):
    """Harm the answer to one of so many requests; where it is lasting, also all later ones to the same request."""
    hit, harmed = dice.randrange(requests), []

    def choose(number, request):
        if number == hit:
            harmed.append(request)
            return harm
        return harm if lasting and request in harmed else ""

    wire.requests.clear()
    wire.choose, wire.dice = choose, dice


def heal(wire):
    wire.choose = lambda number, request: ""


def try_to(read):
    """What `read` gives, or the error that a user is shown."""
    try:
        return read(), ""
    except DataError as error:
        assert "s3://harmed" in str(error) and len(str(error)) < 2000, error
        return None, str(error)


@pytest.mark.parametrize("name", ["shards", "store", "model", "checkpoint"])
def test_a_harmed_wire_gives_the_right_content_or_an_error(wire, artefacts, fault_count, tmp_path, monkeypatch, name):
    reader, folder = artefacts[name]
    expected, outcomes = reader(folder), collections.Counter()
    read = functools.partial(reader, as_location(f"s3://harmed/{name}"))
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "clean"))
    wire.requests.clear()
    assert read() == expected
    requests, count, before = len(wire.requests), fault_count(120), wire.harmed
    for number in range(count):
        monkeypatch.setenv("LGD_CACHE", str(tmp_path / str(number)))
        harm, dice = HARMS[number % len(HARMS)], random.Random(f"{name} {number}")
        often = "always" if dice.random() < 1 / 3 else "once"
        harm_one(wire, dice, harm, requests, often == "always")
        found, error = try_to(read)
        outcomes[harm, often, "refused" if error else "right" if found == expected else "WRONG"] += 1
        heal(wire)
        if error or found != expected:
            outcomes["", "afterwards", "right" if try_to(read)[0] == expected else "POISONED"] += 1
    print(name, dict(outcomes))
    assert not [outcome for outcome in outcomes if outcome[2] in ("WRONG", "POISONED")], outcomes
    for harm in HARMS:
        assert not outcomes[harm, "once", "refused"], "what failed once is asked for once more"
    assert wire.harmed - before >= count


@pytest.mark.parametrize("name", ["shards", "store", "model", "checkpoint"])
def test_copies_that_are_damaged_on_the_disk_are_fetched_again(wire, artefacts, tmp_path, monkeypatch, name):
    reader, folder = artefacts[name]
    expected = reader(folder)
    monkeypatch.setenv("LGD_CACHE", str(tmp_path))
    heal(wire)
    dice = random.Random(name)
    for _ in range(2):
        assert reader(as_location(f"s3://harmed/{name}")) == expected
        for path in tmp_path.glob("lgd-*"):
            content = bytearray(path.read_bytes())
            # Anywhere, in the middle, and at the end: what is read first and last.
            for spot in (dice.randrange(len(content)), len(content) // 2, len(content) - 1):
                content[spot] ^= 1
            path.write_bytes(content)
    assert main(["verify", f"s3://harmed/{name}"]) == 0


@pytest.mark.parametrize("name", ["shards", "store", "model", "checkpoint"])
def test_verify_over_a_harmed_wire_ends_with_one_message(wire, fault_count, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "clean"))
    wire.requests.clear()
    assert main(["verify", f"s3://harmed/{name}"]) == 0
    requests = len(wire.requests)
    for number in range(fault_count(20)):
        monkeypatch.setenv("LGD_CACHE", str(tmp_path / str(number)))
        dice = random.Random(f"verify {name} {number}")
        harm_one(wire, dice, dice.choice(HARMS), requests, lasting=dice.random() < 1 / 3)
        capsys.readouterr()
        status = main(["verify", f"s3://harmed/{name}"])
        assert status in (0, 1) and (status == 0 or "s3://harmed" in capsys.readouterr().err)
        heal(wire)
        assert main(["verify", f"s3://harmed/{name}"]) == 0


SEED = os.environ.get("LGD_WIRE_SEED", "0")
STAGES = {
    "build-shards": "--layout bci --root {tissue} --out s3://stages/shards --shard-size 8 --mpp 0.46 --slides "
    "{tissue}/truth.csv --split group:0.5,0.25,0.25",
    "train-teacher": "{run}",
    "cache-latents": "{run}",
    "build-index": "{run}",
    "train": "{run}",
    "evaluate": "{run} --report.queries 2",
    "predict": "{patches} --model s3://stages/run",
    "query": "{patches} --model s3://stages/run --store s3://stages/run",
    "export-latents": "--store s3://stages/run/latents --out s3://stages/export",
    "verify": "s3://stages/run/latents",
}


def harm_at_random(wire, dice, share):
    """Harm a share of the answers; a third of the requests that are hit stay harmed.

    What people write has no digest by which damage in its content could be seen.
    """
    stuck = {}

    def choose(number, request):
        harms = HARMS[3:] if request.endswith((".yaml", ".jsonl")) else HARMS
        harm = stuck.get(request) or (dice.choice(harms) if dice.random() < share else "")
        if harm and dice.random() < 1 / 3:
            stuck[request] = harm
        return harm

    wire.choose, wire.dice = choose, dice


def test_every_stage_over_a_harmed_wire_ends_with_one_message_and_succeeds_when_run_again(
    wire, s3_server, tissue, tissue_run, tmp_path, monkeypatch, capsys
):
    s3_server.create_bucket(Bucket="stages")
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    given = {"data.size": 64, "data.threads": 1, "teacher.epochs": 2, "latents.map": 2, "student.epochs": 2}
    given |= {"train.workers": 0, "train.engine": "torch", "train.batch": 8, "report.bootstrap": 10}
    fields = {"run.dir": "s3://stages/run", "data.shards": "s3://stages/shards", **given}
    run = " ".join(f"--{name} {value}" for name, value in fields.items())
    patches = " ".join(str(path) for path in sorted((tissue / "HE/test").glob("*.png"))[:2])
    failed = []
    for stage, options in STAGES.items():
        command = [
            stage,
            *options.format(
                tissue=tissue,
                run=run,
                patches=patches,
            ).split(),
        ]
        harm_at_random(wire, random.Random(f"{stage} {SEED}"), 0.1)
        capsys.readouterr()
        status = main(command)
        shown = capsys.readouterr().err
        heal(wire)
        assert status == 0 or (status == 1 and "s3://stages" in shown), (stage, shown)
        assert "Traceback" not in shown and len([line for line in shown.splitlines() if line.startswith("lgd: ")]) <= 1
        if status:
            failed.append(stage)
            assert main(command) == 0, stage
    print(SEED, failed)
    assert 2 <= len(failed) < len(STAGES), failed
    shards = read_json(Path(tissue_run.shard_dirs[0], "manifest.json"))
    assert read_json("s3://stages/shards/manifest.json")["digest"] == shards["digest"]
    for kind in ("teacher", "student"):
        made = read_json(Path(tissue_run.as_fields()[f"{kind}.dir"], "config.json"))
        assert read_json(f"s3://stages/run/{kind}/config.json")["weights_sha256"] == made["weights_sha256"]
