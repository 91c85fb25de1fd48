"""`lgd ablate --transfer`: the features of all methods, probed for what training never asked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgd.base.errors import ConfigError
from lgd.cli import main
from lgd.io.files import read_json
from lgd.report import transfer
from lgd.report.ablation import AblateOptions
from lgd.report.ablation_table import LGD_NET
from lgd.report.colour import COLOUR
from lgd.report.transfer import LATENTS, MAPPED, UNTRAINED

METHODS = ["H&E-only", "two streams", "label distillation", LGD_NET]


@pytest.fixture(scope="module")
def run(tissue_run, change, tmp_path_factory):
    """The teacher and the store of `tissue_run`, in a run of its own."""
    folder = tmp_path_factory.mktemp("transfer")
    return change(tissue_run, run={"dir": str(folder)}, student={"epochs": 1.0, "dir": str(folder / "student")})


@pytest.fixture
def few(monkeypatch):
    """Probes of so few patches as the tissue has."""
    monkeypatch.setattr(transfer, "SIZES", (6, 12, 300))


def ask(run, folder, questions, *more):
    config = folder / "config.yaml"
    config.write_text(run.as_yaml())
    return main(["ablate", "--config", str(config), "--transfer", str(questions), *more])


def test_all_methods_are_probed_alike(run, tissue, tmp_path, few, capsys, caplog):
    questions = tissue / "questions.csv"
    assert ask(run, tmp_path, questions, "--seeds", "2") == 0
    out = capsys.readouterr().out
    folder = Path(run.run.dir) / "ablation"
    document = read_json(folder / "transfer.json")
    assert out.endswith((folder / "transfer.md").read_text() + "\n") and f"--transfer {questions}" in out
    names = [(asked["question"], asked["measure"]) for asked in document["asked"]]
    quantities = [(name, "r2") for name in ("h_score", "stained_share", "completeness", "tumour_nuclei")]
    assert names == [*quantities, ("level", "kappa"), ("level", "auc")]
    for asked in document["asked"]:
        assert (asked["training_patches"], asked["patches"], asked["groups"]) == (20, 20, 5)
        assert list(asked["sizes"]) == ["6", "12"]
        for rows in asked["sizes"].values():
            assert list(rows) == [COLOUR, UNTRAINED, *METHODS, *map(MAPPED.format, METHODS), LATENTS]
            assert rows[LGD_NET]["lgd_minus"] is None
            minus = rows[LGD_NET]["mean"]["value"] - rows[LATENTS]["mean"]["value"]
            assert rows[LATENTS]["lgd_minus"]["value"] == pytest.approx(minus)
    with Image.open(folder / "transfer.png") as image:
        assert image.width > 1000
    # Again: no feature is read twice, and the numbers are the same.
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.features.npz")}
    assert len(kept) == 8
    before = (folder / "transfer.json").read_bytes()
    assert ask(run, tmp_path, questions, "--seeds", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*.features.npz")} == kept
    assert (folder / "transfer.json").read_bytes() == before
    # Features of another network are not taken.
    (one, *_) = kept
    with np.load(one) as file:
        was = dict(file)
    np.savez(one, **(was | {"stamp": np.array("of another"), "train": 0 * was["train"]}))
    assert ask(run, tmp_path, questions, "--seeds", "2") == 0
    assert (folder / "transfer.json").read_bytes() == before


def test_questions_that_too_few_patches_answer_are_refused_before_training(run, tissue, tmp_path, capsys):
    before = {*Path(run.run.dir).rglob("*")}
    assert ask(run, tmp_path, tissue / "questions.csv") == 1
    assert "column h_score has a number for 20 patches of the split train, of at least 30: give more" in (
        capsys.readouterr().err
    )
    (tmp_path / "other.csv").write_text("key,share\nnobody,1\n")
    assert ask(run, tmp_path, tmp_path / "other.csv") == 1
    assert "column share has a number for 0 patches of the split train" in capsys.readouterr().err
    assert {*Path(run.run.dir).rglob("*")} == before
    with pytest.raises(ConfigError, match="--transfer and --leave-out"):
        AblateOptions(transfer="a.csv", leave_out="center")
