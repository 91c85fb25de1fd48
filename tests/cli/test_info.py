"""`lgd info`: ten lines for a person, one JSON document for a program."""

import json
import shutil
from pathlib import Path

import pytest

from lgd.cli import main
from lgd.cli.info import as_lines, describe
from lgd.runs.folder import Cached, record
from lgd.shards.shard_set import ShardSet


def test_ten_lines_say_what_a_folder_is(tissue_run):
    checkpoint = next(Path(tissue_run.student.dir).glob("checkpoints/*"))
    expected = {
        tissue_run.shard_dirs[0]: ("shard folder", "target HER2", "train 20", "tissue virtual"),
        tissue_run.latents.dir: ("feature store", "train 20", "a map of 2 x 2", "Flat over 20 latents"),
        tissue_run.teacher.dir: ("teacher", "resnet10, images of 64 px", "20 patches (20 labelled) of 128 x 128 px"),
        tissue_run.student.dir: ("student", "lgd, taught by the latents of teacher", "0.46 um/px"),
        checkpoint: ("checkpoint", "step", "position", "skipped none"),
    }
    for folder, words in expected.items():
        lines = as_lines(describe(Path(folder)))
        text = "\n".join(lines)
        assert len(lines) <= 10 and lines[0].startswith(words[0]) and lines[0].endswith(str(folder))
        assert all(" ".join(word.split()) in " ".join(text.split()) for word in words), text


def test_a_run_lists_its_stages_and_how_to_go_on(tissue_run, tmp_path, change):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {seed: 0}")
    assert describe(folder)["stages"] is None
    (folder / "config.yaml").unlink()
    config = change(tissue_run, run={"dir": str(folder)}, student={"dir": str(folder / "student")})
    shards = ShardSet.open(config.shard_dirs)
    record(config, shards, "cache-latents", Cached(digest="0" * 64, rows=48), str(folder / "latents"))
    description = describe(folder)
    assert description["cache-latents"] == f"{folder}/latents (rows 48)" and "try_next" not in description
    shutil.copytree(tissue_run.student.dir, folder / "student")
    assert describe(folder)["try_next"] == f"lgd predict --model '{folder}' IMAGE"


def test_json_is_one_document(tissue_run, capsys):
    for folder in (tissue_run.shard_dirs[0], tissue_run.latents.dir, tissue_run.student.dir):
        assert main(["info", folder, "--json"]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["folder"] == folder and document["format"].startswith("lgd-") and not err


@pytest.mark.parametrize("name", ["manifest.json", "store.json", "state.json", "run.json", "config.json"])
def test_a_broken_document_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_text("{")
    assert main(["info", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert name in err and err.count("\n") == 1 and not out


def test_info_of_a_url(tissue_run, s3_server):
    s3_server.create_bucket(Bucket="info")
    for path in Path(tissue_run.shard_dirs[0]).glob("manifest.json"):
        s3_server.upload_file(str(path), "info", f"shards/{path.name}")
    assert main(["info", "s3://info/shards"]) == 0
