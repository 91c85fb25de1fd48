"""Colour alone against tissue whose stain tells the level, and tissue whose stain does not."""

import shutil

import numpy as np
import pytest
import simplejpeg

from lgd.metrics import score
from lgd.report.caveats import COLOUR, colour_only
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.stream.reader import Reader
from lgd.tissue.synth import SynthOptions, synthesise


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
        found = colour_only(shards_of(shortcut, "train"), shards_of(shortcut, split), threads=1)
        assert found.name == COLOUR and np.allclose(found.probability.sum(1), 1)
        kappa[split] = score(found.level, found.probability)["kappa"]
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
        return colour_only(training, shards_of(tmp_path / f"{name}-shards", "test"), threads=1).probability

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
    found = colour_only(shards_of(tmp_path / "shards", "train"), scored, threads=1)
    assert (found.probability[:, 1:3] == 0).all() and (found.probability[:, [0, 3]] > 0).all()
    reader = Reader(scored, ())
    samples = [reader.read(row) for row in range(reader.total)]
    assert found.keys == [sample.key for sample in samples]
    assert found.level.tolist() == [sample.level for sample in samples] and -1 in found.level


def test_nothing_is_fitted_on_one_level_or_none(shortcut, tmp_path):
    root = shortcut.parent / "tissue"
    for stain in ("HE", "IHC"):
        (tmp_path / "one" / stain / "train").mkdir(parents=True)
        for path in (root / stain / "train").glob("*_2+.png"):
            shutil.copy(path, tmp_path / "one" / stain / "train")
    build(ShardOptions(layout="bci", root=str(tmp_path / "one"), out=str(tmp_path / "shards"), split="keep"))
    for training in ([], shards_of(tmp_path / "shards", "train")):
        assert colour_only(training, shards_of(shortcut, "test"), threads=1) is None


def test_a_split_without_patches_has_no_answers(shortcut):
    found = colour_only(shards_of(shortcut, "train"), [], threads=1)
    assert found.keys == [] and found.level.shape == (0,) and found.probability.shape == (0, 4)
