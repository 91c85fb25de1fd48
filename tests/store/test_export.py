import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.io.digests import digest_of
from lgd.io.locks import LOCK, TakenError, exclusive
from lgd.shards.builder import build
from lgd.shards.manifest import PatchMeta
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.store.cache import cache_latents
from lgd.store.export import ExportDocument, ExportOptions, export, file_name, places
from lgd.store.store import Store


def read(path):
    """As the readers of TRIDENT and CLAM do."""
    with h5py.File(path, "r") as file:
        return file["features"][:], file["coords"][:], dict(file["coords"].attrs)


@pytest.fixture
def exported(tissue_run, tmp_path):
    out = tmp_path / "out"
    return Store(tissue_run.latents.dir), out, export(ExportOptions(store=tissue_run.latents.dir, out=str(out)))


def rows_of(store):
    """Slide -> key -> (latent, level)."""
    found = {}
    for part in store.parts:
        columns = (part.array(name) for name in ("slide", "key", "pooled", "label"))
        for slide, key, pooled, level in zip(*columns, strict=True):
            found.setdefault(slide.decode(), {})[key] = (pooled[0], level)
    return found


def test_a_file_a_slide_has_the_latents_of_its_patches(exported):
    store, out, told = exported
    slides = rows_of(store)
    assert len(slides) == 12 and sum(map(len, slides.values())) == 48
    assert sorted(path.name for path in out.iterdir()) == sorted(["export.json", *(f"{s}.h5" for s in slides)])
    assert {row.slide: row.patches for row in told} == {slide: len(rows) for slide, rows in slides.items()}
    for slide, rows in slides.items():
        features, coords, attributes = read(out / f"{slide}.h5")
        assert features.dtype == np.float32 and coords.dtype == np.int64 and attributes["name"] == slide
        with h5py.File(out / f"{slide}.h5") as file:
            keys, levels = file["key"][:], file["level"][:]
        assert sorted(keys) == sorted(rows)
        for key, feature, level in zip(keys, features, levels, strict=True):
            assert np.array_equal(feature, rows[key][0].astype(np.float32)) and level == rows[key][1]


def test_unknown_places_are_laid_side_by_side_and_said_to_be(exported, capsys):
    _, out, told = exported
    assert not any(row.coords_known for row in told)
    features, coords, attributes = read(out / told[0].file)
    assert attributes["patch_size_level0"] == 128 and not attributes["coords_known"]
    assert coords.tolist() == [[128 * number, 0] for number in range(len(features))]
    assert "level0_magnification" not in attributes and attributes["mpp"] == 0.46


def test_tiles_of_a_patch_have_their_places(tissue, tissue_run, change, tmp_path):
    root = tmp_path / "bci"
    for role in ("HE", "IHC"):
        shutil.copytree(tissue / role / "train", root / role / "train")
    build(ShardOptions(layout="bci", root=str(root), out=str(tmp_path / "s"), tile=64, shard_size=7))
    config = change(tissue_run, latents={"dir": str(tmp_path / "l")}, data={"shards": [str(tmp_path / "s")]})
    store = cache_latents(config, ShardFolder.open(tmp_path / "s").shards, workers=0).store
    told = export(ExportOptions(store=str(store.folder), out=str(tmp_path / "out"), split="train"))
    assert told and all(row.coords_known and row.patches == 4 for row in told)
    for row in told:
        with h5py.File(tmp_path / "out" / row.file) as file:
            names, attributes = file["key"][:], dict(file["coords"].attrs)
            where = dict(zip((name.decode()[-5:] for name in names), file["coords"][:].tolist(), strict=True))
        assert where == {"y0_x0": [0, 0], "y0_x1": [64, 0], "y1_x0": [0, 64], "y1_x1": [64, 64]}
        assert attributes["patch_size"] == 64 and attributes["overlap"] == 0


def patch(key, slide=None, size=(100, 100)):
    return PatchMeta.model_construct(key=key, slide=slide, width=size[0], height=size[1])


@pytest.mark.parametrize(
    ("patches", "known", "wanted"),
    [
        ([patch("2M21_3_5", "2M21"), patch("2M21_0_12", "2M21")], True, [[500, 300], [1200, 0]]),
        ([patch("a_y0_x0"), patch("a_y2_x1")], True, [[0, 0], [100, 200]]),
        # Tiles of two patches of a slide.
        ([patch("2M21_0_0_y0_x1", "2M21"), patch("2M21_0_1_y0_x1", "2M21")], False, [[0, 0], [100, 0]]),
        # The numbers are not behind the slide's name.
        ([patch("other_3_5", "2M21"), patch("2M21_0_12", "2M21")], False, [[0, 0], [100, 0]]),
        ([patch("00000_train_1+")], False, [[0, 0]]),
        ([patch("s_0_0", "s", (100, 80)), patch("s_1_0", "s", (100, 120))], False, [[0, 0], [120, 0]]),
    ],
)
def test_places(patches, known, wanted):
    coords, said = places(patches)
    assert said is known and coords.tolist() == wanted and coords.dtype == np.int64


def test_file_names_are_safe_and_differ():
    assert file_name("TCGA-A1.svs") == "TCGA-A1.svs.h5"
    odd = ["a/b", "a_b/", "../up", ".hidden", "a b", "a\\b", "ü", "x" * 300, "x" * 301, ""]
    names = [file_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    assert all(Path(name).name == name and not name.startswith(".") and len(name) < 120 for name in names)


def test_a_second_export_overwrites_its_own_files_only(exported, tissue_run, tmp_path):
    _, out, _ = exported
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = export(ExportOptions(store=tissue_run.latents.dir, out=str(out), split="test"))
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(after) == sorted(["export.json", *(row.file for row in told)]) and len(after) < len(before)
    assert json.loads(after["export.json"])["splits"] == "test"
    export(ExportOptions(store=tissue_run.latents.dir, out=str(out)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "mine.h5").write_bytes(b"years of work")
    with pytest.raises(DataError, match=r"something else \(mine\.h5\): name another folder"):
        export(ExportOptions(store=tissue_run.latents.dir, out=str(out), split="test"))
    assert sorted(path.name for path in out.iterdir()) == sorted([*before, "mine.h5"])


def test_an_export_json_from_elsewhere_removes_nothing(tissue_run, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept.h5"
    out.mkdir()
    kept.write_bytes(b"years of work")
    facts = {"format": ExportDocument.FORMAT, "store": "0" * 64, "teacher": "0" * 64, "splits": "train"}
    forged = facts | {"files": ["../kept.h5", "a/b.h5"]}
    for content in (json.dumps(forged | {"digest": digest_of(forged)}), "{}"):
        (out / "export.json").write_text(content)
        with pytest.raises(DataError, match=r"export\.json: field .*: name another folder as --out"):
            export(ExportOptions(store=tissue_run.latents.dir, out=str(out)))
        assert kept.read_bytes() == b"years of work"


def test_mistakes_are_told(tissue_run, tmp_path):
    options = {"store": tissue_run.latents.dir, "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="no split 'trian', only test, train, val"):
        export(ExportOptions(**options, split="train,trian"))
    assert not (tmp_path / "out").exists()
    shutil.copytree(tissue_run.latents.dir, tmp_path / "moved")
    sources = Store(tmp_path / "moved").sources.model_copy(update={"shards": (str(tmp_path / "gone"),)})
    sources.write(tmp_path / "moved" / "sources.json")
    options["store"] = str(tmp_path / "moved")
    with pytest.raises(DataError, match=r"were in .*gone, which is gone: put them back"):
        export(ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_the_command(tissue_run, tmp_path, capsys):
    args = ["export-latents", "--store", tissue_run.latents.dir, "--out", str(tmp_path / "out"), "--split", "train,val"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert out.startswith("wrote 28 latents in ") and "coords_known is False" in err


def test_one_process_at_a_time_exports_into_a_folder(exported, tissue_run):
    _, out, _ = exported
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with exclusive(out, "exporting latents"):
        with pytest.raises(TakenError, match=r"is exporting latents there, .*: wait until it is done, or end it"):
            export(ExportOptions(store=tissue_run.latents.dir, out=str(out), split="test"))
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK} == before
    # What a killed export left of its lock is ours.
    (out / LOCK).write_text("{}")
    export(ExportOptions(store=tissue_run.latents.dir, out=str(out)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
