"""Sets of H&E alone, by themselves and beside pairs: what trains on them, what refuses, and what a report can say."""

import json
import shutil
from pathlib import Path

import pytest
from networks import save_network

from lgd import pipeline
from lgd.base.errors import DataError
from lgd.cli import main
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.report.caveats import PROBE_ROW
from lgd.report.sheet import Gallery
from lgd.retrieval.queries import query
from lgd.scoring.predict import predict
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.repeats import open_disjoint
from lgd.store.store import Store


def pack(tissue, out, names, split, ihc=False):
    """A set of some virtual patches, all in one split, with their slides, and with or without their IHC."""
    root = out.parent / f"{out.name}-patches"
    root.mkdir()
    slides = dict(line.split(",")[:2] for line in (tissue / "truth.csv").read_text().splitlines()[1:])
    rows = ["he,ihc,label,slide,split"]
    for path in names:
        shutil.copy(path, root / path.name)
        partner = ""
        if ihc:
            partner = f"ihc-{path.name}"
            shutil.copy(str(path).replace("/HE/", "/IHC/"), root / partner)
        rows.append(f"{path.name},{partner},{path.stem.rpartition('_')[2]},{slides[path.stem]},{split}")
    (root / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(root), out=str(out), shard_size=8, mpp=0.46))
    return str(out)


@pytest.fixture(scope="module")
def sets(tissue, tmp_path_factory):
    """Folders of shards by what they hold; no slide is in two of them but in both of `test`."""
    folder = tmp_path_factory.mktemp("sets")
    slides = dict(line.split(",")[:2] for line in (tissue / "truth.csv").read_text().splitlines()[1:])
    names = sorted(slides.values())
    of = {slide: [] for slide in names}
    for path in sorted((tissue / "HE").glob("*/*")):
        of[slides[path.stem]].append(path)
    groups = [
        [path for slide in dict.fromkeys(names) for path in of[slide]][start : start + 16] for start in (0, 16, 32)
    ]
    assert [len({slides[path.stem] for path in some}) for some in groups] == [4, 4, 4]
    return {
        "pairs": pack(tissue, folder / "pairs", groups[0], "train", ihc=True),
        "he train": pack(tissue, folder / "he-train", groups[1], "train"),
        "he test": pack(tissue, folder / "he-test", groups[2], "test"),
        "pairs test": pack(tissue, folder / "pairs-test", groups[2], "test", ihc=True),
    }


@pytest.fixture
def run(tissue_config, change, tmp_path, sets):
    """`run("pairs", "he test", method="lgd")`: a run over some of the sets, in folders of its own."""

    def make(*names, **student):
        parts = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "latents", "student", "report")}
        parts["student"] |= {"epochs": 1} | student
        parts["teacher"] |= {"epochs": 1}
        return change(tissue_config, **parts, data={"shards": [sets[name] for name in names]})

    return make


def report_of(config):
    return json.loads((Path(config.report.dir) / "metrics.json").read_text())


def test_h_and_e_alone_trains_and_is_scored(run, change, tissue):
    config = change(run("he train", "he test", method="he-only"), report={"robustness": True})
    pipeline.train_student(config)
    table = pipeline.evaluate(config)
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == ["H&E-only", "colour only"]
    report = report_of(config)
    assert any(one.startswith("16 of 16 patches of this split have no second image") for one in report["caveats"])
    assert report["retrieval"] is None and [one["name"] for one in report["robustness"]["models"]] == ["H&E-only"]
    image = next((tissue / "HE" / "test").iterdir())
    (row,) = predict(config.student.dir, [image])
    assert row.level is not None
    with pytest.raises(DataError, match="hallucinates no latents"):
        query(config.student.dir, config.student.dir, [image])


@pytest.mark.parametrize("verb", ["train-teacher", "cache-latents"])
def test_what_needs_the_ihc_refuses_in_one_message(run, sets, tmp_path, capsys, verb):
    (tmp_path / "run.yaml").write_text(run("he train", "he test").as_yaml())
    assert main([verb, "--config", str(tmp_path / "run.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lgd: {sets['he train']}, {sets['he test']} hold no second image (IHC), which ")
    assert line.endswith("import latents by lgd import-latents, or train --student.method he-only")
    assert not (tmp_path / "teacher").exists() and not (tmp_path / "latents").exists()


def test_a_cohort_of_h_and_e_alone_is_scored_by_a_run_on_pairs(run, sets, caplog, tissue):
    """The teacher and the store take the pairs; the student is scored on the cohort, and finds IHCs of the pairs."""
    config = run("pairs", "he test")
    for stage in (pipeline.train_teacher, pipeline.cache_latents):
        caplog.clear()
        stage(config)
        (note,) = [one for one in caplog.messages if "holds no second image" in one]
        assert note.startswith(f"{sets['he test']} holds no second image (IHC): left out by ")
    assert sum(TeacherConfig.read_folder(config.teacher.dir).training.labels.values()) == 16
    assert Store(config.latents.dir).rows == 16
    pipeline.build_index(config)
    pipeline.train_student(config)
    table = pipeline.evaluate(config)
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == ["LGD-Net", "colour only"]
    report = report_of(config)
    assert any("the teacher, which reads it, has no row" in one for one in report["caveats"])
    names = [one["name"] for one in report["retrieval"]["embeddings"]]
    assert names and all(name.startswith("LGD-Net") for name in names)
    assert all(one["own_pair"] is None is one["hubs"] for one in report["retrieval"]["embeddings"])
    assert report["retrieval"]["gallery_rows"] == 16
    assert (Path(config.report.dir) / "queries.png").stat().st_size > 5_000
    assert "Retrieval of the own IHC" not in (Path(config.report.dir) / "summary.md").read_text()


def test_h_and_e_alone_in_training_is_for_methods_without_latents(run, sets):
    config = run("pairs", "he train", "he test")
    pipeline.train_teacher(config)
    pipeline.cache_latents(config)
    with pytest.raises(DataError) as raised:
        pipeline.train_student(config)
    assert str(raised.value).startswith(f"{sets['he train']} holds no second image (IHC), and {config.latents.dir} no")
    assert str(raised.value).endswith("or train --student.method he-only, or leave it out of data.shards")
    assert not Path(config.student.dir).exists()
    config = run("pairs", "he train", "he test", method="he-only")
    pipeline.train_student(config)
    assert sum(StudentConfig.read_folder(config.student.dir).training.labels.values()) == 32


def test_h_and_e_alone_in_training_does_not_disturb_a_teacher_without_labels(run, change, tmp_path):
    """The probe of its latents is fitted on the pairs, and gives its row beside the one of a student of all patches."""
    save_network(tmp_path / "encoder", "dinov2", image_size=64, patch_size=16)
    config = run("pairs", "he train", "pairs test", method="he-only")
    config = change(config, teacher={"source": "frozen", "encoder": str(tmp_path / "encoder")})
    for stage in (pipeline.train_teacher, pipeline.cache_latents, pipeline.train_student):
        stage(config)
    table = pipeline.evaluate(config)
    rows = [line.split("  ")[0] for line in table.splitlines()[1:]]
    assert rows == ["H&E-only", "colour only", PROBE_ROW]


def test_a_picture_of_a_patch_without_ihc_is_its_h_and_e(tissue_run, sets, tmp_path):
    """As of a store whose latents were imported: each is found and shown."""
    from lgd.report.contact_sheet import contact_sheet
    from lgd.report.sheet import read_fields
    from lgd.retrieval.answers import Answer, Hit, Stored

    (shard, _) = open_disjoint([sets["he test"]]).shards
    he, ihc = read_fields(shard, 3)
    assert he.image.shape == (128, 128, 3) and he.share == 1 and ihc is None
    store = Store(tissue_run.latents.dir)
    gallery = Gallery(store)
    gallery.find_shard = lambda part: shard
    hit = Hit(key="k", slide=None, split="test", label="1+", part=0, row=3, distance=0.1)
    shown = gallery.show(hit)
    assert shown.stain == "H&E" and (shown.field.image == he.image).all()
    # Of a stored query too, which then has no panel of its IHC.
    from lgd.report.contact_sheet import Query

    stored = Stored(key="k", slide=None, split="test", label="1+", part=0, row=3)
    answer = Answer(known=store.target, stored=stored, neighbours=[hit])
    contact_sheet(
        [Query(answer=answer, slide=None, label="1+", he=he, ihc=None, images=[shown])], tmp_path / "a.png", True
    )
    assert (tmp_path / "a.png").stat().st_size > 3_000
