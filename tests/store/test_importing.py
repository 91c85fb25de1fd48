"""Features of other tools as latents of a store: what is stored, what is refused, and what goes on from them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from filling import contents_of
from foreign import write_stamp, write_trident

from lgd import comparisons, pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.cli.contents import check
from lgd.cli.facts import as_lines, describe
from lgd.io.location import as_location
from lgd.models.description import StudentConfig
from lgd.models.known import find_published
from lgd.report.ablation import AblateOptions
from lgd.retrieval.queries import query
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store import importing
from lgd.store.export import ExportOptions, export
from lgd.store.importing import ImportOptions, import_latents
from lgd.store.joining import Patches
from lgd.store.store import Store

DIM, SIDE = 24, 512


def pack(tissue, out, slides, ihc=True, places=True, center=""):
    """A set of the virtual patches of some slides, whose IHC lie side by side on a slide each."""
    truth = dict(line.split(",")[:2] for line in (tissue / "truth.csv").read_text().splitlines()[1:])
    rows, counts = ["he,ihc,key,label,slide,split,center,ihc_slide,ihc_x,ihc_y,ihc_side"], dict.fromkeys(slides, 0)
    root = out.parent / f"{out.name}-patches"
    root.mkdir(parents=True)
    for path in sorted((tissue / "HE").glob("*/*")):
        slide = truth[path.stem]
        if slide not in slides:
            continue
        number, split = counts[slide], ("train", "train", "val", "test")[slides.index(slide) % 4]
        counts[slide] += 1
        shutil.copy(path, root / path.name)
        partner = f"ihc-{path.name}" if ihc else ""
        if ihc:
            shutil.copy(str(path).replace("/HE/", "/IHC/"), root / partner)
        place = f"{slide}_ihc.svs,{number % 3 * SIDE + 7},{number // 3 * SIDE + 5},{SIDE}" if places else ",,,"
        key, label = path.stem.replace("+", "p"), path.stem.rpartition("_")[2]
        rows.append(f"{path.name},{partner},{key},{label},{slide},{split},{center},{place}")
    (root / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(root / "pairs.csv"), out=str(out), shard_size=4, mpp=0.46))
    return str(out)


@pytest.fixture(scope="module")
def slides(tissue):
    return sorted({line.split(",")[1] for line in (tissue / "truth.csv").read_text().splitlines()[1:]})


@pytest.fixture(scope="module")
def placed(tissue, slides, tmp_path_factory):
    """Two sets of pairs with places, of 8 and of 4 slides, and one of H&E alone of the first 8."""
    folder = tmp_path_factory.mktemp("placed")
    few, rest = slides[:8], slides[8:]
    return {
        "few": pack(tissue, folder / "few", few, center="north"),
        "rest": pack(tissue, folder / "rest", rest, center="south"),
        "alone": pack(tissue, folder / "alone", few, ihc=False, places=False),
    }


@pytest.fixture
def run(tissue_config, change, tmp_path, placed):
    """`run("few")`: a run over some of the sets, in folders of its own, whose teacher is imported."""

    def make(*names, **sections):
        fields = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "latents", "student", "report")}
        fields["teacher"] |= {"source": "imported"}
        fields["student"] |= {"epochs": 1}
        fields["data"] = {"shards": [placed[name] for name in names or ("few",)]}
        for name, values in sections.items():
            fields[name] = fields.get(name, {}) | values
        return change(tissue_config, **fields)

    return make


def shards_of(config):
    return ShardSet.open(config.shard_dirs).shards


def features_of(config, seed=0, dtype=np.float32):
    """Key -> what another tool would have computed."""
    keys = sorted(Patches.read(shards_of(config)).keys)
    drawn = np.random.default_rng(seed).normal(3, 2, (len(keys), DIM)).astype(dtype)
    return dict(zip(keys, drawn, strict=True))


def tiles_of(config, vectors, seed=1):
    """Slide -> features and places of all its tiles in any order; the tiles of no patch are the first ones drawn."""
    patches, dice = Patches.read(shards_of(config)), np.random.default_rng(seed)
    for slide in sorted(set(patches.slides)):
        members = [number for number, one in enumerate(patches.slides) if one == slide]
        features = [vectors[patches.keys[number]] for number in members] + [*dice.normal(size=(5, DIM))]
        places = [*patches.place_n2[members].tolist(), *([9 * SIDE, row * SIDE] for row in range(5))]
        order = dice.permutation(len(features))
        yield slide.partition(".")[0], np.array(features, np.float32)[order], np.array(places)[order]


def write_slides(folder, config, vectors, write=write_trident, **options):
    folder.mkdir(exist_ok=True)
    for slide, features, places in tiles_of(config, vectors):
        write(folder / f"{slide}.h5", features, places, **options)
    return folder


def write_table(path, vectors):
    np.savez(path, key=[*vectors], features=np.array([*vectors.values()]))
    return path


def run_import(config, *files, **options):
    options = {"encoder": "counts"} | options
    return import_latents(config, ImportOptions(files=[str(file) for file in files], **options), shards_of(config), 0)


def stored_by_key(store):
    return {
        key.decode(): row[0]
        for part in store.parts
        for key, row in zip(part.array("key"), part.array("pooled"), strict=True)
    }


def centred(config, vectors, dtype=np.float16):
    """What a store should hold: by hand, from keys alone."""
    patches = {sample for shard in shards_of(config) if shard.split == "train" for sample in Patches.read([shard]).keys}
    mean = np.mean([vectors[key].astype(np.float64) for key in patches], axis=0).astype(np.float32)
    return {key: (vector.astype(np.float32) - mean).astype(dtype) for key, vector in vectors.items()}


def differences(stored, expected, atol=0.0):
    """The keys that one of both lacks, or whose rows differ by more than `atol`."""
    both = stored.keys() & expected.keys()
    return (stored.keys() ^ expected.keys()) | {
        key for key in both if not np.allclose(stored[key], expected[key], rtol=0, atol=atol)
    }


def test_features_of_trident_are_stored_by_place(run, tmp_path):
    config = run(latents={"dtype": "float32"})
    vectors = features_of(config)
    store, written = run_import(config, write_slides(tmp_path / "uni", config, vectors), encoder="")
    assert written == len(store.parts) == len(shards_of(config))
    assert not differences(stored_by_key(store), centred(config, vectors, np.float32), atol=1e-6)
    recipe, layer = store.recipe.teacher, store.document.teachers["teacher"]
    assert (recipe.source, recipe.views, recipe.map, recipe.size, recipe.pool) == ("imported", 1, 0, None, None)
    assert (recipe.encoder["name"], recipe.encoder["tool"], recipe.encoder["files"]) == ("uni_v2", "TRIDENT", 8)
    assert layer.licence == find_published("UNI2-h").licence and "no commercial use" in layer.licence
    assert len(layer.centre) == DIM and layer.rounding["pooled"].absolute == 0
    assert (store.verify(), check(as_location(store.folder), reencode=2)[1]) == ([], [])
    (note,) = check(as_location(store.folder), reencode=2)[2]
    assert note == "the latents of teacher were imported: there is no network that could make them again"
    (line,) = [line for line in as_lines(describe(store.folder)) if line.startswith("source of teacher")]
    assert "uni_v2, 8 files of TRIDENT; unknown: weights, pool, size, precision; terms: CC-BY-NC-ND" in line
    # The patches' own layer has the targets and labels, as after caching.
    assert store.parts[0].layout["nuclei"].shape == (8, 8) and store.parts[0].layout["membrane"].shape == (4, 4, 3)


def test_places_in_micrometres_and_keys_give_the_same_rows(run, tmp_path, change):
    """The patches are 128 px of 0.46 um/px and 512 px of level 0, so that this has 0.115 um/px."""
    config = run()
    vectors = features_of(config, dtype=np.float16)
    folder = tmp_path / "stamp"
    folder.mkdir()
    for slide, features, places in tiles_of(config, vectors):
        write_stamp(folder / f"{slide}.h5", features, places * 0.115, side_um=SIDE * 0.115)
    by_place = stored_by_key(run_import(config, folder, encoder="").store)
    assert not differences(by_place, centred(config, vectors))
    keyed = change(config, latents={"dir": str(tmp_path / "keyed")})
    assert not differences(stored_by_key(run_import(keyed, write_table(tmp_path / "a.npz", vectors)).store), by_place)


def test_the_same_again_is_reused_and_other_files_are_refused(run, tmp_path):
    config = run()
    vectors = features_of(config)
    path = write_table(tmp_path / "a.npz", vectors)
    first = run_import(config, path, licence="CC0")
    before = contents_of(Path(config.latents.dir))
    document = (Path(config.latents.dir) / "store.json").read_bytes()
    again = run_import(config, shutil.copy(path, tmp_path / "renamed.npz"), licence="CC0")
    assert again.written == 0 and again.store.digest == first.store.digest
    vectors[min(vectors)] = vectors[min(vectors)] + 1
    for changed, options, field in (
        (write_table(tmp_path / "b.npz", vectors), {"licence": "CC0"}, "weights_sha256"),
        (path, {"licence": "CC0", "encoder": "other"}, "encoder.name"),
        (path, {}, "encoder.licence"),
    ):
        with pytest.raises(DataError, match="was made by another recipe") as error:
            run_import(config, changed, **options)
        assert any(f"teacher.{field}" in line for line in error.value.args), error.value.args
        assert len(error.value.args) == 3, "what was not changed is not named"
    assert contents_of(Path(config.latents.dir)) == before
    assert (Path(config.latents.dir) / "store.json").read_bytes() == document


def test_more_shards_are_added_later_about_the_same_centre(run, tmp_path):
    few, both = run(), run("few", "rest")
    vectors = features_of(both)
    path = write_table(tmp_path / "a.npz", vectors)
    first = run_import(few, path)
    before = contents_of(Path(few.latents.dir))
    store, written = run_import(both, path)
    assert written == len(shards_of(both)) - len(shards_of(few)) > 0 == len(store.verify())
    after = contents_of(Path(few.latents.dir))
    assert {name: after[name] for name in before} == before
    assert store.document.teachers["teacher"].centre == first.store.document.teachers["teacher"].centre
    mean = centred(few, {key: vectors[key] for key in features_of(few)})
    assert not differences({key: row for key, row in stored_by_key(store).items() if key in mean}, mean)


def test_an_import_that_was_stopped_goes_on_by_parts(run, tmp_path, monkeypatch):
    config = run()
    path = write_table(tmp_path / "a.npz", features_of(config))
    with monkeypatch.context() as patched:
        patched.setattr(importing, "commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_import(config, path)
    before = contents_of(Path(config.latents.dir))
    store, written = run_import(config, path)
    assert written == 0 and contents_of(Path(config.latents.dir)) == before and store.verify() == []


def test_a_part_that_is_gone_is_made_again(run, tmp_path):
    config = run()
    path = write_table(tmp_path / "a.npz", features_of(config))
    digest, before = run_import(config, path).store.digest, contents_of(Path(config.latents.dir))
    for layer in ("patches", "teacher"):
        min((Path(config.latents.dir) / "parts" / layer).glob("*.h5")).unlink()
        store, written = run_import(config, path)
        assert written == (layer == "teacher") and store.verify() == [] and store.digest == digest
        assert contents_of(Path(config.latents.dir)) == before


def test_an_export_reads_back_equal(tissue_run, tmp_path, change):
    """Bit for bit, as latents of another name in the same store."""
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    config = change(tissue_run, latents={"dir": str(tmp_path / "latents")})
    export(ExportOptions(store=config.latents.dir, out=str(tmp_path / "export")))
    named = change(config, teacher={"name": "again", "source": "imported"})
    store, _ = run_import(named, tmp_path / "export", encoder="")
    first = stored_by_key(Store(config.latents.dir, teachers=("teacher",)))
    assert stored_by_key(store).keys() == first.keys() and store.verify() == []
    assert all((row == first[key]).all() for key, row in stored_by_key(store).items())
    layer = store.document.teachers["again"]
    assert layer.centre is None and layer.recipe.encoder["name"] == "resnet10"
    assert {*store.document.teachers} == {"again", "teacher"}


def spoil(vectors, kind, config):
    keys = sorted(vectors)
    if kind == "hole":
        return {key: vectors[key] for key in keys[3:]}
    vectors = {key: vector.copy() for key, vector in vectors.items()}
    if kind == "infinite":
        vectors[keys[2]][1], vectors[keys[5]][0] = np.inf, np.nan
    if kind == "large":
        vectors[keys[0]][0] = 70_000
    return vectors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hole", {}, r"^3 of 32 patches have no features: .*\n  29 patches have some; of 29 rows of 1 files 0"),
        ("infinite", {}, "the features of 2 of 32 patches are not finite, .*: compute them again, in float32"),
        ("large", {}, r"latents.dtype is float16, which holds numbers up to 65,504, .* set latents.dtype to float32"),
        ("", {"encoder": ""}, "does not say which encoder computed it: name it by --encoder"),
        ("", {"layout": "trident"}, "is no file of TRIDENT"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(run, tmp_path, kind, options, message):
    config = run()
    path = write_table(tmp_path / "a.npz", spoil(features_of(config), kind, config))
    with pytest.raises(DataError, match=message):
        run_import(config, path, **options)
    assert not Path(config.latents.dir).exists()


def test_a_scale_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"slide_mpp: 0.0 should be a number, more than 0"):
        ImportOptions(files=["a.npz"], slide_mpp=0.0)


def test_half_of_the_slides_or_another_tile_size_are_refused(run, tmp_path):
    config = run()
    folder = write_slides(tmp_path / "uni", config, features_of(config))
    for path in sorted(folder.iterdir())[:4]:
        path.unlink()
    with pytest.raises(
        DataError, match="^16 of 32 patches have no features: .* 13 more\n  16 patches have some; of 36"
    ):
        run_import(config, folder)
    folder = write_slides(tmp_path / "large", config, features_of(config), side=1024)
    with pytest.raises(DataError, match="the tiles of 8 of 8 files are not of the patches' size, .* 1024 px"):
        run_import(config, folder)
    assert not Path(config.latents.dir).exists()


def test_files_of_two_encoders_or_lengths_are_refused(run, tmp_path):
    config = run()
    folder = write_slides(tmp_path / "uni", config, features_of(config))
    first, last = sorted(folder.iterdir())[0], sorted(folder.iterdir())[-1]
    write_trident(last, np.zeros((4, DIM), np.float32), np.zeros((4, 2)), encoder="virchow2")
    with pytest.raises(DataError, match=f"{first.name} is of the encoder uni_v2, and .*{last.name} virchow2"):
        run_import(config, folder)
    write_trident(last, np.zeros((4, DIM + 1), np.float32), np.zeros((4, 2)))
    with pytest.raises(DataError, match=f"is of numbers a row {DIM}, and .*{last.name} {DIM + 1}"):
        run_import(config, folder)
    write_stamp(last, np.zeros((4, DIM), np.float32), np.zeros((4, 2)))
    with pytest.raises(DataError, match="is laid out as TRIDENT, and .* STAMP"):
        run_import(config, folder)
    assert not Path(config.latents.dir).exists()


def test_a_name_of_computed_latents_is_not_taken(tissue_run, tmp_path, change):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    config = change(tissue_run, latents={"dir": str(tmp_path / "latents")})
    before = contents_of(tmp_path / "latents")
    path = write_table(tmp_path / "a.npz", features_of(config))
    with pytest.raises(DataError, match=r"another recipe") as error:
        run_import(config, path)
    assert "name these latents otherwise than teacher (teacher.name)" in error.value.args[-1]
    assert contents_of(tmp_path / "latents") == before


def test_everything_goes_on_from_imported_latents(run, tmp_path, tissue, capsys, change):
    """By the commands, from files that state no source; a probe gives the teacher's row."""
    config = run("few", "rest", teacher={"source": "trained"})
    (tmp_path / "run.yaml").write_text(config.as_yaml())
    folder = write_slides(tmp_path / "uni", config, features_of(config))
    asked = ["--config", str(tmp_path / "run.yaml")]
    assert main(["import-latents", *asked, str(folder)]) == 0
    err = capsys.readouterr().err
    assert "parts imported, 48 rows" in err and "60 rows of features are of no patch of these shards" in err
    assert "a probe for the level was fitted on" in err
    assert main(["import-latents", *asked, str(folder)]) == 0 and "reused, nothing changed" in capsys.readouterr().err
    assert main(["train", *asked]) == 1
    assert "were imported, and teacher.source is trained: set it to imported" in capsys.readouterr().err
    # The run's config.yaml has it.
    asked = ["--config", f"{config.run.dir}/config.yaml"]
    for verb in ("build-index", "train", "evaluate"):
        assert main([verb, *asked]) == 0, capsys.readouterr().err
    assert "IHC teacher, probe" in capsys.readouterr().out
    student = StudentConfig.read_folder(config.student.dir)
    assert student.hallucination is None and student.latents["teacher"].dim == DIM
    assert "no commercial use" in student.teachers[0].licence
    image = str(next((tissue / "HE" / "test").iterdir()))
    assert main(["query", "--model", config.run.dir, "-k", "2", "--json", image]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["neighbours"]) == 2
    assert main(["verify", config.run.dir]) == 0 and main(["info", config.run.dir]) == 0
    record = json.loads((Path(config.run.dir) / "run.json").read_text())["stages"]["import-latents"][0]
    assert record["given"]["files"] == [str(folder)]
    for verb, message in (("train-teacher", "no network to train"), ("cache-latents", "no network here computes such")):
        assert main([verb, *asked]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", *asked, "--student.hallucination", "own"]) == 2
    assert "student.hallucination is own, and teacher.source is imported: only a preset" in capsys.readouterr().err


@pytest.mark.parametrize("student", [{"method": "two-stream"}, {"method": "distil", "distil_weight": 1.0}])
def test_other_methods_go_on_from_them_too(run, tmp_path, student):
    config = run("few", "rest", student=student)
    run_import(config, write_table(tmp_path / "a.npz", features_of(config)))
    pipeline.train_student(config)
    assert StudentConfig.read_folder(config.student.dir).latents["teacher"].dim == DIM


def test_patches_without_second_images_have_latents_and_no_targets(run, tmp_path, tissue):
    config = run("alone")
    store, _ = run_import(config, write_table(tmp_path / "a.npz", features_of(config)))
    assert {*store.parts[0].layout} == {"key", "label", "slide", "pooled"} and store.verify() == []
    assert store.recipe.targets.nuclei_grid is None
    pipeline.build_index(config)
    pipeline.train_student(config)
    assert "IHC teacher, probe" in pipeline.evaluate(config)
    image = next((tissue / "HE" / "test").iterdir())
    (answer,) = query(config.student.dir, config.latents.dir, [image], k=2)
    assert len(answer.neighbours) == 2
    sheet = tmp_path / "sheet.png"
    assert main(["query", "--model", config.run.dir, "--sheet", str(sheet), str(image)]) == 0
    assert sheet.stat().st_size > 3_000
    with pytest.raises(DataError, match="32 of 32 patches have no place on the slide of their second image"):
        other = run("alone", latents={"dir": str(tmp_path / "other")})
        run_import(other, write_slides(tmp_path / "uni", run(), features_of(run())))


def test_a_store_has_targets_of_all_patches_or_of_none(run, tmp_path):
    pairs, both = run(), run("rest", "alone")
    run_import(pairs, write_table(tmp_path / "a.npz", features_of(pairs)))
    with pytest.raises(DataError, match=r"lacks latents of teacher for \d+ of \d+ shards, .*: run lgd import-latents"):
        pipeline.train_student(run("few", "rest"))
    Path(pairs.latents.dir, "probe", "teacher.json").unlink()
    with pytest.raises(DataError, match=r"probe/teacher.json is missing, .*: run lgd import-latents"):
        pipeline.train_student(run(student={"method": "distil", "distil_weight": 1.0}))
    with pytest.raises(DataError, match="holds domain targets, which patches without a second image .* cannot have"):
        run_import(both, write_table(tmp_path / "b.npz", features_of(both)))


def test_methods_are_compared_by_the_probe_of_imported_latents(run, tmp_path):
    config = run("few", "rest", student={"epochs": 0.3})
    run_import(config, write_table(tmp_path / "a.npz", features_of(config)))
    assert "| IHC teacher, probe |" in comparisons.ablate(config, AblateOptions(seeds=1))
    assert not Path(config.teacher.dir).exists()


def test_a_center_is_left_out_of_the_probe_too(run, tmp_path):
    config = run("few", "rest", student={"epochs": 0.3})
    run_import(config, write_table(tmp_path / "a.npz", features_of(config)))
    probe = tmp_path / "latents" / "probe" / "teacher.json"
    before = probe.read_bytes()
    assert comparisons.ablate(config, AblateOptions(seeds=1, leave_out="center")).startswith("# Each center left out")
    assert probe.read_bytes() == before
    at = Path(config.run.dir)
    for center in ("north", "south"):
        of_all, without = (np.load(at / part / "ablation" / "teacher.npz") for part in ("", f"leave-out/{center}"))
        own = np.isin(of_all["keys"], without["keys"])
        assert (of_all["keys"][own] == without["keys"]).all() and own.any()
        assert not np.allclose(of_all["probability"][own], without["probability"])
        assert not (at / "leave-out" / center / "latents").exists()


def test_a_run_without_its_import_says_which_verb_is_lacking(run):
    with pytest.raises(DataError, match="holds no latents yet, and teacher.source is imported: run lgd import-latents"):
        pipeline.train_student(run())
    with pytest.raises(ConfigError, match="lgd import-latents puts its latents there"):
        pipeline.train_teacher(run())


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("uni_v1", "UNI"),
        ("uni_v2", "UNI2-h"),
        ("uni2", "UNI2-h"),
        ("hoptimus0", "H-optimus-0"),
        ("virchow2", "Virchow2"),
        ("conch_v15", "CONCH 1.5"),
        ("hf-hub:MahmoodLab/UNI2-h@main", "UNI2-h"),
        ("Kaiko ViT-S/16", "Kaiko ViT-S/16"),
        ("gene counts", None),
    ],
)
def test_encoders_are_known_by_what_tools_call_them(name, row):
    known = find_published(name)
    assert (known.name if known else None) == row
