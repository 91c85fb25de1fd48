"""Each change against its definition; and a whole measure of a small run."""

import json

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from PIL import Image

from lgd import pipeline
from lgd.labels.predictions import paired_differences
from lgd.report import robustness
from lgd.report.robustness import CHANGES, Change
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.image import decode, encode
from lgd.shards.shard_set import ShardSet
from lgd.stain.deconvolve import H_DAB, H_E, rgb_to_od, unmix
from lgd.stain.targets import estimate_white

EVERY = [(change, strength) for change in CHANGES for strength in change.strengths]
KEYS = [f"patch-{number}" for number in range(7)]


def named(name: str) -> Change:
    return next(change for change in CHANGES if change.name == name)


def images(count=7, size=48, white=240.0, role="he", seed=0):
    """Smooth amounts of two stains on glass, some pixels of it bare."""
    random = np.random.default_rng(seed)
    amounts = np.kron(random.gamma(1.0, 0.3, (count, 3, size // 4, size // 4)), np.ones((4, 4)))
    amounts[:, 2] = 0
    amounts[:, :, : size // 4] = 0
    od = mix(torch.from_numpy(amounts).float(), H_E if role == "he" else H_DAB)
    rgb = od_to_rgb(od, white).permute(0, 2, 3, 1).numpy()
    return np.rint(rgb).astype(np.uint8)


@pytest.mark.parametrize(("change", "strength"), EVERY, ids=lambda value: getattr(value, "name", str(value)))
def test_a_change_depends_on_seed_and_key_only(change, strength):
    before = images()
    copy = before.copy()
    whole = change.apply("he", strength, 3, before, KEYS)
    assert whole.dtype == np.uint8 and whole.shape == before.shape and whole.flags.c_contiguous
    assert (before == copy).all(), "the images are not written to"
    assert (whole != before).any((1, 2, 3)).all()
    order = [4, 0, 6, 1, 5, 3, 2]
    for cut in ([order[:1], order[1:]], [order[:4], order[4:]]):
        for rows in cut:
            some = change.apply("he", strength, 3, before[rows], [KEYS[row] for row in rows])
            np.testing.assert_array_equal(some, whole[rows])


@pytest.mark.parametrize("name", ["stain", "background"])
def test_other_seeds_and_keys_draw_anew(name):
    change, before = named(name), np.repeat(images(1), 7, axis=0)
    drawn = change.apply("he", 0.5, 0, before, KEYS)
    assert len(np.unique(drawn.reshape(7, -1), axis=0)) == 7
    assert (change.apply("he", 0.5, 1, before, KEYS) != drawn).any((1, 2, 3)).all()


@pytest.mark.parametrize("role", ["he", "ihc"])
def test_stain_amounts_and_vectors_are_those_that_were_drawn(role):
    before = images(4, role=role)
    stains = H_E if role == "he" else H_DAB
    amounts = torch.tensor([[1.3, 0.8], [0.7, 1.2], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    turned = robustness._turned(stains, 8.0, torch.tensor([[0.3, 2.0], [4.0, 5.0], [1.0, 1.5], [0.0, 0.0]]))
    turned[2] = stains[:2]
    after = robustness._restain(before, stains, amounts, turned)
    assert abs(after[2].astype(int) - before[2]).max() <= 1, "scaled by 1 and unturned"
    rgb = torch.from_numpy(before).permute(0, 3, 1, 2)
    white = estimate_white(rgb)
    for row in range(4):
        # The slow way: unmix, scale, and mix with the other vectors.
        new = torch.cat([turned[row], stains[2:]])
        amount = unmix(rgb_to_od(rgb[row : row + 1], white[row : row + 1]), stains)
        amount[:, :2] *= amounts[row][None, :, None, None]
        slow = od_to_rgb(mix(amount, new), white[row : row + 1])[0].permute(1, 2, 0).numpy().clip(0, 255)
        # A channel of 0 stands for an OD without end, and stays 0.
        np.testing.assert_allclose(after[row][before[row] > 0], slow[before[row] > 0], atol=0.6)
    assert abs(after.astype(int) - before)[:2].max() > 10


def test_stains_turn_by_the_angle_and_absorb():
    direction = torch.linspace(0, 6.2, 40, dtype=torch.float64)[:, None].expand(40, 2)
    for stains in (H_E, H_DAB):
        turned = robustness._turned(stains, 3.0, direction)
        angle = torch.rad2deg(torch.acos((turned * stains[:2]).sum(-1)))
        torch.testing.assert_close(angle, torch.full_like(angle, 3.0), atol=1e-6, rtol=0)
        far = robustness._turned(stains, 10.0, direction)
        assert far.min() >= 0 and torch.rad2deg(torch.acos((far * stains[:2]).sum(-1))).max() <= 10 + 1e-6
        torch.testing.assert_close(robustness._turned(stains, 0.0, direction)[3], stains[:2])


@pytest.mark.parametrize("white", [172.0, 240.0])
def test_a_stain_shift_leaves_the_glass(white):
    before = images(white=white)
    after = named("stain").apply("he", 0.4, 0, before, KEYS)
    np.testing.assert_array_equal(after[:, :12], before[:, :12])


def test_a_background_becomes_the_other():
    both = np.concatenate([images(3, white=240.0), images(4, white=172.0)])
    change = named("background")
    glass = change.apply("he", 1.0, 0, both, KEYS)[:, :12].reshape(7, -1)
    assert (glass.max(1) - glass.min(1) == 0).all()
    (grey, white), glass = (glass[:3, 0], glass[3:, 0]), None
    assert ((grey >= 165) & (grey <= 180)).all() and ((white >= 230) & (white <= 250)).all()
    half = change.apply("he", 0.5, 0, both, KEYS)[:, 0, 0, 0].astype(float)
    np.testing.assert_allclose(half[:3], np.sqrt(240.0 * grey), atol=1)
    np.testing.assert_allclose(half[3:], np.sqrt(172.0 * white), atol=1)
    # Another exposure: the amounts of stain, relative to the glass, stay.
    after = torch.from_numpy(change.apply("he", 1.0, 0, both, KEYS)[:3]).permute(0, 3, 1, 2)
    before = torch.from_numpy(both[:3]).permute(0, 3, 1, 2)
    od = [rgb_to_od(rgb, estimate_white(rgb))[before > 40] for rgb in (before, after)]
    assert abs(od[0] - od[1]).max() < 0.02


def test_jpeg_goes_through_the_codec_and_blur_is_gaussian():
    before = images()
    twice = named("JPEG").apply("he", 80.0, 0, before, KEYS)
    np.testing.assert_array_equal(twice[5], decode(encode(before[5], "jpg", 20), "x"))
    error = [abs(named("JPEG").apply("he", s, 0, before, KEYS) - before.astype(float)).mean() for s in (10, 50, 80)]
    assert error == sorted(error)
    point = np.zeros((1, 33, 33, 3), np.uint8)
    point[0, 16, 16] = 255
    place = np.arange(33) - 16
    bell = np.exp(-(place**2) / 8)
    expected = 255 * np.outer(bell, bell) / bell.sum() ** 2
    spread = named("blur").apply("he", 2.0, 0, point, KEYS[:1])
    np.testing.assert_allclose(spread[0, :, :, 1], expected, atol=0.6)
    flat = np.full((1, 16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(named("blur").apply("he", 2.0, 0, flat, KEYS[:1]), flat)


def test_scoring_changed_images_is_scoring_them_changed(tissue_run):
    teacher = load_scorer(tissue_run.teacher.dir, "teacher")
    shards = ShardSet.open(tissue_run.shard_dirs).of_split("val")

    def dark(image_BHW3, keys):
        assert len(keys) == len(image_BHW3)
        return image_BHW3 // 2

    seen = []
    after, _ = score_shards(teacher, shards, threads=1, batch=3, alter=dark)
    before, _ = score_shards(teacher, shards, threads=1, alter=lambda image, keys: seen.extend(image) or image)
    plain, _ = score_shards(teacher, shards, threads=1)
    np.testing.assert_array_equal(before.output, plain.output)
    halved = teacher.score(np.stack(seen) // 2)["output"]
    np.testing.assert_allclose(after.output, halved, atol=1e-5)
    assert not np.allclose(after.output, plain.output, atol=1e-3)


@pytest.fixture(scope="module")
def written(tissue_run, change, tmp_path_factory):
    """A run whose report has robustness; its student's folder is a copy, since the report adds pictures to it."""
    import shutil

    root = tmp_path_factory.mktemp("robust")
    shutil.copytree(tissue_run.student.dir, root / "student")
    config = change(
        tissue_run,
        run={"dir": str(root)},
        student={"dir": str(root / "student")},
        report={"dir": str(root / "report"), "robustness": True, "queries": 0},
    )
    pipeline.evaluate(config)
    return config, root / "report"


def test_the_report_holds_every_model_change_and_strength(written):
    _, folder = written
    found = json.loads((folder / "metrics.json").read_text())["robustness"]
    assert [model["name"] for model in found["models"]] == ["LGD-Net", "IHC teacher"]
    for model in found["models"]:
        assert [(c["name"], at["strength"]) for c in model["changes"] for at in c["at"]] == [
            (change.name, strength) for change, strength in EVERY
        ]
    text = (folder / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| LGD-Net | ", "| IHC teacher | "))]
    section = [row for row in rows if any(f"| {change.name}, " in row for change in CHANGES)]
    assert len(section) == 2 * len(EVERY)
    assert "](robustness.png)" in text
    with Image.open(folder / "robustness.png") as image:
        assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 10


def test_a_number_of_the_report_is_worked_out_again(written):
    config, folder = written
    found = json.loads((folder / "metrics.json").read_text())["robustness"]
    teacher, shards = load_scorer(config.teacher.dir, "teacher"), ShardSet.open(config.shard_dirs).of_split("test")
    before, _ = score_shards(teacher, shards, threads=1)
    after, _ = score_shards(
        teacher,
        shards,
        threads=1,
        batch=7,
        alter=lambda image, keys: named("stain").apply("ihc", 0.4, config.run.seed, image, keys),
    )
    at = found["models"][1]["changes"][0]["at"][2]
    accuracy = (after.answer == after.label).mean()
    assert at["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)
    again = paired_differences(after, before, ["ece"], config.report.bootstrap, config.run.seed)["ece"]
    assert at["minus_unchanged"]["ece"] == pytest.approx(again.as_json(), abs=1e-4)


def test_the_cost_that_the_configuration_tells_is_true():
    assert len(EVERY) == 11


def test_a_report_without_robustness_says_nothing_of_it(written, change):
    config, folder = written
    pipeline.evaluate(change(config, report={"robustness": False}))
    assert json.loads((folder / "metrics.json").read_text())["robustness"] is None
    assert not (folder / "robustness.png").exists()
    text = (folder / "summary.md").read_text()
    assert "obustness" not in text.replace("--report.robustness false", "")
