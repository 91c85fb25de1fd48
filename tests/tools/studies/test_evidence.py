"""The commands of each study, and how they are run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lgd.cli import run_command
from tools.studies import evidence

ROOT = Path(__file__).resolve().parents[3]
METHOD = """\
lgd synth {0}/tissue --pairs 4800 --slides 400 --size 96 --test 0.3 --seed 7001 --coupling {2}
lgd build-shards --layout bci --root {0}/tissue --out {0}/shards --slides {0}/tissue/truth.csv --split keep:0.05 \
--labelled 24 --mpp 0.46
lgd ablate --config configs/evidence.yaml --run.dir {1} --data.shards '[{0}/shards]' --seeds {3}
"""


def command(args, capsys):
    status = run_command("evidence", evidence.run, shlex.split(args))
    return status, *capsys.readouterr()


def in_world(tissue, run, world, ablate):
    return METHOD.replace("\\\n", "").format(tissue, run, world, ablate)


def test_the_method_is_one_world_and_more_options_are_those_of_ablate(capsys):
    expected = in_world("runs/evidence", "runs/evidence", "1.0", "5 --jobs 2")
    assert command("method --dry-run", capsys) == (0, expected, "")
    more = in_world("r", "r", "1.0", "5 --jobs 2 --full --seeds 2")
    assert command("method --out r --dry-run -- --full --seeds 2", capsys) == (0, more, "")


def test_the_coupling_is_the_method_and_three_worlds(capsys):
    expected = in_world("r", "r", "1.0", "5 --jobs 2")
    for coupling in ("0", "0.5", "0.75"):
        expected += in_world(f"r-{coupling}", f"r-{coupling}", coupling, "3 --jobs 2")
    expected += "tools/studies/plot_coupling.py r/coupling.png 0=r-0 0.5=r-0.5 0.75=r-0.75 1.0=r\n"
    assert command("coupling --out r --dry-run", capsys) == (0, expected, "")


@pytest.mark.parametrize(
    ("study", "place", "field", "jitters"),
    [
        ("shortcut", "stain", "stain_jitter", ["0", "0.2", "0.4"]),
        ("background", "background", "light_jitter", ["0", "0.2"]),
    ],
)
def test_a_shortcut_is_a_world_beside_its_control_under_each_augmentation(study, place, field, jitters, capsys):
    expected = ""
    for jitter in jitters:
        for shortcut in ("0", "0.9"):
            tissue, world = f"r-{place}-{shortcut}", f"1.0 --shortcut {shortcut} --shortcut-in {place}"
            expected += in_world(tissue, f"{tissue}-jitter-{jitter}", world, f"3 --jobs 2 --data.{field} {jitter}")
    pairs = [f"{jitter}=r-{place}-0-jitter-{jitter},r-{place}-0.9-jitter-{jitter}" for jitter in jitters]
    expected += f"tools/studies/table_shortcut.py {' '.join(pairs)}\n"
    assert command(f"{study} --out r --dry-run", capsys) == (0, expected, "")


def test_each_center_is_a_folder_of_one_world(capsys):
    status, out, _ = command("centers --out r --dry-run", capsys)
    synth, *built, ablate = map(shlex.split, out.splitlines())
    assert status == 0 and synth[:5] == ["lgd", "synth", "r-centers/tissue", "--centers", "3"]
    for number, build in enumerate(built, 1):
        center, folder = f"center-{number}", f"r-centers/shards/center-{number}"
        assert (
            build[-4:] == ["--center", center, "--out", folder] and folder in ablate[ablate.index("--data.shards") + 1]
        )
    assert len(built) == 3 and ablate[-4:] == ["--leave-out", "center", "--seeds", "3"]


def test_ki67_is_drawn_compared_and_reported(capsys):
    given = "--config configs/evidence.yaml --run.dir r-ki67 --data.shards '[r-ki67/shards]'"
    trained = "r-ki67/ablation"
    expected = f"""\
lgd synth r-ki67/tissue --stain nuclei --pairs 1200 --slides 200 --size 96 --test 0.3 --coupling 1.0 --seed 7003
lgd build-shards --layout csv --target ki67 --split keep:0.05 --mpp 0.46 --root r-ki67/tissue/pairs.csv \
--out r-ki67/shards
lgd ablate {given} --seeds 3
lgd build-index {given}
lgd evaluate {given} --student.dir {trained}/lgd-net/seed-0 --report.also '[{trained}/h-e-only/seed-0]'
"""
    assert command("ki67 --out r --dry-run", capsys) == (0, expected, "")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("", "evidence: python tools/studies/evidence.py needs STUDY"),
        ("nonsense", "choose from"),
        ("method --seeds 2", "has no option --seeds"),
    ],
)
def test_a_mistake_starts_nothing(args, told, capsys):
    status, out, err = command(args, capsys)
    assert (status, out) == (2, "") and told in err and "Traceback" not in err


def test_commands_run_until_one_fails(tmp_path):
    """From any folder; what a study leaves is real, though its world is tiny."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tools.studies import evidence
evidence.TISSUE = "--pairs 48 --slides 48 --size 64 --test 0.3 --seed 7001"
evidence.LABELS = "--split keep:0.05 --labelled 2 --mpp 0.46"
first, second, _ = evidence.list_commands("method", {str(tmp_path / "run")!r})
sys.exit(evidence.run_all([first, second, ["lgd", "nonsense"], ["lgd", "synth", {str(tmp_path / "never")!r}]]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and "lgd has no verb" in done.stderr
    assert json.loads((tmp_path / "run" / "shards" / "manifest.json").read_text())["splits"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
