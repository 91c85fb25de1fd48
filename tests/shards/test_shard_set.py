import subprocess
import sys
from pathlib import Path

import pytest

from lgd.base.errors import DataError
from lgd.shards.shard_set import ShardFolder, ShardSet

# An audit hook cannot be removed, so it lives in a process of its own.
COUNT_OPENS = """
import collections, sys
counts = collections.Counter()
def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith("manifest.json"):
        counts[str(arguments[0])] += 1
sys.addaudithook(count)
from lgd.cli import main
status = main(sys.argv[1:])
print(dict(counts), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def shards(tissue_run):
    return ShardSet.open(tissue_run.shard_dirs)


def test_a_set_gives_its_splits_labels_and_digests(shards):
    (folder,) = shards.folders
    assert shards.shards == list(folder.shards)
    assert {shard.split for shard in shards.shards} == {"train", "val", "test"}
    assert [shard.split for shard in shards.of_split("val")] == ["val"] * len(shards.of_split("val"))
    assert shards.of_split("none") == []
    assert shards.count_labels("train") == folder.manifest.splits["train"].labels
    assert shards.digests == (folder.manifest.digest,)
    with pytest.raises(DataError, match=r"report.split 'none' has no patches; the shards have test, train, val"):
        shards.require_split("none", "report.split")


def test_labels_of_several_folders_are_added(shards):
    both = ShardSet(shards.folders * 2)
    once = shards.count_labels("test")
    assert both.count_labels("test") == {name: 2 * count for name, count in once.items()}
    assert len(both.shards) == 2 * len(shards.shards) and len(both.digests) == 2


def test_missing_files_are_named_when_it_is_opened_and_not_when_it_is_read(shards, tmp_path):
    folder = shards.folders[0].folder
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    assert ShardFolder.read(tmp_path).shards
    with pytest.raises(DataError, match=r"train-000000.tar is missing"):
        ShardFolder.open(tmp_path)


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_verb_opens_each_manifest_once(tissue_run, tmp_path, verb):
    config = tmp_path / "config.yaml"
    config.write_text(tissue_run.as_yaml())
    own = ["--student.dir", f"{tmp_path}/student"] if verb == "train" else ["--report.bootstrap", "1"]
    run = ["--config", str(config), "--run.dir", str(tmp_path / "run"), "--report.dir", f"{tmp_path}/report", *own]
    done = subprocess.run([sys.executable, "-c", COUNT_OPENS, verb, *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = str(Path(tissue_run.shard_dirs[0]) / "manifest.json")
    assert done.stderr.splitlines()[-1] == str({manifest: 1})
