"""`--he-size`: the H&E is stored once more at the model's size."""

import shutil

import numpy as np
import pytest
import webdataset
from test_builder import build_by, contents, kill_after_two, make_bci, options, patch
from test_verify import remanifest, rewrite

from lgd.base.errors import ConfigError, DataError
from lgd.shards.archive import read_sample
from lgd.shards.builder import build
from lgd.shards.image import decode, encode, header
from lgd.shards.manifest import Manifest
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify
from lgd.stream.reader import Reader


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Pairs of 32 px, and their shards with the H&E at 16 px too; tests do not change them."""
    folder = tmp_path_factory.mktemp("he-size")
    root = make_bci(folder / "bci")
    build(options(root, folder / "out", mpp=0.46, he_size=16))
    return root, folder / "out"


@pytest.fixture
def out(built, tmp_path):
    shutil.copytree(built[1], tmp_path / "out")
    return tmp_path / "out"


def samples_of(folder):
    """KEY.json and the images of every sample."""
    found = []
    for shard in ShardFolder.open(folder).shards:
        file, index = shard.open()
        with file:
            found += [read_sample(file, index, row, shard, shard.roles) for row in range(shard.samples)]
    return found


def test_the_he_is_stored_as_a_stream_would_decode_it(built):
    root, out = built
    manifest = Manifest.read(out / "manifest.json")
    assert manifest.options.he_size == 16
    assert manifest.extensions.by_role() == {"json": "json", "hes": "jpg", "he": "jpg", "ihc": "jpg"}
    samples = samples_of(out)
    assert len(samples) == 10 and verify(out) == []
    for meta, images in samples:
        assert images["he"] == (root / meta.source).read_bytes()
        assert images["hes"] == encode(decode(images["he"], "he", 16), "jpg", 95)
        assert (meta.width, meta.height) == (32, 32)


def test_plain_webdataset_reads_it_beside_the_others(built):
    shard = ShardFolder.open(built[1]).shards[0]
    (first, *_) = webdataset.WebDataset(str(shard.path), shardshuffle=False)
    assert [name for name in first if not name.startswith("__")] == ["json", "hes.jpg", "he.jpg", "ihc.jpg"]


def test_sets_of_other_sizes_differ_in_their_options_and_bytes(built, tmp_path):
    root, whole = built
    with pytest.raises(DataError, match=r"another shard set \(other options\)"):
        build(options(root, whole, mpp=0.46))
    assert build(options(root, whole, mpp=0.46, he_size=16))[1] is False
    plain = build(options(root, tmp_path / "plain", mpp=0.46))[0]
    assert plain.options.he_size is None and plain.extensions.hes is None
    assert plain.digest != Manifest.read(whole / "manifest.json").digest
    digests = [{shard.sha256 for shard in ShardFolder.open(folder).shards} for folder in (whole, tmp_path / "plain")]
    assert not digests[0] & digests[1]


@pytest.mark.faults
def test_a_killed_build_goes_on_and_gives_the_same_bytes(built, tmp_path):
    root, whole = built
    out = tmp_path / "out"

    with pytest.raises(KeyboardInterrupt):
        build_by(kill_after_two, options(root, out, mpp=0.46, he_size=16, workers=2))
    for other in (0, 8):
        with pytest.raises(DataError, match="unfinished build of something else"):
            build(options(root, out, mpp=0.46, he_size=other))
    assert build(options(root, out, mpp=0.46, he_size=16))[1]
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("image", ["keep", "png", "jpeg:90"])
def test_tiles_are_stored_in_small_each(tmp_path, image):
    root, out = make_bci(tmp_path / "bci", 3, "png", side=80), tmp_path / "out"
    build(options(root, out, tile=32, he_size=16, image=image, shard_size=5))
    samples = samples_of(out)
    assert len(samples) == 3 * 4 and verify(out) == []
    for _, images in samples:
        assert header(images["hes"], "hes")[:] == ("jpg", 16, 16)
        assert images["hes"] == encode(decode(images["he"], "he", 16), "jpg", 95)


def test_a_patch_that_is_no_square_becomes_one_as_in_a_stream(tmp_path):
    root = tmp_path / "bci"
    for stain, seed in (("HE", 1), ("IHC", 2)):
        path = root / stain / "train/00000_train_0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(patch(seed, 32, 64), "png"))
    build(options(root, tmp_path / "out", he_size=16))
    ((_, images),) = samples_of(tmp_path / "out")
    assert header(images["hes"], "hes")[1:] == (16, 16) and verify(tmp_path / "out") == []


def test_a_size_beyond_the_images_is_refused(built, tmp_path):
    out = tmp_path / "out"
    build(options(built[0], tmp_path / "native", he_size=32))
    with pytest.raises(DataError, match="00000_train_0.png: is 32 x 32 pixels, smaller than --he-size 33: use"):
        build(options(built[0], out, he_size=33))
    with pytest.raises(ConfigError, match="--he-size 33: is larger than --tile 32: use at most 32, or larger tiles"):
        options(built[0], out, he_size=33, tile=32)
    with pytest.raises(ConfigError, match="he_size: -1 should be a whole number"):
        options(built[0], out, he_size=-1)
    assert not out.exists()


def with_hes(content):
    """A change of the first sample's small H&E."""
    return lambda members: [members[0], (members[1][0], content), *members[2:]]


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_hes(encode(patch(1, 16, 12), "jpg")), "row 0, 00000_train_0, hes: is jpg of 12 x 16 pixels, but 16 x 16"),
        (with_hes(encode(patch(1, 32), "jpg")), "hes: is jpg of 32 x 32 pixels, but 16 x 16 is stated"),
        (with_hes(encode(patch(1, 16, 16), "png")), "hes: is no jpg image"),
        (with_hes(encode(patch(1, 16, 16), "jpg")[:-20]), "hes: is truncated or broken"),
        (lambda m: [m[0], m[2], m[1], *m[3:]], "names b'00000_train_0.he.jpg', not 00000_train_0.hes.jpg"),
    ],
)
def test_verify_finds_a_wrong_one_even_where_all_digests_agree(out, change, reason):
    rewrite(out, change, columns=4)
    problems = verify(out)
    assert len(problems) >= 1 and reason in problems[0]


def test_one_that_cannot_be_decoded_is_a_bad_sample_by_its_name(out):
    rewrite(out, with_hes(encode(patch(1, 16, 16), "jpg")[:-20]), columns=4)
    reader = Reader(ShardFolder.open(out).shards, ("he",), 16)
    with pytest.raises(DataError, match=r"train-000000\.tar, row 0, 00000_train_0, hes: is truncated or broken"):
        reader.read(0)
    sample = reader.read(0, skip=True)
    assert "00000_train_0, hes: is truncated" in sample.error and not reader.read(1).error


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m["options"].update(he_size=None), "field he_size is None, but extensions.hes is jpg"),
        (lambda m: m["extensions"].update(hes=None), "field he_size is 16, but extensions.hes is None"),
        (lambda m: m["options"].update(he_size=0), "'options.he_size'"),
        (lambda m: m["extensions"].update(hes="png"), "'extensions.hes'"),
        (lambda m: m["options"].update(tile=8, image="png"), "field options or layout is malformed (--he-size 16: is"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(out, change, reason):
    remanifest(out, change)
    assert reason in verify(out)[0]


def test_a_flipped_bit_in_it_is_found(out):
    shard = ShardFolder.open(out).shards[1]
    entry = shard.index()[2, 1]
    with shard.path.open("r+b") as file:
        file.seek(int(entry["offset"]) + 20)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    assert any("row 2, " in problem and "hes: its crc32 is not" in problem for problem in verify(out))


def test_real_patches_keep_their_picture(real_data, tmp_path):
    build(options(real_data / "bci-native", tmp_path / "out", he_size=256, mpp=0.46))
    samples = [images for _, images in samples_of(tmp_path / "out")]
    small = [decode(images["hes"], "hes").astype(int) for images in samples]
    shrunk = [decode(images["he"], "he", 256).astype(int) for images in samples]
    # Of one patch 2.2 levels were measured, of two patches 29.
    assert all(np.abs(a - b).mean() < 3 for a, b in zip(small, shrunk, strict=True))
    assert np.abs(small[0] - shrunk[1]).mean() > 15
