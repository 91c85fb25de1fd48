import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lgd.cli import main
from lgd.config import LEVEL_NAMES, ConfigError, DataError
from lgd.data.archive import open_shards
from lgd.data.stream import Reader
from lgd.evaluate.predict import find_images, load_scorer, score_files
from lgd.evaluate.retrieve import Gallery, as_json, check_pair, query, retrieval
from lgd.files import read_json, write_json
from lgd.store.index import build_index
from lgd.store.latents import Store
from lgd.train.loop import train_under


@pytest.fixture(scope="module")
def scorer(tissue_run):
    return load_scorer(tissue_run.student.dir)


@pytest.fixture(scope="module")
def store(tissue_run):
    return Store(tissue_run.latents.dir)


@pytest.fixture(scope="module")
def images(tissue):
    return sorted((tissue / "HE" / "test").iterdir())[:3]


def brute_force(store, vector, k):
    """Rows of the train parts by cosine in double precision: key, slide, split, level, distance."""
    rows = []
    for part in store.parts:
        if part.split != "train":
            continue
        for row in range(part.rows):
            there = np.asarray(part.array("pooled")[row, 0], np.float64)
            cosine = there @ vector / np.linalg.norm(there) / np.linalg.norm(vector)
            rows.append(
                {
                    "key": part.array("key")[row].decode(),
                    "slide": part.array("slide")[row].decode(),
                    "split": "train",
                    "level": LEVEL_NAMES[part.array("level")[row]],
                    "distance": 1 - cosine,
                }
            )
    return sorted(rows, key=lambda row: row["distance"])[:k]


def test_the_command_answers_as_brute_force_does(tissue_run, scorer, store, images, capsys):
    command = ["query", "--model", tissue_run.student.dir, "--store", tissue_run.latents.dir, "-k", "4", "--json"]
    assert main([*command, *map(str, images)]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(path) for path in images]
    vectors = {str(path): row for path, row in score_files(scorer, images)}
    for answer in answers:
        row = vectors[answer["image"]]
        assert answer["level"] == LEVEL_NAMES[int(row["probability"].argmax())]
        expected = brute_force(store, row["pooled"].astype(np.float64), 4)
        for found, wanted in zip(answer["neighbours"], expected, strict=True):
            assert found == wanted | {"distance": pytest.approx(wanted["distance"], abs=1e-5)}


def test_more_neighbours_than_there_are_gives_all(scorer, store, images):
    (row,) = query(scorer, store, images[:1], 1000)
    assert len({hit.key for hit in row["hits"]}) == len(row["hits"]) == 20
    with pytest.raises(ConfigError, match="-k is 0"):
        query(scorer, store, images[:1], 0)


def test_the_part_and_row_of_a_hit_are_its_address(scorer, store, images):
    for row in query(scorer, store, images, 5):
        for hit in row["hits"]:
            assert store.parts[hit.part].array("key")[hit.row].decode() == hit.key
    assert {"part", "row"}.isdisjoint(as_json([row])[0]["neighbours"][0])


def test_the_picture_of_a_hit_is_its_ihc(scorer, store, images, tissue_run):
    hit = query(scorer, store, images[:1], 1)[0]["hits"][0]
    reader = Reader(open_shards(tissue_run.shard_dirs[0])[1], ("ihc",), 64)
    sample = next(s for s in map(reader.read, range(48)) if s.key == hit.key)
    assert np.array_equal(Gallery(store, 64).image(hit), sample.images["ihc"])


def test_the_sheet_is_drawn(tissue_run, images, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(tissue_run.as_yaml())
    sheet = tmp_path / "sheet.png"
    assert main(["query", "--config", str(tmp_path / "config.yaml"), "--sheet", str(sheet), str(images[0])]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_a_student_without_hallucination_is_refused(tissue_run, change, store, tmp_path, images, capsys):
    config = change(tissue_run, student={"dir": str(tmp_path / "he"), "method": "he-only", "epochs": 0.1})
    train_under(config, "student")
    with pytest.raises(DataError, match="no hallucination stream .method he-only."):
        check_pair(load_scorer(config.student.dir), store)
    command = ["query", "--model", config.student.dir, "--store", tissue_run.latents.dir]
    assert main([*command, str(images[0])]) == 1
    assert "method he-only" in capsys.readouterr().err


def test_a_student_of_another_teacher_is_refused(tissue_run, store, tmp_path):
    shutil.copytree(tissue_run.student.dir, tmp_path / "student")
    config = read_json(tmp_path / "student" / "config.json")
    write_json(tmp_path / "student" / "config.json", config | {"teacher_sha256": "f" * 64})
    there = config["teacher_sha256"][:12]
    with pytest.raises(DataError, match=rf"made by another teacher \({there}\) than the one .*\(ffffffffffff\)"):
        check_pair(load_scorer(tmp_path / "student"), store)


def test_a_store_without_an_index_is_told(tissue_run, scorer, images, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    shutil.rmtree(tmp_path / "latents" / "index")
    with pytest.raises(DataError, match="holds no index: run lgd build-index"):
        query(scorer, Store(tmp_path / "latents"), images, 1)


def test_shards_that_moved_are_told_where_pictures_are_asked_for(tissue_run, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    store = Store(tmp_path / "latents")
    store.document["sources"]["shards"] = [str(tmp_path / "gone")]
    with pytest.raises(DataError, match="gone, which is gone: put them back, or query without --sheet"):
        Gallery(store, 64)


def test_verify_names_what_is_wrong_with_a_store(tissue_run, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(tissue_run.latents.dir, folder)
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"feature store {folder}: no problems\n"
    victims = [sorted((folder / "parts").glob("*.h5"))[0], folder / "index" / "faiss.index"]
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
    assert "no shard folder (manifest.json), no feature store (store.json) and no checkpoint" in capsys.readouterr().err


def test_a_gallery_of_all_splits_finds_the_held_out_pair_too(tissue_run, scorer, images, tmp_path):
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    whole = Store(tmp_path / "latents")
    build_index(whole, "Flat", ["train", "val", "test"], recall=0.99, seed=0)
    (row,) = query(scorer, whole, find_images([str(images[0])]), 48)
    assert {hit.split for hit in row["hits"]} == {"train", "val", "test"}
    assert images[0].stem in {hit.key for hit in row["hits"]}


def test_retrieval_ranks_equal_a_sort():
    random = np.random.default_rng(0)
    gallery = random.normal(size=(30, 5))
    own = random.permutation(30)[:12]
    queries = 0.7 * gallery[own] + random.normal(size=(12, 5))
    ranks = []
    for vector, row in zip(queries, own, strict=True):
        cosine = [q @ vector / np.linalg.norm(q) for q in gallery]
        ranks.append(sorted(cosine, reverse=True).index(cosine[row]) + 1)
    found = retrieval(queries, gallery, own)
    assert found["median_rank"] == np.median(ranks)
    for k in (1, 5, 10):
        assert found[f"recall_at_{k}"] == np.mean(np.array(ranks) <= k)
        assert found[f"chance_recall_at_{k}"] == k / 30
    assert 1 < found["median_rank"] < 15


def test_a_collapsed_network_retrieves_like_chance():
    gallery = np.random.default_rng(0).normal(size=(21, 8))
    found = retrieval(np.tile(gallery[:1], (21, 1)), gallery, np.arange(21))
    assert found["median_rank"] == found["chance_median_rank"] == 11
    flat = retrieval(gallery, np.ones((21, 8)), np.arange(21))
    assert flat["median_rank"] == 11
    assert flat["recall_at_10"] == 0


def test_retrieval_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="do not fit"):
        retrieval(np.ones((2, 3)), np.ones((2, 4)), np.arange(2))
    with pytest.raises(DataError, match="do not fit"):
        retrieval(np.ones((0, 3)), np.ones((2, 3)), np.arange(0))
    with pytest.raises(DataError, match="not finite"):
        retrieval(np.full((1, 3), np.nan), np.ones((2, 3)), np.arange(1))
