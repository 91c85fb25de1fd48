"""Colour alone against tissue whose stain tells the level, and tissue whose stain does not."""

import shutil

import numpy as np
import pytest
import simplejpeg
from drawn_answers import HER2, HSCORE, KI67

from lgd.base.labels import as_labels
from lgd.report import colour
from lgd.report.colour import COLOUR, Colours, colour_only, describe_colour, read_training_colours
from lgd.shards.builder import build
from lgd.shards.manifest import PatchMeta
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.stream.reader import Reader
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions


def score_colour(training, scored, target=HER2):
    return colour_only(read_training_colours(training, threads=1), scored, target, threads=1)


def shards_of(folder, split):
    return [shard for shard in ShardFolder.open(str(folder)).shards if shard.split == split]


@pytest.fixture(scope="module")
def shortcut(tmp_path_factory):
    """The H&E tells nothing but by its strength of stain, which is the level in train and val, and not in test."""
    folder = tmp_path_factory.mktemp("shortcut")
    root, out = str(folder / "tissue"), folder / "shards"
    synthesise(SynthOptions(out=root, pairs=240, size=64, slides=120, test=0.3, coupling=0.0, shortcut=1.0, workers=1))
    build(ShardOptions(layout="bci", root=root, out=str(out), slides=f"{root}/truth.csv", split="keep:0.3"))
    return out


def test_it_shows_a_shortcut_where_patches_share_it_and_fails_where_they_do_not(shortcut):
    kappa = {}
    for split in ("val", "test"):
        found = score_colour(shards_of(shortcut, "train"), shards_of(shortcut, split))
        assert found.name == COLOUR and np.allclose(found.output.sum(1), 1)
        kappa[split] = found.measures.score(found.label, found.output)["kappa"]
    assert kappa["val"] > 0.8 and kappa["test"] < 0.4


def test_shape_tells_it_nothing(shortcut, tmp_path):
    """Its answers stay the same, up to what JPEG does, where each image is turned, and are others for other images."""
    training = shards_of(shortcut, "train")
    images = [np.random.default_rng(n).integers(90, 250, (64, 64, 3), np.uint8) for n in range(4)]
    levels = ("0", "1+", "2+", "3+")

    def built(name, change):
        for image, level in zip(images, levels, strict=True):
            for stain, pixels in (("HE", image), ("IHC", 255 - image)):
                path = tmp_path / name / stain / "test" / f"{level[0]}_{level}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(change(pixels)), quality=100))
        build(ShardOptions(layout="bci", root=str(tmp_path / name), out=str(tmp_path / f"{name}-shards"), split="keep"))
        return score_colour(training, shards_of(tmp_path / f"{name}-shards", "test")).output

    plain, turned = built("plain", lambda image: image), built("turned", lambda image: image[::-1, ::-1])
    assert np.abs(plain - turned).max() < 0.02 < np.abs(plain - plain[::-1]).max()


def test_a_level_that_training_lacks_is_never_called(shortcut, tmp_path):
    """And the order is that of every network's answers."""
    rows = ["he,ihc,level,split"]
    for path in sorted((shortcut.parent / "tissue" / "HE").glob("*/*.png")):
        place, level = f"{path.parent.name}/{path.name}", path.stem.rsplit("_", 1)[1]
        if path.parent.name == "test" or level in ("0", "3+"):
            # Every third has no level.
            known = "" if len(rows) % 3 == 0 else level
            rows.append(f"tissue/HE/{place},tissue/IHC/{place},{known},{path.parent.name}")
    (shortcut.parent / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(shortcut.parent), out=str(tmp_path / "shards"), split="keep"))
    scored = shards_of(tmp_path / "shards", "test")
    found = score_colour(shards_of(tmp_path / "shards", "train"), scored)
    assert (found.output[:, 1:3] == 0).all() and (found.output[:, [0, 3]] > 0).all()
    reader = Reader(scored, ())
    samples = [reader.read(row) for row in range(reader.total)]
    assert found.keys == [sample.key for sample in samples]
    assert found.label.tolist() == as_labels(HER2, [sample.label for sample in samples]).tolist()
    assert -1 in found.label


def test_nothing_is_fitted_on_one_level_or_none(shortcut, tmp_path):
    root = shortcut.parent / "tissue"
    for stain in ("HE", "IHC"):
        (tmp_path / "one" / stain / "train").mkdir(parents=True)
        for path in (root / stain / "train").glob("*_2+.png"):
            shutil.copy(path, tmp_path / "one" / stain / "train")
    build(ShardOptions(layout="bci", root=str(tmp_path / "one"), out=str(tmp_path / "shards"), split="keep"))
    for training in ([], shards_of(tmp_path / "shards", "train")):
        assert score_colour(training, shards_of(shortcut, "test")) is None


def test_a_split_without_patches_has_no_answers(shortcut):
    found = score_colour(shards_of(shortcut, "train"), [])
    assert found.keys == [] and found.label.shape == (0,) and found.output.shape == (0, 4)


def draw_colours(values, seed=0):
    """Colours whose first number goes with the value, and the last patch of which has none."""
    random = np.random.default_rng(seed)
    metas = [
        PatchMeta.model_construct(key=f"k{n}", group=f"s{n // 4}", label=value, center="A", scanner=None)
        for n, value in enumerate([*values, None])
    ]
    colour_n9 = random.normal(size=(len(metas), 9))
    colour_n9[:-1, 0] += np.array(values) / 10
    return Colours(metas, colour_n9)


@pytest.mark.parametrize("target", [KI67, HSCORE], ids=lambda target: target.name)
def test_a_value_is_regressed_on_colour_within_its_range(target, monkeypatch):
    values = np.random.default_rng(1).uniform(0, 100, 80)
    scored = draw_colours(np.append(np.linspace(0, 100, 40), 1000.0 if target.range is None else 100.0), seed=2)
    scored.colour_n9[0, 0] = 1e4
    monkeypatch.setattr(colour, "read_colours", lambda shards, threads, most=0: scored)
    found = colour_only(draw_colours(values), [], target, threads=1)
    assert found.target == target and found.sites == {"center": ["A"] * 42}
    assert np.isnan(found.label[-1]) and found.output.shape == (42, 1)
    assert (found.output[0, 0] == 100) == (target is KI67), "an answer stays in the range"
    assert np.corrcoef(found.label[1:40], found.output[1:40, 0])[0, 1] > 0.9
    assert "a ridge regression" in describe_colour(target) and "a logistic regression" in describe_colour(HER2)
    assert colour_only(draw_colours([5.0] * 9), [], target, threads=1) is None, "all alike"
