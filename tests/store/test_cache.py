import contextlib
import functools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import contents_of
from safetensors.torch import load_file
from torch.nn import functional as F

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.cli import main
from lgd.models.description import TeacherConfig
from lgd.models.export import save_model
from lgd.models.student import HallucinatingStudent
from lgd.models.teacher import Teacher, load_teacher
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.builder import build
from lgd.shards.image import decode, encode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.stain.targets import membrane_grid, nuclei_grid
from lgd.store.cache import cache_latents, is_complete
from lgd.store.commit import commit
from lgd.store.document import TEACHER, Rounding
from lgd.store.drift import make_fixed_vectors
from lgd.store.recipes import recipe_of
from lgd.store.store import Store
from lgd.store.supervision import Supervision, compare_cells
from lgd.store.writer import shard_writer
from lgd.stream.plan import World, d4
from lgd.stream.reader import Reader
from lgd.train.finished import validate
from lgd.train.prepare import Prepared
from lgd.train.tasks import StudentTask


def shards_of(config):
    return [shard for folder in config.shard_dirs for shard in ShardFolder.open(folder).shards]


def rounding_of(store):
    return store.document.patches.rounding | store.document.teachers[TEACHER].rounding


@pytest.fixture
def copy(tissue_run, change, tmp_path):
    """The filled store of `tissue_run`, to change."""
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    return change(tissue_run, latents={"dir": str(tmp_path / "latents")})


def parts(config):
    return {path.name: path.stat().st_mtime_ns for path in (Path(config.latents.dir) / "parts" / TEACHER).glob("*.h5")}


def test_rows_are_what_the_teacher_and_the_targets_say(tissue_run):
    config, shards = tissue_run, shards_of(tissue_run)
    store, teacher = (
        Store(config.latents.dir, recipe_of(config, find_target("her2"))),
        load_teacher(config.teacher.dir)[0],
    )
    number = 9
    small, native = (Reader(shards, ("he", "ihc"), size).read(number) for size in (config.data.size, None))
    part = store.parts_of(shards)[small.shard]
    with torch.no_grad():
        out = teacher(torch.from_numpy(small.images["ihc"])[None].permute(0, 3, 1, 2))
    # float16 keeps 11 bits
    near = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(part.array("pooled")[small.row, 0], out["pooled"][0], **near)
    np.testing.assert_allclose(part.array("map")[small.row, 0], F.adaptive_avg_pool2d(out["map"], 2)[0], **near)
    he, ihc = (torch.from_numpy(native.images[role])[None].permute(0, 3, 1, 2) for role in ("he", "ihc"))
    assert he.shape[-1] == 128, "targets are computed at native resolution"
    np.testing.assert_allclose(part.array("nuclei")[small.row], nuclei_grid(he, 8, 0.46)[0], **near)
    np.testing.assert_allclose(part.array("membrane")[small.row], membrane_grid(ihc, 4, 0.46)[0], **near)


def test_images_of_several_sizes_are_measured_together_as_alone(tissue, tissue_run, tmp_path):
    sizes = {}
    for number, path in enumerate(sorted((tissue / "HE" / "train").iterdir())[:7]):
        for stain in ("HE", "IHC"):
            (tmp_path / stain / "train").mkdir(parents=True, exist_ok=True)
            pixels = decode((tissue / stain / "train" / path.name).read_bytes(), path.name, None)
            side = pixels.shape[0] - 8 * (number % 3)
            (tmp_path / stain / "train" / path.name).write_bytes(encode(pixels[:side, :side], "png"))
            sizes[path.name] = side
    assert len(set(sizes.values())) == 3
    build(ShardOptions(layout="bci", root=str(tmp_path), out=str(tmp_path / "shards"), mpp=0.46))
    alone = Supervision(tissue_run.teacher.dir, recipe_of(tissue_run, find_target("her2")))
    together = Supervision(tissue_run.teacher.dir, recipe_of(tissue_run, find_target("her2")))
    # Any device but `cpu` measures many images at once.
    together.device = "cpu:0"
    reader = alone.reader(ShardFolder.open(tmp_path / "shards").shards)
    of_each, of_all = ([one.prepare(reader, number) for number in range(7)] for one in (alone, together))
    for name in ("nuclei", "membrane"):
        expected = np.stack([sample.images[name] for sample in of_each])
        assert np.array_equal(together.measure(name, of_all), expected)
        assert np.array_equal(alone.measure(name, of_each), expected)


def test_a_small_he_beside_the_native_one_changes_no_row(small_he_shards, tissue_run, change, tmp_path):
    """Nuclei are measured on the native H&E, also where the teacher's size is that of the small one."""
    assert recipe_of(tissue_run, find_target("her2")).teacher.size == 64
    asked = change(tissue_run, data={"shards": [str(small_he_shards)]}, latents={"dir": str(tmp_path / "latents")})
    made = cache_latents(asked, shards_of(asked), workers=0).store
    for one, other in zip(Store(tissue_run.latents.dir).parts, made.parts, strict=True):
        assert one.tar_sha256 != other.tar_sha256
        for name in ("pooled", "map", "nuclei", "membrane", "key"):
            assert np.array_equal(one.array(name), other.array(name)), name


def test_rows_are_in_shard_order_with_their_key_level_and_slide(tissue_run):
    shards = shards_of(tissue_run)
    reader = Reader(shards, ())
    samples = [reader.read(number) for number in range(reader.total)]
    columns = {
        name: np.concatenate([part.array(name) for part in Store(tissue_run.latents.dir).parts_of(shards)])
        for name in ("key", "label", "slide")
    }
    assert [key.decode() for key in columns["key"]] == [sample.key for sample in samples]
    assert columns["label"].tolist() == [sample.label for sample in samples]
    assert [slide.decode() for slide in columns["slide"]] == [sample.meta.slide for sample in samples]
    assert len(set(columns["key"])) == 48


def test_eight_views_are_the_teacher_on_turned_images(tissue_run, change, tmp_path):
    config = change(tissue_run, latents={"dir": str(tmp_path), "views": 8, "dtype": "float32"})
    shard = next(shard for shard in shards_of(config) if shard.samples <= 4)
    store, computed, _ = cache_latents(config, [shard], workers=0)
    assert computed == 1 and store.parts[0].array("pooled").shape[:2] == (shard.samples, 8)
    teacher = load_teacher(config.teacher.dir)[0]
    reader = Reader([shard], ("ihc",), config.data.size)
    image = torch.from_numpy(reader.read(1).images["ihc"])[None].permute(0, 3, 1, 2)
    with torch.no_grad():
        views = [teacher(d4(image, torch.tensor([k]))) for k in range(8)]
    pooled = torch.cat([view["pooled"] for view in views])
    np.testing.assert_allclose(store.parts[0].array("pooled")[1], pooled, rtol=1e-4, atol=1e-4)
    assert not np.allclose(pooled[0], pooled[1], atol=1e-3), "views must differ for the test to mean anything"
    maps = torch.cat([F.adaptive_avg_pool2d(view["map"], 2) for view in views])
    np.testing.assert_allclose(store.parts[0].array("map")[1], maps, rtol=1e-4, atol=1e-4)


def test_a_second_call_computes_nothing(copy):
    before = parts(copy)
    store, computed, _ = cache_latents(copy, shards_of(copy), workers=0)
    assert computed == 0 and parts(copy) == before and store.verify() == []


def test_a_changed_shard_redoes_its_own_part_only(copy, change, tissue, tmp_path):
    """One patch that is turned changes the bytes of one shard."""
    root = tmp_path / "bci"
    shutil.copytree(tissue, root)
    first = sorted((root / "HE").rglob("*.png"))[0]
    first.write_bytes(encode(decode(first.read_bytes(), first.name)[::-1], "jpg"))
    split = {"slides": str(root / "truth.csv"), "split": "group:0.5,0.25,0.25"}
    build(ShardOptions(layout="bci", root=str(root), out=str(tmp_path / "s"), shard_size=8, mpp=0.46, **split))
    config = change(copy, data={"shards": [str(tmp_path / "s")]})
    old = {shard.sha256 for shard in shards_of(copy)}
    changed = [shard for shard in shards_of(config) if shard.sha256 not in old]
    assert len(changed) == 1

    before = parts(copy)
    store, computed, pruned = cache_latents(config, shards_of(config), workers=0)
    after = parts(config)
    assert (computed, pruned) == (1, 0) and store.verify() == []
    # The part of the shard that was stays: another run may need it.
    assert before.items() <= after.items() and len(after) == len(before) + 1 and len(store.parts) == len(after)
    store, computed, pruned = cache_latents(config, shards_of(config), workers=0, prune=True)
    assert (computed, pruned) == (0, 1) and store.rows == 48 and store.verify() == []
    assert len(parts(config)) == len(before) and len(parts(config).items() & before.items()) == len(before) - 1


def test_a_run_on_fewer_shards_takes_nothing_from_another(copy, change):
    """Two runs share a store, of which one knows a part of the shards only."""
    before, digest = parts(copy), Store(copy.latents.dir).digest
    store, computed, pruned = cache_latents(copy, shards_of(copy)[:2], workers=0)
    assert (computed, pruned) == (0, 0) and parts(copy) == before and store.digest == digest
    assert Store(copy.latents.dir).digest_of(shards_of(copy)) == store.digest_of(shards_of(copy))


@pytest.mark.faults
def test_a_deleted_damaged_part_is_made_again(copy):
    victim = sorted((Path(copy.latents.dir) / "parts" / TEACHER).glob("*.h5"))[0]
    content = victim.read_bytes()
    part = next(part for part in Store(copy.latents.dir).parts if part.files[TEACHER].path == victim)
    place = part.files[TEACHER].sidecar().datasets["pooled"].offset
    victim.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match="delete it and run lgd cache-latents"):
        part.array("pooled")
    victim.unlink()
    store, computed, _ = cache_latents(copy, shards_of(copy), workers=0)
    assert computed == 1 and store.verify() == []
    assert victim.read_bytes() == content, "the same inputs give the same bytes"


def test_other_settings_are_refused_with_the_difference(copy, change):
    with pytest.raises(DataError, match="teacher.views: 1 in the store, 8 asked for"):
        cache_latents(change(copy, latents={"views": 8}), shards_of(copy), workers=0)
    assert len(parts(copy)) == len(shards_of(copy))


def other_teacher(folder, tmp_path, spoil):
    """The teacher with changed weights."""
    config = TeacherConfig.read_folder(folder)
    weights = load_file(Path(folder) / "model.safetensors")
    spoil(weights)
    facts = {name: getattr(config, name) for name in TeacherConfig.model_fields if name != "weights_sha256"}
    save_model(tmp_path / "teacher", weights, functools.partial(TeacherConfig, **facts))
    return str(tmp_path / "teacher")


def test_another_teacher_is_refused(copy, change, tmp_path):
    folder = other_teacher(copy.teacher.dir, tmp_path, lambda w: w["head.bias"].add_(1))
    config = change(copy, teacher={"dir": folder})
    with pytest.raises(
        DataError, match=r"another recipe:\n  teacher.weights_sha256: \w{64} in the store, \w{64} asked"
    ):
        cache_latents(config, shards_of(config), workers=0)
    assert not is_complete(
        Path(config.latents.dir), TEACHER, shards_of(config)[0], recipe_of(config, find_target("her2"))
    )


def test_latents_that_are_no_numbers_stop_with_the_key(copy, change, tmp_path):
    def spoil(weights):
        first = next(name for name in weights if weights[name].ndim == 4)
        weights[first].fill_(torch.nan)

    config = change(
        copy,
        teacher={"dir": other_teacher(copy.teacher.dir, tmp_path, spoil)},
        latents={"dir": str(tmp_path / "new")},
    )
    shard = shards_of(config)[0]
    key = Reader([shard], ()).read(0).key
    with pytest.raises(DataError) as caught:
        cache_latents(config, [shard], workers=0)
    assert f"{shard.path}, {key}: pooled is not finite" in str(caught.value)
    assert not list((tmp_path / "new").rglob("*.h5"))


def test_latents_too_large_for_float16_stop_too(copy, change, tmp_path):
    folder = other_teacher(copy.teacher.dir, tmp_path, lambda w: w["pooled_mean"].fill_(1e6))
    config = change(copy, teacher={"dir": folder}, latents={"dir": str(tmp_path / "new")})
    with pytest.raises(DataError, match="pooled is not finite as float16.*latents.dtype to float32"):
        cache_latents(config, shards_of(config)[:1], workers=0)


def test_a_folder_of_something_else_is_left_alone(copy, change, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    config = change(copy, latents={"dir": str(tmp_path / "mine")})
    with pytest.raises(DataError, match=r"something else \(thesis\.txt\)"):
        cache_latents(config, shards_of(config), workers=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_loss_by_float16_is_measured_and_stored(tissue_run, change, tmp_path):
    shards = shards_of(tissue_run)[:2]
    half, full = (
        cache_latents(change(tissue_run, latents={"dir": str(tmp_path / dtype), "dtype": dtype}), shards, workers=0)[0]
        for dtype in ("float16", "float32")
    )
    for name, lost in rounding_of(half).items():
        numbers = lost.as_json()
        there, true = (np.concatenate([part.array(name) for part in store.parts]) for store in (half, full))
        error = np.abs(there.astype(np.float64) - true)
        length = np.linalg.norm(true.reshape(len(true), -1).astype(np.float64), axis=1)
        relative = np.linalg.norm(error.reshape(len(true), -1), axis=1) / np.where(length > 0, length, 1)
        assert numbers == {"absolute": pytest.approx(error.max()), "relative": pytest.approx(relative.max())}
        assert 0 <= numbers["relative"] < 2**-10
    assert rounding_of(half)["pooled"].absolute > 0
    assert all(number == 0 for lost in rounding_of(full).values() for number in lost.as_json().values())


def test_the_bytes_do_not_depend_on_threads_or_patches_in_hand(tissue_run, change, tmp_path):
    shards = shards_of(tissue_run)
    contents = []
    for threads, batch in ((1, 64), (3, 1), (1, 3), (2, 6)):
        latents = {"dir": str(tmp_path / f"{threads}-{batch}"), "batch": batch, "dtype": "float32"}
        config = change(tissue_run, latents=latents, data={"threads": threads})
        cache_latents(config, shards, workers=0)
        contents.append(contents_of(tmp_path / f"{threads}-{batch}"))
    assert all(content == contents[0] for content in contents)


def test_latents_do_not_depend_on_where_a_shard_ends(tissue_run):
    """Nor do those of a patch on the patches beside it: the same bits, as of a shard of it alone."""
    config = tissue_run
    supervision = Supervision(config.teacher.dir, recipe_of(config, find_target("her2")), config.code)
    reader = supervision.reader(shards_of(config)[:1], targets=False)
    samples = [supervision.prepare(reader, number) for number in range(7)]
    together = supervision.rows(samples)
    for few in ([0], [6], [5, 2, 4], [3, 1, 6, 0, 2]):
        rows = supervision.rows([samples[number] for number in few])
        assert rows.keys() == together.keys() == {"pooled", "map"}
        assert all(np.array_equal(rows[name], together[name][few]) for name in rows)


def test_a_shard_that_is_listed_twice_has_one_part(tissue_run, change, tmp_path):
    config = change(tissue_run, latents={"dir": str(tmp_path / "latents")})
    shard = shards_of(config)[0]
    store, computed, _ = cache_latents(config, [shard, shard], workers=0)
    assert computed == len(store.parts) == 1 and store.rows == shard.samples
    assert cache_latents(config, [shard, shard], workers=0)[1] == 0


def test_bf16_without_a_gpu_is_refused(tissue_run, change, tmp_path):
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        pytest.skip("this machine has a GPU with bf16")
    config = change(tissue_run, latents={"dir": str(tmp_path / "latents"), "precision": "bf16"})
    with pytest.raises(DataError, match="latents.precision is bf16, but there is no GPU here that has it: set it to"):
        cache_latents(config, shards_of(config), workers=0)
    assert not list(tmp_path.rglob("*.h5"))


def test_rows_that_the_teacher_does_not_give_any_more_are_found(copy, tmp_path, capsys):
    """A forged store: every digest is right, but one part holds another latent than its IHC gives."""
    store = Store(copy.latents.dir)
    assert main(["verify", str(store.folder), "--reencode", "48"]) == 0
    out = capsys.readouterr().out
    assert "re-encoded 48 rows" in out and re.search(r"pooled: \S+, \S+ of its length", out)
    shard = next(s for s in shards_of(copy) if s.sha256 == store.parts[1].tar_sha256)
    arrays = {name: np.array(store.parts[1].array(name)) for name in store.parts[1].layout}
    arrays["pooled"][2] += 1
    with shard_writer(store.folder, shard, store.recipe) as writer:
        writer.add(arrays)
        writer.rounding.update(dict.fromkeys(rounding_of(store), Rounding(absolute=0.0, relative=0.0)))
    commit(store.folder, store.recipe, shards_of(copy), sources=copy.shard_dirs, teacher=copy.teacher.dir)
    shutil.rmtree(store.folder / "index")
    assert main(["verify", str(store.folder)]) == 0
    assert main(["verify", str(store.folder), "--reencode", "48"]) == 1
    err = capsys.readouterr().err
    assert "1 problem(s)" in err and "pooled differs from what its teacher and targets give by" in err


def test_reencoding_asks_for_the_teacher_and_the_shards_of_the_store(copy, tmp_path, capsys):
    assert main(["verify", copy.shard_dirs[0], "--reencode", "3"]) == 2
    assert "--reencode is for feature stores" in capsys.readouterr().err
    folder = other_teacher(copy.teacher.dir, tmp_path, lambda w: w["head.bias"].add_(1))
    assert main(["verify", copy.latents.dir, "--reencode", "3", "--teacher", folder]) == 1
    assert "holds another teacher than the one that made the store" in capsys.readouterr().err


def test_no_tf32_goes_into_what_is_stored_scored_or_compared(tissue_run, monkeypatch):
    """What a GPU would do: cuDNN's default is TF32, and it is that again afterwards; the same of products."""
    seen = []

    def look(real):
        def looking(*args):
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return real(*args)

        return looking

    for network in (Teacher, HallucinatingStudent):
        monkeypatch.setattr(network, "forward", look(network.forward))
    supervision = Supervision(tissue_run.teacher.dir, recipe_of(tissue_run, find_target("her2")))
    sample = supervision.prepare(supervision.reader(shards_of(tissue_run)[:1]), 0)
    # As on a GPU, where targets are measured with the latents.
    monkeypatch.setattr(supervision, "measure", look(supervision.measure))
    scorer, shards = load_scorer(tissue_run.student.dir), ShardSet.open(tissue_run.shard_dirs)
    split = shards.of_split("val")
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            supervision.rows([sample])
            make_fixed_vectors(supervision.teacher, 64)
            score_shards(scorer, split, threads=1)
            made = len(seen)
            with contextlib.closing(Prepared(shards, StudentTask(tissue_run, shards), World())) as run:
                validate(run.learner, split)
            assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 5 <= made < len(seen) and {*seen} == {(False, "highest")}


@pytest.mark.parametrize(
    ("name", "shape", "cell"),
    [
        ("pooled", (3, 8, 128), (1, 5)),
        ("map", (3, 1, 128, 4, 4), (1, 0, slice(None), 2, 3)),
        ("nuclei", (3, 8, 8), (1, 4, 7)),
        ("membrane", (3, 4, 4, 3), (1, 2, 0)),
    ],
)
def test_one_wrong_cell_is_as_wrong_as_all(name, shape, cell):
    full = np.random.default_rng(0).uniform(1, 2, shape)
    wrong = full.copy()
    wrong[cell] *= 1.01
    assert compare_cells(name, 1.01 * full, full).relative == pytest.approx(0.01)
    assert compare_cells(name, wrong, full).relative == pytest.approx(0.01, rel=0.5)
    # What is nearly nothing is measured by its row, whose sums round it.
    full[cell] = 1e-9
    assert compare_cells(name, full + 1e-9, full).relative < 1e-7
    assert compare_cells(name, 0 * full, 0 * full).relative == 0
