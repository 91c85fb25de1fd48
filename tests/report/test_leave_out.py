"""Each center left out: the runs without it are those of the other folders alone, and all score the same patches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lgd import pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.io.files import read_json
from lgd.labels.predictions import find_measures
from lgd.report.ablation import read_kept, slug
from lgd.report.ablation_table import LGD_NET
from lgd.report.leave_out import ALL, LeaveOutDocument, make_folds
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions

CENTERS = ("center-1", "center-2")


@pytest.fixture(scope="module")
def tissue_of_centers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("centers") / "tissue"
    synthesise(SynthOptions(out=str(folder), pairs=32, size=64, slides=8, centers=2, workers=1))
    return folder


def pack(tissue, out, **options):
    options = {"layout": "csv", "root": str(tissue), "out": str(out), "mpp": 0.46, **options}
    return build(ShardOptions(**options))[0]


@pytest.fixture(scope="module")
def folders(tissue_of_centers):
    """A set a center, and one of both."""
    made = {center: tissue_of_centers.parent / center for center in CENTERS}
    for center, folder in made.items():
        pack(tissue_of_centers, folder, center=center)
    both = tissue_of_centers.parent / "both"
    pack(tissue_of_centers, both)
    return made | {"both": both}


@pytest.fixture
def run(tissue_config, change, folders, tmp_path):
    """`run(FOLDER, ...)`: a run over some of the sets, in folders of its own."""

    def make(*names, **sections):
        fields = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "latents", "student", "report")}
        fields["data"] = {"shards": [str(folders[name]) for name in names or CENTERS]}
        fields["teacher"] |= {"epochs": 1.0}
        fields["student"] |= {"epochs": 0.5}
        for name, values in sections.items():
            fields[name] = fields.get(name, {}) | values
        return change(tissue_config, **fields)

    return make


def test_the_set_of_a_center_holds_its_pairs_and_names_it(folders, tissue_of_centers, tmp_path):
    parts = [ShardFolder.open(folders[center]) for center in CENTERS]
    whole = ShardFolder.open(folders["both"])
    assert [part.manifest.center for part in parts] == [*CENTERS] and whole.manifest.center is None
    assert "center" not in read_json(folders["both"] / "manifest.json")
    assert sum(shard.samples for part in parts for shard in part.shards) == sum(s.samples for s in whole.shards) == 32
    with pytest.raises(DataError, match="--center north: no pair is of this center; they are of center-1, center-2"):
        pack(tissue_of_centers, tmp_path / "none", center="north")
    with pytest.raises(DataError, match="--center north: .*a CSV names it in the column center"):
        pack(tissue_of_centers, tmp_path / "none", center="north", layout="bci")
    assert not (tmp_path / "none" / "manifest.json").exists()


def read_weights(folder):
    return read_json(folder / "config.json")["weights_sha256"]


def test_a_center_is_scored_by_networks_that_never_saw_it(run, tmp_path, capsys):
    config = run()
    asked = tmp_path / "config.yaml"
    asked.write_text(config.as_yaml())
    line = ["ablate", "--config", str(asked), "--seeds", "1", "--leave-out", "center"]
    assert main(line) == 0
    out, log = capsys.readouterr()
    at = Path(config.run.dir)
    document = LeaveOutDocument.read(at / "ablation" / "leave-out.json")
    assert out.strip() == (at / "ablation" / "leave-out.md").read_text().strip()
    assert [*document.centers] == [ALL, *CENTERS] and "--leave-out center" in document.command
    assert "Networks that left a center out had fewer patches" in out and "of one training each" in out
    assert log.count("[ablate] without the center ") == 2

    # Both networks of a row answer for the same patches, and the change is what their own answers give.
    target, measures = ShardSet.open(config.shard_dirs).target, find_measures(ShardSet.open(config.shard_dirs).target)
    file = f"ablation/{slug(LGD_NET)}/seed-0.npz"
    seen, _ = read_kept(at / file, "seen", target)
    kept = {center: read_kept(at / "leave-out" / center / file, center, target)[0] for center in CENTERS}
    assert sorted(key for one in kept.values() for key in one.keys) == sorted(seen.keys)
    for center, left in kept.items():
        of_center = seen.select(np.array([row for row, key in enumerate(seen.keys) if key in left.keys]))
        row = document.centers[center].rows[LGD_NET]["kappa"]
        scores = [measures.score(one.label, one.output)["kappa"] for one in (of_center, left)]
        assert [row.seen.value, row.left_out.value] == pytest.approx(scores)
        assert row.change.value == pytest.approx(scores[1] - scores[0])
    joined = {key: out for one in kept.values() for key, out in zip(one.keys, one.output, strict=True)}
    everywhere = measures.score(seen.label, np.array([joined[key] for key in seen.keys]))
    assert document.centers[ALL].rows[LGD_NET]["kappa"].left_out.value == pytest.approx(everywhere["kappa"])
    assert document.centers[ALL].rows[TEACHER_ROW]["kappa"].lgd_minus is not None

    # What is trained without a center is what a run of the other folder alone trains.
    other = tmp_path / "other"
    alone = run(CENTERS[1], **{name: {"dir": str(other / name)} for name in ("run", "teacher", "latents", "student")})
    for stage in (pipeline.train_teacher, pipeline.cache_latents, pipeline.train_student):
        stage(alone)
    lgd = f"ablation/{slug(LGD_NET)}/seed-0"
    for network, without, whole in (("teacher", "teacher", tmp_path / "teacher"), ("student", lgd, at / lgd)):
        weights = read_weights(other / network)
        assert read_weights(at / "leave-out" / CENTERS[0] / without) == weights != read_weights(whole)

    # Again: everything is there.
    before = (at / "ablation" / "leave-out.json").read_bytes()
    capsys.readouterr()
    assert main(line) == 0
    assert ": trained" not in capsys.readouterr().err
    assert (at / "ablation" / "leave-out.json").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "sections", "error", "message"),
    [
        (("both",), {}, DataError, "both: patches of several centers, .* lgd build-shards --center NAME"),
        (("center-1", "both"), {}, DataError, "both: patches of several centers"),
        (("center-1",), {}, DataError, "data.shards is of the center center-1 alone: name .* two centers or more"),
        (CENTERS, {"report": {"split": "train"}}, ConfigError, "report.split is train, .* score val or test"),
        (CENTERS, {"report": {"split": "val"}}, DataError, "center-1: the center center-1 has no patches of .*'val'"),
        (CENTERS, {"student": {"teachers": ["teacher", "uni"]}}, ConfigError, "student.teachers is teacher, uni: "),
    ],
)
def test_what_no_center_can_be_left_out_of(run, names, sections, error, message):
    config = run(*names, **sections)
    with pytest.raises(error, match=message):
        make_folds(config, ShardSet.open(config.shard_dirs))
    assert not Path(config.run.dir).exists()


def test_two_centers_of_one_folder_name_are_refused(run):
    config = run()
    shards = ShardSet.open(config.shard_dirs)
    renamed = [
        replace(one, manifest=one.manifest.model_copy(update={"center": name}))
        for one, name in zip(shards.folders, ("St. Mary", "st mary"), strict=True)
    ]
    assert slug("St. Mary") != slug("st mary")
    renamed[1] = replace(renamed[1], manifest=renamed[1].manifest.model_copy(update={"center": "st--mary"}))
    with pytest.raises(DataError, match="two of the centers St. Mary, st--mary have one folder name, st--mary"):
        make_folds(config, ShardSet(tuple(renamed)))


def test_another_thing_to_leave_out_is_refused(capsys):
    assert main(["ablate", "--leave-out", "scanner"]) == 2
    assert "--leave-out" in capsys.readouterr().err
