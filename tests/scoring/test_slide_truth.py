"""The map of a slide against what was drawn there, by a student of virtual patches."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from lgd.base.target import find_target
from lgd.config_files import load_config
from lgd.report.colour import fit_colours, read_training_colours, summarise_colour
from lgd.scoring.predict import load_scorer
from lgd.scoring.slides import score_slide, score_slides
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.slides.slide import open_slide
from lgd.store.cache import cache_latents
from lgd.tissue.drawing import MPP
from lgd.tissue.pyramid import write_pyramid
from lgd.tissue.slide_set import SlidesTruth
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.tissue.truth import LEVELS
from lgd.train.launch import train_under

SIDE = 96
EVIDENCE = Path(__file__).parents[2] / "configs" / "evidence.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over virtual patches, with a trained student."""
    folder = tmp_path_factory.mktemp("truth")
    synthesise(SynthOptions(out=str(folder / "tissue"), pairs=960, size=SIDE, coupling=1.0, seed=8, test=0, workers=1))
    fields = {"slides": str(folder / "tissue" / "truth.csv"), "split": "keep:0.05"}
    build(ShardOptions(layout="bci", root=str(folder / "tissue"), out=str(folder / "shards"), mpp=MPP, **fields))
    options = {"run.dir": folder / "run", "run.seed": 0, "data.shards": folder / "shards"}
    options |= {"teacher.epochs": 10, "student.epochs": 16}
    config = load_config(EVIDENCE, [f"--{name}={value}" for name, value in options.items()])
    shards = ShardSet.open(config.shard_dirs)
    train_under(config, "teacher")
    cache_latents(config, shards.shards, 0)
    train_under(config, "student")
    return config


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """Five slides of seeds that nothing else uses, with their scores in a folder `scores` beside them."""
    folder, slides = tmp_path_factory.mktemp("slides"), []
    for seed in np.random.default_rng(20260217).integers(1000, 2**31, 5):
        out = folder / str(seed)
        synthesise(SynthOptions(out=str(out), slides_only=1, slide_size=1536, coupling=1.0, seed=int(seed), workers=1))
        slides.append((out / "HE" / "slide-0000.tif").rename(out / f"{seed}.tif"))
    assert not score_slides(load_scorer(run.student.dir), slides, folder / "scores")[1]
    return slides


def read_tiles(folder):
    with (folder / "tiles.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["grade"]]


def test_the_map_of_a_slide_shows_what_was_drawn_there(run, scored):
    """More than colour tells, and nothing where tiles are exchanged."""
    grade_n, colour_n9, level_n = [], [], []
    for path in scored:
        tiles = read_tiles(path.parents[1] / "scores" / path.stem)
        xy_n2 = np.array([[int(row["x"]), int(row["y"])] for row in tiles])
        known_n = ~np.isnan(found_n := read_levels(path.parent, xy_n2))
        grade_n += [float(row["grade"]) for row, known in zip(tiles, known_n, strict=True) if known]
        level_n += found_n[known_n].tolist()
        with open_slide(path) as slide:
            colour_n9 += [
                summarise_colour(slide.read(x, y, 64, 64, MPP * SIDE / 64)[None])[0] for x, y in xy_n2[known_n]
            ]
    training = read_training_colours(ShardSet.open(run.shard_dirs).of_split("train"), threads=1)
    by_colour_n = fit_colours(training, find_target("her2"))(np.array(colour_n9)) @ np.arange(len(LEVELS))
    agreement, of_colour = (float(spearmanr(level_n, said_n)[0]) for said_n in (grade_n, by_colour_n))
    shuffled = float(spearmanr(level_n, np.random.default_rng(0).permutation(grade_n))[0])
    print(f"{len(level_n)} tiles: map {agreement:.3f}, colour {of_colour:.3f}, shuffled {shuffled:.3f}")
    assert len(level_n) > 300 and set(np.round(level_n)) == {0, 1, 2, 3}
    assert agreement >= 0.6 and agreement > of_colour + 0.1 and abs(shuffled) < 0.15


def test_a_scan_at_half_the_scale_gives_the_same_map(run, scored, tmp_path):
    with open_slide(scored[0]) as slide:
        pixels = Image.fromarray(slide.read(0, 0, slide.width, slide.height, MPP))
    fine = pixels.resize((2 * pixels.width, 2 * pixels.height), Image.Resampling.BICUBIC)
    write_pyramid(tmp_path / "fine.tif", np.asarray(fine), MPP / 2, quality=95)
    score = score_slide(load_scorer(run.student.dir), tmp_path / "fine.tif", tmp_path / "out")
    before, after = read_tiles(scored[0].parents[1] / "scores" / scored[0].stem), read_tiles(tmp_path / "out" / "fine")
    assert score.side == 2 * SIDE and len(after) > 100
    assert [2 * int(row[axis]) for row in before for axis in "xy"] == [int(row[axis]) for row in after for axis in "xy"]
    probability = [np.array([[float(row[name]) for name in LEVELS] for row in rows]) for rows in (before, after)]
    assert np.abs(probability[0] - probability[1]).max() < 0.05
    assert score.answer.label == LEVELS[probability[0].mean(0).argmax()]


def read_levels(folder, xy_n2):
    """The level that was drawn at each tile: of its tumour, where that is three tenths of it and more; else nan."""
    document = SlidesTruth.read(folder / "truth.json")
    (truth,), grain = document.slides, document.grain
    level_N = np.array([np.nan] + [LEVELS.index(region.label) for region in truth.regions])
    raster = np.asarray(Image.open(folder / "truth" / "slide-0000.png")).astype(int)
    level_HW, tumour_HW = level_N[raster[..., 0]], raster[..., 1] / 255 * (raster[..., 0] > 0)
    found = []
    for left, top in xy_n2 // grain:
        place = slice(top, top + SIDE // grain), slice(left, left + SIDE // grain)
        tumour = tumour_HW[place]
        enough = tumour.mean() >= 0.3
        found.append(np.nansum(level_HW[place] * tumour) / tumour.sum() if enough else np.nan)
    return np.array(found)
