"""The harness of the method's evidence, small: every row is trained, found again, and compared."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from drawn_answers import HER2, KI67, draw_answers
from PIL import Image

from lgd.base.arguments import Parser
from lgd.base.errors import ConfigError
from lgd.cli import main
from lgd.config_files import add_option_arguments
from lgd.io.files import read_json
from lgd.io.location import as_location
from lgd.models.methods import METHODS, PROPOSED
from lgd.report import ablation
from lgd.report.ablation import AblateOptions, slug, variants
from lgd.report.ablation_table import LGD_NET, AblationDocument
from lgd.report.colour import COLOUR
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.stream.reader import Reader

STUDIES = Path(__file__).parents[2] / "tools" / "studies"
CORE = ["H&E-only", "two streams", "label distillation", "LGD-Net"]
CONTROLS = METHODS[PROPOSED].controls


@pytest.fixture(scope="module")
def run(tissue_run, change, tmp_path_factory):
    """The teacher and the store of `tissue_run`, in a run of its own."""
    folder = tmp_path_factory.mktemp("ablation")
    return change(tissue_run, run={"dir": str(folder)}, student={"epochs": 1.0, "dir": str(folder / "student")})


def command(run, tmp_path, *more):
    config = tmp_path / "config.yaml"
    config.write_text(run.as_yaml())
    return ["ablate", "--config", str(config), *more]


def test_each_row_is_trained_once_and_compared(run, tmp_path, capsys):
    assert main(command(run, tmp_path, "--seeds", "2")) == 0
    out, told = capsys.readouterr()
    folder = Path(run.run.dir) / "ablation"
    document = read_json(folder / "ablation.json")
    assert list(document["rows"]) == [COLOUR, *CORE, TEACHER_ROW] and document["seeds"] == 2
    assert out.strip() == (folder / "ablation.md").read_text().strip()
    for name in [COLOUR, *CORE, TEACHER_ROW]:
        assert f"| {name} |" in out
    assert "It sees no shape" in out
    assert document["rows"][LGD_NET]["kappa"]["lgd_minus"] is None
    assert document["rows"]["two streams"]["accuracy"]["lgd_minus"]["value"] == pytest.approx(
        document["rows"][LGD_NET]["accuracy"]["mean"]["value"]
        - document["rows"]["two streams"]["accuracy"]["mean"]["value"]
    )
    assert "The tissue is virtual" in out
    assert document["explained_by_levels"] <= 1
    assert f"its soft levels explain {document['explained_by_levels']:.2f} (R^2" in out
    assert told.count(": trained") == 8
    # Each seed is another network.
    ends = [read_json(folder / slug(LGD_NET) / f"seed-{n}" / "config.json")["weights_sha256"] for n in (0, 1)]
    assert ends[0] != ends[1]
    # Again: nothing is trained or scored twice, and a network that is gone is made again, the same.
    before = (folder / "ablation.json").read_bytes()
    gone = folder / slug("two streams") / "seed-1"
    kept = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/*.npz"))]
    shutil.rmtree(gone)
    assert main(command(run, tmp_path, "--seeds", "2")) == 0
    told = capsys.readouterr().err
    assert told.count("seed 1: trained") == 1 and told.count("reused, nothing changed") >= 7
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/*.npz"))] == kept
    assert (folder / "ablation.json").read_bytes() == before


def test_networks_trained_side_by_side_are_the_same(run, tmp_path, change, capsys):
    """Under Ray, two at a time; the second seed of each is another network."""
    assert main(command(run, tmp_path, "--seeds", "1")) == 0
    one = capsys.readouterr().out
    other = change(run, run={"dir": str(tmp_path / "other")}, student={"dir": str(tmp_path / "other" / "student")})
    assert main(command(other, tmp_path, "--seeds", "1", "--jobs", "2")) == 0
    assert not ray.is_initialized()
    out, told = capsys.readouterr()
    assert told.count(": trained") == 4
    same = slice(None, out.index("    lgd ablate"))
    assert out[same] == one[: one.index("    lgd ablate")]


def test_answers_of_another_network_are_not_taken(run, tmp_path, capsys, monkeypatch):
    assert main(command(run, tmp_path, "--seeds", "1")) == 0
    at = Path(run.run.dir) / "ablation" / slug(LGD_NET) / "seed-0.npz"
    with np.load(at) as kept:
        was = dict(kept)
    np.savez(at, **(was | {"stamp": np.array("of another"), "probability": np.full_like(was["probability"], 0.25)}))
    assert main(command(run, tmp_path, "--seeds", "1")) == 0
    with np.load(at) as kept:
        assert np.array_equal(kept["probability"], was["probability"])
    capsys.readouterr()


@pytest.mark.parametrize("target", [HER2, KI67], ids=["HER2", "Ki67"])
def test_answers_are_kept_at_a_url_too(s3_server, tmp_path, target):
    s3_server.create_bucket(Bucket="kept")
    given = draw_answers(target)
    for folder in (tmp_path, as_location("s3://kept/ablation")):
        ablation._keep(folder / "a.npz", given, "stamp")
        found, stamp = ablation.read_kept(folder / "a.npz", "b", target)
        assert stamp == "stamp" and (found.name, found.keys, found.groups) == ("b", given.keys, given.groups)
        assert (found.label == given.label).all() and (found.output == given.output).all()


def test_the_rows_differ_in_one_thing_each(run, change):
    plain = variants(run, full=True)
    off = {"without contrast", "without soft levels", "without weights by alignment"}
    assert list(plain) == [name for name in [*CORE, *CONTROLS] if name not in off], "none of them is on"
    assert plain["label distillation"].student.distil_weight == 1
    contrasted = variants(
        change(run, student={"contrast_weight": 0.1, "distil_weight": 0.5, "full_alignment": 2.0}), full=True
    )
    assert contrasted["label distillation"].student.distil_weight == 0.5
    assert list(contrasted) == [*CORE, *CONTROLS]
    own = contrasted[LGD_NET].student
    for name, made in contrasted.items():
        differing = {field for field in own.__dataclass_fields__ if getattr(made.student, field) != getattr(own, field)}
        if name in CONTROLS:
            assert differing == {field for field, value in CONTROLS[name].items() if value != getattr(own, field)}
        else:
            assert differing == ({"method"} if name != LGD_NET else set())
        assert replace(made, student=own) == contrasted[LGD_NET]
        assert name == LGD_NET or differing
    assert list(variants(run, full=False)) == [*CORE]


@pytest.mark.parametrize(("args", "full"), [([], False), (["--full"], True), (["--full", "--jobs", "2"], True)])
def test_the_long_table_is_asked_for_by_a_flag(args, full):
    parser = Parser()
    add_option_arguments(parser, AblateOptions)
    assert parser.parse(args).full is full


def test_bad_requests(run, tmp_path, capsys, change):
    assert main(command(run, tmp_path, "--seeds", "0")) == 2
    assert "--seeds 0: use at least 1" in capsys.readouterr().err
    assert main(command(change(run, report={"split": "nothing"}), tmp_path)) == 1
    assert "report.split 'nothing' has no patches; the shards have test, train, val" in capsys.readouterr().err


def test_levels_are_hidden_by_whole_slides_in_train_only(tissue, tmp_path):
    options = ShardOptions(
        layout="bci",
        root=str(tissue),
        out=str(tmp_path / "few"),
        slides=str(tissue / "truth.csv"),
        split="keep",
        labelled=1,
    )
    few, _ = build(options)
    assert few.options.labelled == 1
    whole, _ = build(replace(options, out=str(tmp_path / "all"), labelled=0))
    assert whole.options.labelled == 0
    hidden = few.splits["train"].labels["unknown"]
    assert hidden > 0 and few.splits["test"].labels == whole.splits["test"].labels

    def levels(folder, split):
        shards = [shard for shard in ShardFolder.open(str(folder)).shards if shard.split == split]
        reader = Reader(shards, (), None)
        return [(s.meta.slide, s.label) for s in map(reader.read, range(reader.total))]

    before, after = (levels(tmp_path / name, "train") for name in ("all", "few"))
    named = {slide: set() for slide, _ in after}
    for (slide, true), (_, label) in zip(before, after, strict=True):
        assert label in (None, true)
        named[slide].add(label is None)
    assert all(len(kinds) == 1 for kinds in named.values()), "a slide is labelled whole or not at all"
    by_level = {level: {s for s, one in after if one == level} for level in range(4)}
    assert [len(slides) for slides in by_level.values()] == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"--labelled 50: train has \d+ slides of level 0: use fewer"):
        build(replace(options, out=str(tmp_path / "many"), labelled=50))
    assert json.loads((tmp_path / "few" / "manifest.json").read_text())["options"]["labelled"] == 1
    assert ablation.slug("H&E only") == "h-e-only"


def test_gains_are_drawn_against_the_coupling(run, tmp_path, capsys):
    """Two runs stand for two worlds; bad input is one message."""
    assert main(command(run, tmp_path, "--seeds", "1")) == 0
    capsys.readouterr()
    tool = [sys.executable, str(STUDIES / "plot_coupling.py"), str(tmp_path / "a.png")]
    done = subprocess.run([*tool, f"0={run.run.dir}", f"0.5={run.run.dir}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| label distillation |" in done.stdout and "| 0.0 | 0.5 |" in done.stdout
    assert Image.open(tmp_path / "a.png").size[0] > 600
    done = subprocess.run([*tool, f"0={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 1 and "ablation.json" in done.stderr and "run lgd ablate" in done.stderr
    assert subprocess.run([*tool, str(run.run.dir)], capture_output=True).returncode == 2


def test_the_fall_by_a_shortcut_is_paired_with_its_control(run, tmp_path, capsys):
    """A run beside itself falls by nothing; the scores are those of its own table."""
    assert main(command(run, tmp_path, "--seeds", "2")) == 0
    capsys.readouterr()
    tool = [sys.executable, str(STUDIES / "table_shortcut.py")]
    done = subprocess.run([*tool, f"0.2={run.run.dir},{run.run.dir}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = AblationDocument.read(Path(run.run.dir) / "ablation" / "ablation.json")
    for name, row in table.rows.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"| 0.2 | {name} |"))
        assert line.count(f"| {row['kappa'].mean.value:.3f} [") == 2
        assert line.endswith("| +0.000 [+0.000, +0.000] |")
    done = subprocess.run([*tool, f"0.2={run.run.dir},{tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 1 and "ablation.json is missing: run lgd ablate" in done.stderr
    assert subprocess.run([*tool, str(run.run.dir)], capture_output=True).returncode == 2
