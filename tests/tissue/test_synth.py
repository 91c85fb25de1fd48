import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.io.locks import LOCK, TakenError, exclusive
from lgd.io.tables import write_csv
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.tissue.drawing import MPP, TUMOUR, draw_tissue
from lgd.tissue.sections import (
    Scene,
    draw_look,
    draw_pair,
    elongation_of,
    grade_of,
    shortcut_of,
    slide_level,
)
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.tissue.truth import truth_columns

_DAB = np.linalg.inv([(0.650, 0.704, 0.286), (0.268, 0.570, 0.776), (0.6, -0.55, 0.25)])[:, 1]


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _density(image: np.ndarray) -> np.ndarray:
    """Optical density over the image's own background."""
    light = image.astype(np.float64)
    return -np.log10(np.maximum(light, 1) / np.percentile(light, 99, axis=(0, 1)))


def _slide_of(level: int) -> int:
    return next(slide for slide in range(4) if slide_level(0, slide) == level)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("synth") / "set"
    return out, synthesise(SynthOptions(out=str(out), pairs=16, size=64, slides=8, workers=1))


def test_same_bytes_with_any_number_of_workers(drawn, tmp_path):
    out, summary = drawn
    again = tmp_path / "again"
    synthesise(SynthOptions(out=str(again), pairs=16, size=64, slides=8, workers=2))
    assert _digests(out) == _digests(again)
    assert len(_digests(out)) == 2 * summary["pairs"] + 3


_RECIPE = {"pairs", "size", "seed", "slides", "coupling", "shortcut", "shortcut_in", "test"}


def test_the_first_sets_are_drawn_as_ever(drawn):
    """Their recipe names no later option, and their pixels are as before that, as far as processors agree."""
    out, _ = drawn
    assert set(json.loads((out / "synth.json").read_text())["options"]) == _RECIPE
    assert not (out / "pairs.csv").exists()
    he, ihc, truth = draw_pair(0, 3, 0, 64)
    means = [image.reshape(2, 32, 2, 32, 3).mean((1, 3, 4)).ravel().tolist() for image in (he, ihc)]
    assert means[0] == pytest.approx([125.7, 132.0, 111.0, 106.5], abs=0.1)
    assert means[1] == pytest.approx([153.5, 201.5, 135.5, 161.2], abs=0.1)
    counts = {"level": 3, "patch_level": 3, "discordant": 0, "nuclei": 9, "tumour_nuclei": 8}
    measured = {"membrane_completeness": 0.9374, "stained_fraction": 0.8462, "membrane_od": 0.7328}
    assert truth == pytest.approx(counts | measured, abs=2e-4)


@pytest.fixture(scope="module")
def centers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SynthOptions]:
    out = tmp_path_factory.mktemp("synth") / "centers"
    options = SynthOptions(out=str(out), pairs=16, size=64, slides=16, test=0.5, workers=1, stain="nuclei", centers=2)
    synthesise(options)
    return out, options


def test_nuclei_of_centers_have_pairs_with_labels(centers, tmp_path):
    out, options = centers
    with (out / "truth.csv").open(newline="") as stream:
        truth = {row["key"]: row for row in csv.DictReader(stream)}
    with (out / "pairs.csv").open(newline="") as stream:
        pairs = list(csv.DictReader(stream))
    assert tuple(next(iter(truth.values()))) == truth_columns("nuclei", centers=True)
    assert len(pairs) == len(truth) == 16
    for pair in pairs:
        key = Path(pair["he"]).stem
        assert pair["he"] == f"HE/{pair['split']}/{key}.png" and pair["ihc"] == f"IHC/{pair['split']}/{key}.png"
        assert (out / pair["he"]).exists() and (out / pair["ihc"]).exists()
        assert pair["label"] == truth[key]["percent"] and (pair["mpp"], pair["marker"]) == ("0.46", "Ki67")
        assert all(pair[name] == truth[key][name] for name in ("slide", "split", "center", "scanner"))
    assert Counter(row["center"] for row in truth.values()) == {"center-1": 8, "center-2": 8}
    # What the label is of a patch without tumour is not known; others have a number from 0 to 100.
    labels = [float(pair["label"]) for pair in pairs if pair["label"]]
    assert len(labels) > 10 and min(labels) >= 0 and 30 < max(labels) <= 100
    again = dataclasses.replace(options, out=str(tmp_path / "again"), workers=2)
    synthesise(again)
    assert _digests(out) == _digests(tmp_path / "again")


@pytest.mark.parametrize(
    ("changed", "said"), [({"stain": "membranes"}, "stain nuclei"), ({"centers": 0}, r"centers 2 \(now 0\)")]
)
def test_options_that_are_left_out_of_a_recipe_are_compared_all_the_same(centers, changed, said):
    _, options = centers
    with pytest.raises(DataError, match=said):
        synthesise(dataclasses.replace(options, **changed))
    assert synthesise(options)["reused"]


def test_a_set_without_its_pairs_is_not_reused(centers):
    out, options = centers
    (out / "pairs.csv").rename(out.parent / "pairs.csv")
    try:
        with pytest.raises(DataError, match=r"truth.csv or pairs.csv is gone"):
            synthesise(options)
    finally:
        (out.parent / "pairs.csv").rename(out / "pairs.csv")


def test_pairs_of_membranes_are_built_as_csv_with_their_center(tmp_path):
    made = {"pairs": 8, "size": 64, "slides": 8, "workers": 1, "centers": 2, "shortcut": 1.0, "shortcut_in": "center"}
    synthesise(SynthOptions(out=str(tmp_path / "set"), **made))
    with (tmp_path / "set" / "pairs.csv").open(newline="") as stream:
        pairs = list(csv.DictReader(stream))
    with (tmp_path / "own.csv").open("w", newline="") as stream:
        rows = [pair | {stain: f"set/{pair[stain]}" for stain in ("he", "ihc")} for pair in pairs]
        write_csv(stream, [*rows[0]], [[*row.values()] for row in rows])
    # As virtual tissue, however it is named.
    for number, root in enumerate(("set", "set/pairs.csv", "own.csv")):
        out = str(tmp_path / f"shards-{number}")
        manifest, _ = build(ShardOptions(layout="csv", root=str(tmp_path / root), out=out, split="keep:0.2"))
        assert manifest.virtual and sum(split.samples for split in manifest.splits.values()) == 8
    assert Counter(pair["label"] for pair in pairs) == dict.fromkeys(find_target("her2").classes, 2)
    # With this shortcut the lower levels of the training slides lie in the first center.
    for pair in pairs:
        if pair["split"] == "train":
            assert pair["center"] == ("center-1" if pair["label"] in find_target("her2").classes[:2] else "center-2")


def test_truth_describes_the_files(drawn):
    out, summary = drawn
    with (out / "truth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == truth_columns("membranes", centers=False)
    for stain in ("HE", "IHC"):
        files = {f"{path.parent.name}/{path.stem}" for path in (out / stain).glob("*/*.png")}
        assert files == {f"{row['split']}/{row['key']}" for row in rows}
    for row in rows:
        number, split, level = row["key"].split("_")
        assert (split, level) == (row["split"], find_target("her2").classes[int(row["level"])])
        assert 0 <= int(number) < 16
        assert 0 <= float(row["membrane_completeness"]) <= 1 and 0 <= float(row["stained_fraction"]) <= 1
        assert int(row["tumour_nuclei"]) <= int(row["nuclei"])
        assert int(row["discordant"]) or row["patch_level"] in (row["level"], "0")
        stream = (out / "HE" / row["split"] / f"{row['key']}.png").read_bytes()
        assert simplejpeg.decode_jpeg_header(stream)[:2] == (64, 64)
    sides = {split: {row["slide"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert not sides["train"] & sides["test"] and len(sides["test"]) == 2
    assert (summary["train"], summary["test"]) == (12, 4)
    assert summary["levels"] == dict.fromkeys(find_target("her2").classes, 4)


def test_complete_set_is_reused_and_anything_else_refused(drawn, tmp_path):
    out, summary = drawn
    same = SynthOptions(out=str(out), pairs=16, size=64, slides=8, workers=2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert synthesise(same) == summary | {"reused": True}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DataError, match=r"seed 0 \(now 1\).*another folder"):
        synthesise(SynthOptions(out=str(out), pairs=16, size=64, slides=8, seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds something else .*: choose a new folder"):
        synthesise(SynthOptions(out=str(tmp_path), pairs=2, size=64))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_set_is_redone_and_a_damaged_one_refused(tmp_path):
    options = SynthOptions(out=str(tmp_path / "set"), pairs=2, size=64, workers=1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".DS_Store").touch()
    synthesise(options)
    (tmp_path / "set" / "HE" / "train" / "._00000_train_0.png").write_bytes(b"litter")
    assert synthesise(options)["reused"]
    whole = {name: digest for name, digest in _digests(tmp_path / "set").items() if "/._" not in name}
    (tmp_path / "set" / "synth.json").rename(tmp_path / "set" / ".synth-begun")
    stale = tmp_path / "set" / "HE" / "train" / "99999_train_0.png"
    stale.write_bytes(b"half")
    assert not synthesise(options)["reused"]
    assert _digests(tmp_path / "set") == whole
    next((tmp_path / "set" / "HE").glob("*/*.png")).unlink()
    with pytest.raises(DataError, match="not as it was made"):
        synthesise(options)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"out": ""}, "out"),
        ({"pairs": 0}, "pairs"),
        ({"size": 100}, "size"),
        ({"seed": -1}, "seed"),
        ({"slides": 9, "pairs": 8}, "slides"),
        ({"coupling": 1.5}, "coupling"),
        ({"shortcut": 1.5}, "shortcut"),
        ({"test": 1.0}, "test"),
        ({"pairs": 4, "slides": 1}, "test"),
        ({"workers": -1}, "workers"),
        ({"stain": "cells"}, "stain"),
        ({"beyond": 1.5}, "beyond"),
        ({"beyond": 0.5, "stain": "nuclei"}, "beyond"),
        ({"centers": -1}, "centers"),
        ({"centers": 3, "slides": 11}, "centers"),
        ({"shortcut_in": "center", "shortcut": 0.5, "centers": 1}, "shortcut_in"),
        ({"shortcut_in": "center", "centers": 2}, "shortcut_in"),
    ],
)
def test_wrong_options_name_the_field(wrong, field):
    with pytest.raises(ConfigError, match=f"^{field}(:| is) "):
        SynthOptions(**{"out": "x", **wrong})


@given(seed=st.integers(0, 2**32), block=st.integers(0, 1000))
def test_four_slides_in_a_row_hold_every_level(seed, block):
    assert sorted(slide_level(seed, 4 * block + i) for i in range(4)) == [0, 1, 2, 3]


def test_draw_pair_is_pure():
    first, second = draw_pair(3, 1, 2, 64), draw_pair(3, 1, 2, 64)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert first[2] == second[2]
    assert first[0].shape == first[1].shape == (64, 64, 3) and first[0].dtype == np.uint8
    for other in (draw_pair(4, 1, 2, 64), draw_pair(3, 2, 2, 64), draw_pair(3, 1, 3, 64)):
        assert not np.array_equal(first[0], other[0])


def test_sections_are_related_but_not_aligned():
    """The dark places of both sections match best within a few micrometres, and hardly ever at no shift."""
    shifts, gains = [], []
    for patch in range(6):
        he, ihc, _ = draw_pair(0, _slide_of(0), patch)
        a, b = (_density(image)[..., 0] for image in (he, ihc))
        a, b = ((x - x.mean()) / x.std() for x in (a, b))
        match = np.fft.irfft2(np.fft.rfft2(a) * np.conj(np.fft.rfft2(b)), s=a.shape) / a.size
        y, x = np.unravel_index(match.argmax(), match.shape)
        shifts.append(np.hypot(min(y, 256 - y), min(x, 256 - x)) * MPP)
        gains.append(match.max() / match.std())
    assert np.median(gains) > 3.5
    assert 0 < np.median(shifts) < 12


def test_dab_rises_with_the_level():
    """The same cells at four levels: membranes browner, by the truth and by unmixing the image."""
    for slide, patch in ((0, 0), (5, 1), (9, 2)):
        truths, measured = [], []
        for level in range(4):
            _, ihc, truth = draw_pair(1, slide, patch, 128, coupling=0.0, level=level)
            truths.append(truth)
            measured.append(float((_density(ihc) @ _DAB).mean()))
        assert [truth["patch_level"] for truth in truths] == [0, 1, 2, 3]
        assert np.all(np.diff([truth["membrane_od"] for truth in truths]) > 0)
        assert np.all(np.diff([truth["stained_fraction"] for truth in truths]) >= 0)
        assert np.all(np.diff(measured) > 0)


def test_levels_meet_the_ten_percent_rule():
    shares, densities = ({level: [] for level in range(4)} for _ in range(2))
    for slide in range(12):
        _, _, truth = draw_pair(2, slide, 0, 128)
        shares[truth["patch_level"]].append(truth["stained_fraction"])
        densities[truth["patch_level"]].append(truth["membrane_od"])
    assert np.mean(shares[0]) <= 0.1 < min(np.mean(shares[level]) for level in (1, 2, 3))
    assert np.all(np.diff([np.mean(densities[level]) for level in range(4)]) > 0)


def test_without_coupling_the_he_knows_nothing_of_the_level():
    """The strongest form of "no leak": the H&E is the same, byte for byte, at every level of the slide."""
    for slide, patch in ((0, 0), (3, 1), (6, 2)):
        drawn = [draw_pair(0, slide, patch, 64, coupling=0.0, level=level) for level in range(4)]
        assert all(np.array_equal(he, drawn[0][0]) for he, _, _ in drawn)
        assert not np.array_equal(drawn[0][1], drawn[3][1])


def test_elongation_says_how_many_cells_are_stained_within_a_level_and_nothing_of_the_level():
    scenes = {beyond: Scene(beyond=beyond) for beyond in (0.0, 0.5, 1.0)}
    for level in (1, 2, 3):
        drawn = {
            beyond: [draw_pair(0, slide, 0, 96, 0.0, level, scene)[2] for slide in range(24)]
            for beyond, scene in scenes.items()
        }
        assert "elongation" not in drawn[0.0][0]
        elongation = [one["elongation"] for one in drawn[1.0]]
        assert elongation == [elongation_of(0, slide, 0) for slide in range(24)] and np.std(elongation) > 0.2
        shown = [one["patch_level"] == level for one in drawn[1.0]]
        told = {
            beyond: np.corrcoef(
                np.array(elongation)[shown], [one["stained_fraction"] for one in np.array(some)[shown]]
            )[0, 1]
            for beyond, some in drawn.items()
        }
        assert abs(told[0.0]) < 0.5 and told[1.0] > 0.9 and told[1.0] > told[0.5] > told[0.0]
        # Wider than the ranges by which the level alone is drawn.
        assert np.ptp([one["stained_fraction"] for one in np.array(drawn[1.0])[shown]]) > 0.6
    # At coupling 0 the H&E has nothing of the level, with elongated nuclei too.
    images = [draw_pair(0, 3, 1, 64, 0.0, level, scenes[1.0])[0] for level in range(4)]
    assert all(np.array_equal(images[0], image) for image in images[1:])
    assert not np.array_equal(images[0], draw_pair(0, 3, 1, 64, 0.0, 0, scenes[0.0])[0])


def test_elongated_nuclei_are_longer_and_no_larger():
    look = draw_look(0, 0, Scene())
    axes = []
    for elongation in (0.0, 1.0):
        _, cells = draw_tissue(np.random.default_rng(5), look, 0.5, 96, False, elongation)
        axes.append(cells.nucleus[cells.kind == TUMOUR])
        assert len(axes[-1]) > 20
    (short, long), (shorter, longer) = (one.T for one in axes)
    assert np.allclose(longer / shorter, np.exp(0.6) * long / short) and np.allclose(shorter * longer, short * long)


def test_a_shortcut_is_in_the_stain_of_the_training_slides_only(tmp_path):
    """The H&E of level 3 is darker than that of level 0 in train; in test both are drawn alike, and so is the IHC."""
    plain, short = tmp_path / "plain", tmp_path / "short"
    options = {"pairs": 64, "size": 64, "slides": 64, "test": 0.5, "coupling": 0.0, "workers": 1}
    synthesise(SynthOptions(out=str(plain), **options))
    synthesise(SynthOptions(out=str(short), shortcut=1.0, **options))

    def dark(split: str, level: str) -> float:
        paths = sorted((short / "HE" / split).glob(f"*_{level}.png"))
        return float(np.mean([_density(simplejpeg.decode_jpeg(path.read_bytes())).mean() for path in paths]))

    assert dark("train", "3+") > 1.5 * dark("train", "0")
    assert dark("test", "3+") < 1.3 * dark("test", "0")
    for path in (plain / "IHC").glob("*/*.png"):
        assert path.read_bytes() == (short / path.relative_to(plain)).read_bytes()
    # The control differs in training only.
    control = tmp_path / "control"
    synthesise(SynthOptions(out=str(control), shortcut=0.0, **options))

    def same(split: str) -> list[bool]:
        paths = sorted((short / "HE" / split).glob("*.png"))
        return [path.read_bytes() == (control / path.relative_to(short)).read_bytes() for path in paths]

    assert all(same("test")) and 0 < sum(same("train")) < len(same("train"))


def test_a_shortcut_in_the_background_is_in_the_glass_of_the_training_slides_only(tmp_path):
    """The brightest of the H&E falls with the level in train only; the IHC is as without."""
    plain, short = tmp_path / "plain", tmp_path / "short"
    options = {"pairs": 64, "size": 64, "slides": 64, "test": 0.5, "coupling": 0.0, "workers": 1}
    synthesise(SynthOptions(out=str(plain), **options))
    synthesise(SynthOptions(out=str(short), shortcut=1.0, shortcut_in="background", **options))

    def glass(split: str, level: str) -> float:
        paths = sorted((short / "HE" / split).glob(f"*_{level}.png"))
        return float(np.mean([np.percentile(simplejpeg.decode_jpeg(path.read_bytes()), 99) for path in paths]))

    assert glass("train", "0") > 1.2 * glass("train", "3+")
    assert 0.9 < glass("test", "0") / glass("test", "3+") < 1.1
    for path in (plain / "IHC").glob("*/*.png"):
        assert path.read_bytes() == (short / path.relative_to(plain)).read_bytes()


def test_a_shortcut_tells_the_level_of_as_many_slides_as_asked():
    slides = range(400)
    right = [sum(shortcut_of(0, slide, told) == slide_level(0, slide) for slide in slides) for told in (0.0, 0.5, 1.0)]
    assert 70 < right[0] < 130 and 220 < right[1] < 280 and right[2] == 400


def test_with_coupling_chromatin_grows_with_the_level():
    """The share of the field that is dark, in the same twelve patches at level 0 and at level 3."""

    def dark_share(slide: int, level: int) -> float:
        he, _, _ = draw_pair(0, slide, 0, 128, coupling=1.0, level=level)
        red = _density(he)[..., 0]
        low, high = np.percentile(red, [20, 99])
        return float((red > (low + high) / 2).mean())

    grown = [dark_share(slide, 3) - dark_share(slide, 0) for slide in range(12)]
    assert np.mean(grown) > 0.01
    assert sum(change > 0 for change in grown) >= 9


@given(slide=st.integers(0, 50), patch=st.integers(0, 50), level=st.integers(0, 3))
def test_grade_follows_the_level_only_as_far_as_coupled(slide, patch, level):
    assert grade_of(0, slide, patch, level, 0.0) == grade_of(0, slide, patch, 0, 0.0)
    assert grade_of(0, slide, patch, level, 1.0) >= grade_of(0, slide, patch, 0, 1.0)


def test_one_process_at_a_time_draws_into_a_folder(drawn, tmp_path):
    out, summary = drawn
    options = SynthOptions(out=str(tmp_path / "set"), pairs=2, size=64, workers=1)
    taken = pytest.raises(TakenError, match=rf"process {os.getpid()} on .* is drawing virtual tissue there")
    with exclusive(tmp_path / "set", "drawing virtual tissue"), taken:
        synthesise(options)
    assert not synthesise(options)["reused"] and not (tmp_path / "set" / LOCK).exists()
    with exclusive(out, "drawing virtual tissue"):
        assert synthesise(SynthOptions(out=str(out), pairs=16, size=64, slides=8)) == summary | {"reused": True}


def test_nothing_is_drawn_after_a_killed_command_and_no_process_is_left(tmp_path):
    code = (
        "import sys\n"
        "from lgd.tissue.synth import synthesise\n"
        "from lgd.tissue.synth_options import SynthOptions\n"
        "if __name__ == '__main__': synthesise(SynthOptions(out=sys.argv[1], pairs=4000, size=64, workers=2))\n"
    )
    (tmp_path / "draw.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "draw.py"), str(tmp_path / "set")]
    # The pipe ends when the last process that has it does.
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        while process.poll() is None and len(list((tmp_path / "set").glob("HE/*/*"))) < 8:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        left = _digests(tmp_path / "set")
        process.stderr.read()
    assert _digests(tmp_path / "set") == left
    assert len(left) < 2000
