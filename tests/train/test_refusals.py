"""Bad input of training as a user meets it: one message that names the file or the field and the remedy, and nothing
that is lost or half-written.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.config_sections import Train
from lgd.io.files import read_json
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.store.commit import commit
from lgd.store.store import Store
from lgd.store.writer import shard_writer
from lgd.stream.plan import World
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.train import checkpoint
from lgd.train.prepare import make_engine


@pytest.fixture
def train(tissue_run, tmp_path, capsys):
    """`train(*args)`: `lgd train` of a run's student that sees H&E only, in a folder of its own."""
    config = tmp_path / "some.yaml"

    def run(*args, yaml=None):
        config.write_text(tissue_run.as_yaml() if yaml is None else yaml)
        own = {"run.dir": tmp_path / "run", "student.dir": tmp_path / "student", "student.method": "he-only"}
        options = [f"--{name}={value}" for name, value in own.items()]
        capsys.readouterr()
        status = main(["train", "--config", str(config), *options, *map(str, args)])
        out, err = capsys.readouterr()
        messages = [line for line in err.splitlines() if line.startswith("lgd: ")]
        assert not out and "Traceback" not in err and len(messages) == (status != 0)
        return status, err[err.index("lgd: ") :].strip() if messages else err

    return run


@pytest.fixture
def folder(tmp_path):
    """Where `train` leaves its network."""
    return tmp_path / "student"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path) -> list[str]:
    """The names of the checkpoints, each of which is without fault, of finite numbers, and beside nothing else."""
    done = checkpoint.complete(folder / "checkpoints")
    for path in done:
        assert checkpoint.problems(path) == []
        weights = checkpoint.load(path, read_json(path / "state.json")["inputs"]).weights
        assert all(tensor.isfinite().all() for tensor in weights.values()), f"{path} cannot be gone on from"
    assert [path.name for path in done] == sorted(path.name for path in (folder / "checkpoints").iterdir())
    return [path.name for path in done]


# ---- the configuration ----


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["--train.batch=6", "--train.workers=2", "--train.accumulate=2"],
            "train.batch 6 does not divide into train.workers 2 x train.accumulate 2: use a multiple of 4",
        ),
        (
            ["--deepspeed", '{"train_batch_size": 8}', "--train.engine=auto"],
            "deepspeed.train_batch_size is set: batch size, precision, clipping, optimizer and schedule are set in "
            "train: only; remove it there",
        ),
        (
            ["--deepspeed", '{"train_micro_batch_size_per_gpu": 8}', "--train.engine=deepspeed"],
            "deepspeed.train_micro_batch_size_per_gpu is set: batch size, precision, clipping, optimizer and schedule "
            "are set in train: only; remove it there",
        ),
        (
            ["--deepspeed", '{"zero_optimization": {"stage": 2}}', "--train.engine=torch"],
            "deepspeed: is set but train.engine is torch, which would ignore it; remove one of the two",
        ),
        (["--train.precision=fp16"], "train.precision"),
        (["--train.btach=8"], "did you mean --train.batch?"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(train, folder, tmp_path, args, told):
    status, message = train(*args)
    assert status == 2 and told in message
    assert not folder.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("train:\n  btach: 8\n", "there is no field train.btach, did you mean train.batch?"),
        ("trian:\n  batch: 8\n", "there is no section trian, did you mean train?"),
        ("deepspeed:\n  optimizer: {type: Adam}\n", "deepspeed.optimizer is set"),
        ("train:\n  resume: [a]\n", "train.resume"),
    ],
)
def test_a_wrong_file_is_refused_and_named(train, folder, tmp_path, yaml, told):
    status, message = train(yaml=yaml)
    assert status == 2 and told in message
    assert "some.yaml" in message or told.startswith("deepspeed.")
    assert not folder.exists() and not (tmp_path / "run").exists()


@pytest.fixture
def shards_of(tissue, tmp_path):
    """`shards_of("3+", "?")`: a shard set of training pairs of these levels only, `?` for pairs that have none; and of
    those of `val` in the split val.
    """

    def made(*levels, val=()):
        rows, images = ["key,he,ihc,level,split"], {}
        for level, split in [*((level, "train") for level in levels), *((level, "val") for level in val)]:
            found = images.setdefault(level, sorted((tissue / "HE").glob(f"*/*_{level.replace('?', '0')}.png")))
            for he in found[4:8] if level == "?" else found[:4]:
                name = f"k{len(rows)}"
                shutil.copy(he, tmp_path / f"{name}he.jpg")
                shutil.copy(tissue / "IHC" / he.parent.name / he.name, tmp_path / f"{name}ihc.jpg")
                rows.append(f"{name},{name}he.jpg,{name}ihc.jpg,{'' if level == '?' else level},{split}")
            # No image is in two splits.
            del found[:4]
        (tmp_path / "pairs.csv").write_text("\n".join(rows))
        out = tmp_path / "some"
        build(ShardOptions(layout="csv", root=str(tmp_path / "pairs.csv"), out=str(out), mpp=0.46))
        return out

    return made


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        (["2+"], r"all 4 patches of the split `train` that have a level are of level 2\+: .*; add shards"),
        (["?"], "no patch of the split `train` has a level, and this network learns from levels only"),
    ],
)
def test_levels_that_teach_nothing_are_refused(train, folder, shards_of, levels, told):
    status, error = train(f"--data.shards={shards_of(*levels)}", "--train.batch=4")
    assert status == 1 and re.search(told, error)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("val", "why"),
    [
        ((), r"train\.patience needs a validation split"),
        (("?",), "and no patch there has a level"),
        (("3+", "?"), r"and all 4 patches there that have a level are of level 3\+"),
        (("1+", "2+"), r"its levels \(1\+, 2\+\) are none of those in the split `train`"),
    ],
)
@pytest.mark.parametrize("metric", ["kappa", "accuracy"])
def test_early_stopping_on_a_metric_that_cannot_change_is_refused(train, folder, shards_of, val, why, metric):
    asked = ["--train.batch=4", "--train.patience=3", f"--train.metric={metric}"]
    status, error = train(f"--data.shards={shards_of('0', '3+', val=val)}", *asked)
    assert status == 1 and re.search(why, error) and "or set train.patience to 0" in error
    assert len(error.splitlines()) == 1 and (metric in error or not val)
    assert not folder.exists()


def test_early_stopping_that_never_looks_is_refused(train, folder):
    status, error = train("--train.patience=3", "--train.evaluate_every=1000")
    assert status == 1 and "train.patience looks every 1000 steps, and the whole training has " in error
    assert not (folder / "config.json").exists()


def test_a_level_that_training_lacks_is_told(train, folder, shards_of):
    status, told = train(f"--data.shards={shards_of('0', '1+', '3+', '?')}", "--train.batch=4")
    assert status == 0 and "has no patch of level 2+: the network can never predict it" in told
    assert folder.exists()


def test_bf16_on_a_gpu_that_has_it_not(monkeypatch):
    """No such GPU can be had for the tests: what PyTorch says of one is put in its place."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(DataError, match="train.precision is bf16, which Tesla T4 has not: set it to fp32"):
        make_engine("torch", nn.Linear(2, 2), Train(precision="bf16"), {}, World(rank=0, size=1, device="cuda:0"))


# ---- numbers that are none ----


def test_a_loss_that_is_no_number_keeps_what_was_saved_before(train, folder):
    status, message = train("--train.lr=1e30", "--train.warmup=0", "--train.checkpoint_every=1")
    assert status == 1
    assert re.search(r"the loss is (nan|inf) at step 2, .*_train_.*: lower train\.lr", message)
    assert "checkpoints before this step are kept" in message
    assert whole(folder) == ["step-00000001"] and not (folder / "config.json").exists()
    # The same command comes to the same end, and loses nothing either.
    assert train("--train.lr=1e30", "--train.warmup=0", "--train.checkpoint_every=1")[0] == 1
    assert whole(folder) == ["step-00000001"]


def test_a_gradient_that_is_no_number_spoils_no_checkpoint(train, folder):
    """The loss is finite at 1e37 times a distance below 1, and its gradient is not."""
    heavy = ["--student.method=lgd", "--student.hallucination_weight=1e37", "--student.warmup=0", "--train.keep=1"]
    status, message = train(*heavy, "--train.checkpoint_every=1")
    assert status == 1
    assert re.search(r"the gradient's norm is (nan|inf) at step \d, .*_train_.*", message)
    assert "checkpoints before this step are kept" in message
    assert not (folder / "checkpoints").exists() or whole(folder)
    assert not (folder / "config.json").exists()


# ---- disks ----


@pytest.mark.faults
def test_a_full_disk_at_the_end_keeps_the_checkpoint(train, disk, tmp_path):
    short = ["--student.epochs=0.4", "--student.dir"]
    assert train(*short, tmp_path / "straight")[0] == 0
    made = tmp_path / "straight"
    sizes = [path.stat().st_size for path in (made / "checkpoints").rglob("*") if path.is_file()]
    room = sum(sizes) + (made / "model.safetensors").stat().st_size // 2
    folder = disk(f"size={room}") / "student"
    status, message = train(*short, folder)
    assert status == 1
    assert f"{folder / 'model.safetensors'} cannot be written, no space is left" in message and "free some" in message
    assert whole(folder) == ["step-00000001"]
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    disk("size=500m")
    assert train(*short, folder)[0] == 0
    weights = [read_json(path / "config.json")["weights_sha256"] for path in (made, folder)]
    assert weights[0] == weights[1]


@pytest.mark.faults
@pytest.mark.parametrize("room", [0.1, 0.6, 1.2, 1.9])
def test_a_full_disk_keeps_the_checkpoints_that_were_saved(train, disk, tmp_path, room):
    """`room`: checkpoints that the disk has room for; a whole one is 60 MB."""
    straight = ["--train.checkpoint_every=1", "--student.epochs=1"]
    assert train(*straight)[0] == 0
    checkpoints = tmp_path / "student" / "checkpoints"
    size = sum(path.stat().st_size for path in checkpoint.complete(checkpoints)[-1].iterdir())
    weights = read_json(tmp_path / "student" / "config.json")["weights_sha256"]

    folder = disk(f"size={int(room * size)}") / "student"
    status, message = train(*straight, f"--student.dir={folder}")
    assert status == 1
    assert str(folder / "checkpoints") in message and "no space is left" in message and "free some" in message
    assert not (folder / "config.json").exists()
    if room > 1:
        assert whole(folder) == ["step-00000001"]
    else:
        assert not list((folder / "checkpoints").iterdir())
    disk("size=500m")
    assert train(*straight, f"--student.dir={folder}")[0] == 0
    assert read_json(folder / "config.json")["weights_sha256"] == weights, "it goes on to the same end"


# ---- the shards ----


@pytest.fixture
def leaking(tissue, tissue_run, tmp_path):
    """The run's shards, and others that have its images on other sides."""
    out = tmp_path / "leaking"
    build(ShardOptions(layout="bci", root=str(tissue), out=str(out), mpp=0.46))
    return [tissue_run.shard_dirs[0], str(out)]


@pytest.mark.parametrize("verb", ["train-teacher", "cache-latents", "train", "evaluate", "ablate"])
def test_shards_that_leak_into_each_other_are_refused_first(leaking, tissue_run, tmp_path, capsys, verb):
    (tmp_path / "some.yaml").write_text(tissue_run.as_yaml())
    names = {"teacher.dir": "teacher", "latents.dir": "latents", "student.dir": "student", "report.dir": "report"}
    folders = [f"--{name}={tmp_path / folder}" for name, folder in names.items()]
    args = [f"--run.dir={tmp_path / 'run'}", *folders, f"--data.shards={json.dumps(leaking)}"]
    capsys.readouterr()
    assert main([verb, "--config", str(tmp_path / "some.yaml"), *args]) == 1
    assert "lgd: data.shards: an image lies on two sides of the split, as the H&E of " in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("run", *names.values()))
    twice = f"--data.shards={json.dumps([leaking[0], leaking[0]])}"
    assert main([verb, "--config", str(tmp_path / "some.yaml"), *args[:-1], twice]) == 1
    assert f"lgd: data.shards: {leaking[0]} is listed twice" in capsys.readouterr().err


# ---- the store ----


def test_a_store_that_lacks_shards_is_refused_before_training(train, folder, tissue_run, tmp_path):
    more = tmp_path / "more"
    synthesise(SynthOptions(out=str(tmp_path / "tissue"), pairs=16, size=64, slides=4, seed=1, workers=1))
    build(ShardOptions(layout="bci", root=str(tmp_path / "tissue"), out=str(more), shard_size=6, mpp=0.46))
    shards = json.dumps([tissue_run.shard_dirs[0], str(more)])
    status, message = train("--student.method=lgd", f"--data.shards={shards}")
    assert status == 1
    lacking = [shard for shard in ShardFolder.open(more).shards if shard.split == "train"]
    assert f"the feature store {tissue_run.latents.dir} lacks latents of teacher for {len(lacking)} of" in message
    assert str(lacking[0].path) in message and message.endswith("run lgd cache-latents")
    assert not (folder / "checkpoints").exists() and not (folder / "config.json").exists()


def cut_rows(source: Store, shards, folder: Path) -> None:
    """The same store less the last row of each part, with digests that are all right."""
    short = [dataclasses.replace(shard, samples=shard.samples - 1) for shard in shards]
    for shard, part in zip(short, source.parts_of(shards), strict=True):
        with shard_writer(folder, shard, source.recipe) as writer:
            writer.add({name: part.array(name)[:-1] for name in part.layout})
    commit(folder, source.recipe, short)


def test_a_store_that_lacks_rows_of_its_shards_is_refused(train, folder, tissue_run, tmp_path):
    cut_rows(Store(tissue_run.latents.dir), ShardSet.open(tissue_run.shard_dirs).shards, tmp_path / "short")
    status, message = train("--student.method=lgd", f"--latents.dir={tmp_path / 'short'}")
    assert status == 1
    assert str(tmp_path / "short") in message and "rows" in message and "lgd cache-latents" in message
    assert not (folder / "checkpoints").exists() and not (folder / "config.json").exists()


# ---- going on ----


def test_resume_from_what_is_no_checkpoint(train, folder, tmp_path):
    assert train("--train.checkpoint_every=1")[0] == 0
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    broken, strange = tmp_path / "broken", tmp_path / "strange"
    for copy, content in ((broken, "{"), (strange, '{"format": "other/1"}')):
        shutil.copytree(checkpoint.complete(folder / "checkpoints")[-1], copy)
        (copy / "state.json").write_text(content)
    # The folder of checkpoints is the likeliest mistake.
    cases = {
        tmp_path / "notes.txt": "is not a complete checkpoint",
        tmp_path / "empty": "is not a complete checkpoint",
        folder / "checkpoints": "is not a complete checkpoint",
        tmp_path / "gone": "is not a complete checkpoint",
        broken: "state.json is not valid JSON",
        strange: "state.json: field format is 'other/1'",
    }
    before = contents(folder)
    for path, told in cases.items():
        status, message = train(f"--train.resume={path}", "--overwrite")
        assert status == 1 and str(path) in message and told in message, path
        assert contents(folder) == before, path


def test_resume_from_a_damaged_checkpoint_loses_nothing(train, folder, tmp_path):
    assert train("--train.checkpoint_every=1", "--train.keep=3")[0] == 0
    older, newest = checkpoint.complete(folder / "checkpoints")[-2:]
    damaged = tmp_path / older.name
    shutil.copytree(older, damaged)
    content = bytearray((damaged / "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "weights.safetensors").write_bytes(content)
    before = contents(folder)
    status, message = train(f"--train.resume={damaged}", "--train.keep=3", "--overwrite")
    assert status == 1
    assert f"{damaged / 'weights.safetensors'} does not match its digest" in message
    assert contents(folder) == before and newest.is_dir()


def test_resume_from_a_checkpoint_of_another_run_loses_nothing(train, folder, tmp_path):
    assert train("--train.checkpoint_every=1", "--train.keep=3")[0] == 0
    other = tmp_path / "other"
    made = ["--train.checkpoint_every=1", f"--student.dir={other}", "--student.epochs=0.4", "--run.seed=7"]
    assert train(*made)[0] == 0
    strange = checkpoint.complete(other / "checkpoints")[0]
    before = contents(folder)
    status, message = train(f"--train.resume={strange}", "--train.keep=3", "--overwrite")
    assert status == 1
    assert (str(strange.name) in message and "another run" in message) or "other shards" in message
    assert {name for name in before if "checkpoints" in name} == {
        name for name in contents(folder) if "checkpoints" in name
    }
    # Nor do the old ones go where a network of other inputs is to take their place.
    status, message = train("--train.resume=gone", "--overwrite", "--student.epochs=0.4", "--run.seed=8")
    assert status == 1 and "gone is not a complete checkpoint" in message and contents(folder) == before
    adopted = [f"--train.resume={strange}", "--overwrite", "--student.epochs=0.4", "--run.seed=7"]
    assert train(*adopted, "--train.checkpoint_every=1", "--train.keep=3")[0] == 0
    assert read_json(folder / "config.json")["weights_sha256"] == read_json(other / "config.json")["weights_sha256"]
    # Its log begins with the lines of the training that made the checkpoint.
    logs = [[json.loads(line)["loss"] for line in (made / "log.jsonl").open()] for made in (folder, other)]
    assert logs[0] == logs[1] != []
