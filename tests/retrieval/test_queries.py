import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.io.digests import digest_of
from lgd.io.files import read_json, write_json
from lgd.report.sheet import Gallery
from lgd.retrieval.index import build_index
from lgd.retrieval.queries import check_pair, query
from lgd.retrieval.search import choose_near, read_document
from lgd.scoring.images import find_images
from lgd.scoring.predict import load_scorer, score_images
from lgd.shards.shard_set import ShardFolder
from lgd.stain.checks import NO_HE
from lgd.store.store import Store
from lgd.stream.reader import Reader
from lgd.train.launch import train_under


@pytest.fixture(scope="module")
def scorer(tissue_run):
    return load_scorer(tissue_run.student.dir)


@pytest.fixture(scope="module")
def store(tissue_run):
    return Store(tissue_run.latents.dir)


@pytest.fixture(scope="module")
def images(tissue):
    return sorted((tissue / "HE" / "test").iterdir())[:3]


def brute_force(store, vector, k, components):
    """Rows of the train parts by the cosine of whitened latents, in double precision.

    The principal components are those of a singular value decomposition.
    """
    rows = []
    parts = [np.asarray(part.array("pooled")[:, 0], np.float64) for part in store.parts if part.split == "train"]
    latents = np.concatenate(parts)
    mean = latents.mean(0)
    _, spread, axes = np.linalg.svd(latents - mean, full_matrices=False)
    kept = [
        number for number in range(min(components, len(latents) - 1)) if spread[number] ** 2 > 1e-5 * spread[0] ** 2
    ]
    axes = axes[kept].T / spread[kept]
    vector = (vector - mean) @ axes
    for part in store.parts:
        if part.split != "train":
            continue
        for row in range(part.rows):
            there = (np.asarray(part.array("pooled")[row, 0], np.float64) - mean) @ axes
            cosine = there @ vector / np.linalg.norm(there) / np.linalg.norm(vector)
            rows.append(
                {
                    "key": part.array("key")[row].decode(),
                    "slide": part.array("slide")[row].decode(),
                    "split": "train",
                    "level": store.target.classes[int(part.array("label")[row])],
                    "distance": 1 - cosine,
                }
            )
    return sorted(rows, key=lambda row: row["distance"])[:k]


def test_the_command_answers_as_brute_force_does(tissue_run, scorer, store, images, capsys):
    command = ["query", "--model", tissue_run.student.dir, "--store", tissue_run.latents.dir, "-k", "4", "--json"]
    assert main([*command, *map(str, images)]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(path) for path in images]
    vectors = {said.image: values for said, values in score_images(scorer, images)}
    for answer in answers:
        row = vectors[answer["image"]]
        assert answer["level"] == store.target.classes[int(row["output"].argmax())]
        expected = brute_force(store, row["query"].astype(np.float64), 4, tissue_run.latents.components)
        near = choose_near(read_document(store))
        for found, wanted in zip(answer["neighbours"], expected, strict=True):
            # Of so few patches some lie as close as that.
            twin = "query" if wanted["distance"] < near else found["duplicate_of"]
            assert found == wanted | {"distance": pytest.approx(wanted["distance"], abs=1e-4), "duplicate_of": twin}
            assert twin != "query" or wanted["distance"] < near


def test_a_note_on_the_image_stands_in_its_answer_and_is_counted(tissue_run, images, tissue, capsys):
    ihc = next((tissue / "IHC" / "train").glob("*_3+.png"))
    command = ["query", "--model", tissue_run.student.dir, "--store", tissue_run.latents.dir, "-k", "2"]
    for form in (["--json"], ["--csv"], []):
        assert main([*command, *form, str(images[0]), str(ihc)]) == 0
        out, err = capsys.readouterr()
        assert f"1 of 2 queries: {NO_HE}" in err.splitlines()
        assert out.count(NO_HE) == (2 if form == ["--csv"] else 1)
        if form == ["--json"]:
            notes = {answer["image"]: answer["notes"] for answer in json.loads(out)}
            assert {image: NO_HE in some for image, some in notes.items()} == {str(images[0]): False, str(ihc): True}


def test_more_neighbours_than_there_are_gives_all(scorer, store, images):
    (answer,) = query(scorer, store, images[:1], 1000)
    assert len({hit.key for hit in answer.neighbours}) == len(answer.neighbours) == 20
    with pytest.raises(ConfigError, match="-k is 0"):
        query(scorer, store, images[:1], 0)


def test_the_part_and_row_of_a_hit_are_its_address(scorer, store, images):
    for answer in query(scorer, store, images, 5):
        for hit in answer.neighbours:
            assert store.parts[hit.part].array("key")[hit.row].decode() == hit.key


def test_the_picture_of_a_hit_is_its_ihc(scorer, store, images, tissue_run):
    hit = query(scorer, store, images[:1], 1)[0].neighbours[0]
    reader = Reader(ShardFolder.open(tissue_run.shard_dirs[0]).shards, ("ihc",))
    sample = next(s for s in map(reader.read, range(48)) if s.key == hit.key)
    shown = Gallery(store).show(hit)
    assert shown.stain == "IHC" and np.array_equal(shown.field.image, sample.images["ihc"])


def test_the_sheet_is_drawn(tissue_run, images, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(tissue_run.as_yaml())
    sheet = tmp_path / "sheet.png"
    assert main(["query", "--config", str(tmp_path / "config.yaml"), "--sheet", str(sheet), str(images[0])]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 7, "a head, five neighbours and their vote"


@pytest.mark.parametrize("same_slide", [True, False])
def test_a_bad_file_costs_its_own_answer(tissue_run, images, capsys, tmp_path, same_slide):
    (tmp_path / "config.yaml").write_text(tissue_run.as_yaml())
    bad = tmp_path / f"{images[1].stem}.png"
    bad.write_text("words")
    command = ["query", "--config", str(tmp_path / "config.yaml"), "--json"]
    command += [] if same_slide else ["--exclude-same-slide"]
    named = [str(images[0]), str(bad), str(images[2])]
    assert main([*command, *named]) == 1
    told = capsys.readouterr()
    assert f"lgd: 1 of 3 images have no answer:\n  {bad}: is no JPEG, PNG, WebP, TIFF, BMP or JPEG 2000" in told.err
    answers = json.loads(told.out)
    assert sorted(answer["image"] for answer in answers) == sorted([named[0], named[2]])
    assert main([*command, named[0], named[2]]) == 0
    assert json.loads(capsys.readouterr().out) == answers
    assert main([*command, named[1]]) == 1
    assert capsys.readouterr().out == ""


def test_a_student_without_hallucination_is_refused(tissue_run, change, store, tmp_path, images, capsys):
    config = change(tissue_run, student={"dir": str(tmp_path / "he"), "method": "he-only", "epochs": 0.1})
    train_under(config, "student")
    with pytest.raises(DataError, match="hallucinates no latents .H&E-only."):
        check_pair(load_scorer(config.student.dir), store)
    command = ["query", "--model", config.student.dir, "--store", tissue_run.latents.dir]
    assert main([*command, str(images[0])]) == 1
    assert "H&E-only" in capsys.readouterr().err


def test_a_student_of_another_teacher_is_refused(tissue_run, store, tmp_path):
    shutil.copytree(tissue_run.student.dir, tmp_path / "student")
    config = read_json(tmp_path / "student" / "config.json")
    there = config["teachers"][0]["weights_sha256"][:12]
    config["teachers"][0]["weights_sha256"] = "f" * 64
    config["digest"] = digest_of({name: value for name, value in config.items() if name != "digest"})
    write_json(tmp_path / "student" / "config.json", config)
    with pytest.raises(DataError, match=rf"are of another teacher \({there}\) than .*\(teacher, ffffffffffff\)"):
        check_pair(load_scorer(tmp_path / "student"), store)


def test_a_store_without_an_index_is_told(tissue_run, scorer, images, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    shutil.rmtree(tmp_path / "latents" / "index")
    with pytest.raises(DataError, match="index.json is missing: there is no index; run lgd build-index"):
        query(scorer, Store(tmp_path / "latents"), images, 1)


def test_shards_that_moved_are_told_where_pictures_are_asked_for(tissue_run, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    store = Store(tmp_path / "latents")
    moved = store.sources.as_json() | {"shards": [str(tmp_path / "gone")]}
    type(store.sources).from_json(moved).write(tmp_path / "latents" / "sources.json")
    with pytest.raises(DataError, match="gone, which is gone: put them back, or query without --sheet"):
        Gallery(store)


def test_a_sheet_of_keys_shows_both_stains(tissue_run, store, tmp_path, capsys):
    sheet, (first, second) = tmp_path / "sheet.png", [bytes(key).decode() for key in store.parts[0].array("key")[:2]]
    command = [
        "query",
        "--store",
        tissue_run.latents.dir,
        "-k",
        "2",
        "--sheet",
        str(sheet),
        "--json",
        "--level",
        "0,3+",
    ]
    assert main([*command, "--key", first, second]) == 0
    assert [answer["stored"]["key"] for answer in json.loads(capsys.readouterr().out)] == [first, second]
    with Image.open(sheet) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[0] > 500 and pixels.std() > 10


def test_a_sheet_that_nobody_could_read_is_refused(tissue_run, tissue, tmp_path, capsys):
    command = ["query", "--store", tissue_run.latents.dir, "--sheet", str(tmp_path / "sheet.png"), "-k", "31"]
    assert main([*command, "--key", "any"]) == 2
    assert "these are 1 of 31" in capsys.readouterr().err


def test_verify_names_what_is_wrong_with_a_store(tissue_run, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(tissue_run.latents.dir, folder)
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"feature store {folder}: no problems\n"
    victims = [next(folder.glob("parts/teacher/*.h5")), next(folder.glob("index/teacher/*.faiss"))]
    for victim in victims:
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    told = capsys.readouterr().err
    assert "2 problem(s)" in told and all(str(victim) in told for victim in victims)


def test_verify_knows_checkpoints_and_says_what_it_does_not_know(tissue_run, tmp_path, capsys):
    newest = sorted((Path(tissue_run.student.dir) / "checkpoints").iterdir())[-1]
    assert main(["verify", str(newest)]) == 0
    assert main(["verify", str(tmp_path)]) == 1
    assert "no checkpoint (state.json), no trained network (config.json)" in capsys.readouterr().err


def test_a_gallery_of_all_splits_finds_the_held_out_pair_too(tissue_run, scorer, images, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    whole = Store(tmp_path / "latents")
    shards = ShardFolder.open(tissue_run.shard_dirs[0]).shards
    build_index(whole, shards, "Flat", ["train", "val", "test"], recall=0.99, seed=0)
    (answer,) = query(scorer, whole, find_images([str(images[0])]), 48)
    assert {hit.split for hit in answer.neighbours} == {"train", "val", "test"}
    assert images[0].stem in {hit.key for hit in answer.neighbours}


def test_the_slide_of_an_image_is_left_out(scorer, store, images, tmp_path):
    """Its slide is that of the stored patch of its name, or the one that a CSV tells."""
    everything = query(scorer, store, images, 48)
    own = [query(None, store, keys=[path.stem], k=1)[0].stored.slide for path in images]
    others = [own[1], own[2], own[2]]
    told = tmp_path / "slides.csv"
    told.write_text("key,slide\n" + "".join(f"{p.stem},{s}\n" for p, s in zip(images, others, strict=True)))
    for slides, path in ((own, None), (others, told)):
        found = query(scorer, store, images, 48, exclude_same_slide=True, slides=path)
        for answer, whole, slide in zip(found, everything, slides, strict=True):
            kept = [hit for hit in whole.neighbours if hit.slide != slide]
            assert len(answer.neighbours) < len(whole.neighbours) == 20
            assert [hit.key for hit in answer.neighbours] == [hit.key for hit in kept]


def test_an_image_of_unknown_slide_is_named(scorer, store, images, tmp_path, tissue_run, capsys):
    strangers = [tmp_path / "b.png", tmp_path / "c.png"]
    for stranger in strangers:
        shutil.copy(images[0], stranger)
    with pytest.raises(DataError, match=r"slide of 2 of 3 queries is unknown, the first of them b, .* a row b,SLIDE"):
        query(scorer, store, [images[0], *strangers], 1, exclude_same_slide=True)
    command = ["query", "--model", tissue_run.student.dir, "--store", tissue_run.latents.dir, "--exclude-same-slide"]
    assert main([*command, str(strangers[0])]) == 1
    assert "--slides CSV" in capsys.readouterr().err


def test_an_image_needs_a_student(store, images):
    with pytest.raises(ConfigError, match="an image needs a student"):
        query(None, store, images, 1)
