import csv
import hashlib
import itertools
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from containers import tiff, with_exif, with_segments
from PIL import Image, ImageCms

from lgd.base.errors import ConfigError, DataError
from lgd.io.digests import digest_of
from lgd.shards.archive import INDEX, read_sample, tiled
from lgd.shards.builder import build
from lgd.shards.image import decode, encode
from lgd.shards.manifest import Manifest, Origin
from lgd.shards.options import ShardJob, ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify

LEVELS = ("0", "1+", "2+", "3+")


def patch(seed, height=32, width=32):
    """A patch that is unlike every other seed's; its colours change slowly, as a JPEG likes it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.kron(small, np.ones((height // 4, width // 4, 1), np.uint8))


def make_bci(root, pairs=10, kind="jpg", side=32):
    """The BCI layout: `.png` names whatever the content, as BCI itself has them."""
    for number in range(pairs):
        split = "test" if number % 5 == 4 else "train"
        name = f"{number:05d}_{split}_{LEVELS[number % 4]}.png"
        for offset, stain in enumerate(("HE", "IHC")):
            path = root / stain / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(patch(2 * number + offset, side, side), kind))
    return root


def options(root, out, **changes):
    return ShardOptions(layout="bci", root=str(root), out=str(out), **{"shard_size": 3, "workers": 0, **changes})


def samples_of(folder):
    """Every sample as the offset index gives it: [(shard name, meta, he bytes, ihc bytes)]."""
    read = []
    for shard in ShardFolder.open(folder).shards:
        index = shard.index()
        content = shard.path.read_bytes()
        for row in index.tolist():
            json_, he, ihc = (content[offset : offset + length] for offset, length, _ in row)
            read.append((shard.name, json.loads(json_), he, ihc))
    return read


def build_by(map_jobs, asked):
    """Build with jobs that are mapped otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgd.shards.builder.map_jobs", lambda function, jobs, workers, name: map_jobs(function, jobs))
        return build(asked)


def kill_after_two(function, jobs):
    """As `map_jobs`, for a builder that is interrupted when two shards are written."""
    if not isinstance(jobs[0], ShardJob):
        yield from map(function, jobs)
        return
    for job in jobs[:2]:
        yield function(job)
    raise KeyboardInterrupt


def lose_workers(function, jobs):
    """As `map_jobs`, for workers of which each had begun a shard when it was killed; others do them."""
    for job in jobs:
        if isinstance(job, ShardJob):
            job.path.with_name(f".{job.path.name}.node-7-1a2b.tmp").write_bytes(b"half")
        yield function(job)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source folder, its shards and their manifest; tests do not change them."""
    folder = tmp_path_factory.mktemp("built")
    root = make_bci(folder / "bci")
    return root, folder / "out", build(options(root, folder / "out", mpp=0.46))[0]


def test_the_set_holds_the_original_bytes_and_facts(built):
    root, out, manifest = built
    assert Manifest.read(out / "manifest.json") == manifest
    assert [shard.name for shard in ShardFolder.open(out).shards] == [
        "train-000000",
        "train-000001",
        "train-000002",
        "test-000000",
    ]
    told = {name: (part.samples, part.labels) for name, part in manifest.splits.items()}
    assert told == {
        "train": (8, {"0": 2, "1+": 2, "2+": 2, "3+": 2, "unknown": 0}),
        "test": (2, {"0": 1, "1+": 1, "2+": 0, "3+": 0, "unknown": 0}),
    }
    samples = samples_of(out)
    keys = [meta["key"] for name, meta, _, _ in samples if name.startswith("train")]
    assert keys == sorted(keys) and len(samples) == 10
    for _, meta, he, ihc in samples:
        assert he == (root / meta["source"]).read_bytes()
        assert ihc == (root / meta["source"].replace("HE/", "IHC/")).read_bytes()
    digests = [hashlib.sha256(content).hexdigest() for content in samples[0][2:]]
    assert samples[0][1] == {
        **dict.fromkeys(Origin.model_fields),
        "key": "00000_train_0",
        "label": 0,
        "slide": None,
        "group": "00000_train_0",
        "split": "train",
        "source": "HE/train/00000_train_0.png",
        "width": 32,
        "height": 32,
        "mpp": 0.46,
        "icc": {"he": None, "ihc": None},
        "sha256": {"he": digests[0], "ihc": digests[1]},
    }
    assert manifest.extensions.by_role() == {"json": "json", "he": "jpg", "ihc": "jpg"}
    assert manifest.may_leak is True and "10 of 10 samples are unknown" in manifest.caveats[0]
    assert verify(out) == []


def test_plain_webdataset_reads_the_same_pairs(built):
    _, out, _ = built
    for shard in ShardFolder.open(out).shards:
        mine = [entry for entry in samples_of(out) if entry[0] == shard.name]
        theirs = list(webdataset.WebDataset(str(shard.path), shardshuffle=False))
        assert len(theirs) == len(mine) == shard.samples
        for sample, (_, meta, he, ihc) in zip(theirs, mine, strict=True):
            assert sample["__key__"] == meta["key"] and json.loads(sample["json"]) == meta
            assert (sample["he.jpg"], sample["ihc.jpg"]) == (he, ihc)


def test_the_index_is_a_plain_npy(built):
    shard = ShardFolder.open(built[1]).shards[0]
    with shard.path.with_suffix(".idx").open("rb") as stream:
        index = np.load(stream, allow_pickle=False)
    assert index.dtype == INDEX and index.shape == (3, 3) and shard.roles == ("json", "he", "ihc")
    assert (index == shard.index()).all()
    # A student's read ends before the IHC begins.
    assert (index["offset"][:, 2] >= index["offset"][:, 1] + index["length"][:, 1]).all()


def test_bytes_do_not_depend_on_the_place_or_the_workers(built, tmp_path):
    root, out, manifest = built
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)

    def backwards_in_threads(function, jobs):
        with ThreadPoolExecutor(3) as pool:
            yield from pool.map(function, list(jobs)[::-1])

    again = build_by(backwards_in_threads, options(moved, tmp_path / "out", mpp=0.46, workers=3))
    assert again == (manifest, True) and contents(tmp_path / "out") == contents(out)
    assert str(tmp_path) not in json.dumps(again[0].document())


def test_the_same_set_is_reused_and_another_refused(built):
    root, out, manifest = built
    before = contents(out)
    assert build(options(root, out, mpp=0.46)) == (manifest, False)
    with pytest.raises(DataError, match=r"another shard set \(other options\)"):
        build(options(root, out))
    assert contents(out) == before


@pytest.mark.faults
def test_a_killed_build_goes_on(built, tmp_path):
    root, whole, manifest = built
    out = tmp_path / "out"

    with pytest.raises(KeyboardInterrupt):
        build_by(kill_after_two, options(root, out, mpp=0.46))
    with pytest.raises(DataError, match="no finished shard set"):
        ShardFolder.open(out)
    (out / ".train-000002.tar.123.tmp").write_bytes(b"half")
    damaged = bytearray((out / "train-000001.tar").read_bytes())
    damaged[600] ^= 1
    (out / "train-000001.tar").write_bytes(damaged)
    untouched = (out / "train-000000.tar").stat().st_mtime_ns
    with pytest.raises(DataError, match="unfinished build of something else"):
        build(options(root, out, mpp=0.5))
    assert build(options(root, out, mpp=0.46)) == (manifest, True)
    assert contents(out) == contents(whole)
    assert (out / "train-000000.tar").stat().st_mtime_ns == untouched


def test_what_killed_workers_had_begun_is_removed(built, tmp_path):
    root, whole, manifest = built
    assert build_by(lose_workers, options(root, tmp_path, mpp=0.46)) == (manifest, True)
    assert contents(tmp_path) == contents(whole)


def test_what_workers_had_begun_when_another_failed_is_removed(built, tmp_path):
    def fail(function, jobs):
        yield from itertools.islice(lose_workers(function, jobs), 2)
        if isinstance(jobs[0], ShardJob):
            raise DataError("no space is left")

    with pytest.raises(DataError, match="no space is left"):
        build_by(fail, options(built[0], tmp_path, mpp=0.46))
    assert not [*tmp_path.glob("*.tmp")] and len([*tmp_path.glob("*.tar")]) == 2


@pytest.mark.parametrize("name", ["holiday.jpg", "train-000000.tar", "README.md"])
def test_a_folder_of_something_else_is_left_alone(built, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=f"already holds something else .{name}"):
        build(options(built[0], tmp_path))
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(DataError, match="is no folder"):
        build(options(built[0], tmp_path / name))


def test_what_systems_leave_in_a_folder_is_nobody_s(built, tmp_path):
    root = built[0]
    for name in (".DS_Store", "._train-000000.tar", ".nfs0001", "Thumbs.db"):
        (tmp_path / name).touch()
    assert build(options(root, tmp_path))[1] and not build(options(root, tmp_path))[1]
    assert verify(tmp_path) == [] and len([*tmp_path.iterdir()]) == len([*built[1].iterdir()]) + 4


BAD = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "is empty": lambda path: path.write_bytes(b""),
    "is no JPEG, PNG, WebP, TIFF, BMP or JPEG 2000": lambda path: path.write_text("a text file called .png"),
    "has no partner": lambda path: path.unlink(),
    "has no partner 00": lambda path: (path.unlink(), path.mkdir()),
    "is 32 x 32 pixels but its IHC": lambda path: path.write_bytes(encode(patch(1, 32, 36), "jpg")),
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_bad_pairs_stop_the_build_or_are_listed(tmp_path, reason, on_bad):
    root, out = make_bci(tmp_path / "bci", 5), tmp_path / "out"
    BAD[reason](root / "IHC/train/00002_train_2+.png")
    (root / "HE/train/00001_train_1+.png").rename(root / "HE/train/00001_train_9+.png")
    (root / "IHC/train/00001_train_1+.png").rename(root / "IHC/train/00001_train_9+.png")
    if on_bad == "stop":
        with pytest.raises(DataError) as raised:
            build(options(root, out))
        text = str(raised.value)
        assert "2 problems" in text and reason in text and "00002_train_2+" in text and "level '9+'" in text
        assert not out.exists()
        return
    manifest, _ = build(options(root, out, on_bad="skip"))
    assert manifest.splits["train"].samples == 2 and (manifest.sources.pairs, manifest.sources.rejected) == (3, 2)
    rows = list(csv.DictReader((out / "rejected.csv").open(newline="")))
    assert len(rows) == 2 and any(reason in row["reason"] for row in rows)
    assert "HE/train/00001_train_9+.png" in [row["he"] for row in rows]
    assert verify(out) == []


def test_no_good_pair_at_all(tmp_path):
    root = make_bci(tmp_path / "bci", 2)
    for path in root.glob("HE/*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no pair is left"):
        build(options(root, tmp_path / "out", on_bad="skip"))


def test_mixed_types_need_re_encoding(tmp_path):
    root = make_bci(tmp_path / "bci", 4)
    (root / "HE/train/00003_train_3+.png").write_bytes(encode(patch(6), "png"))
    with pytest.raises(DataError, match="00000_train_0.png holds jpg and .*00003_train_3.*png.*--image png"):
        build(options(root, tmp_path / "out"))
    for image, extension in (("png", "png"), ("jpeg:90", "jpg")):
        out = tmp_path / extension
        assert build(options(root, out, image=image))[0].extensions.he == extension
        assert verify(out) == []
        samples = samples_of(out)
        assert (np.abs(decode(samples[3][2], "a").astype(int) - patch(6)).max() == 0) == (image == "png")


def turned(content, orientation):
    return with_exif(content, tiff((0x0112, 3, 1, orientation)))


@pytest.fixture
def photographed(tmp_path):
    """Three pairs of 32 x 64 pixels, one in its EXIF's way: its H&E turned to the right, its IHC upside down."""
    root = make_bci(tmp_path / "bci", 3, "png")
    he, ihc = (root / stain / "train/00001_train_1+.png" for stain in ("HE", "IHC"))
    he.write_bytes(turned(encode(np.rot90(patch(50, 32, 64)), "jpg"), 6))
    ihc.write_bytes(turned(encode(patch(51, 32, 64)[::-1, ::-1], "jpg"), 3))
    return root


def test_an_exif_orientation_is_refused_where_the_bytes_are_kept(photographed, tmp_path):
    remedy = (
        "HE/train/00001_train_1.*png: has EXIF orientation 6: viewers turn or mirror it, .*"
        "use --image png or --image jpeg:95, which turn them"
    )
    with pytest.raises(DataError, match=remedy):
        build(options(photographed, tmp_path / "out"))
    build(options(photographed, tmp_path / "out", on_bad="skip"))
    assert len(samples_of(tmp_path / "out")) == 2
    (photographed / "HE/train/00001_train_1+.png").write_bytes(encode(patch(50, 32, 64), "jpg"))
    with pytest.raises(DataError, match="IHC/train/00001_train_1.*png: has EXIF orientation 3: "):
        build(options(photographed, tmp_path / "again"))


@pytest.mark.parametrize("image", ["png", "jpeg:95"])
def test_an_exif_orientation_is_applied_where_images_are_encoded_anew(photographed, tmp_path, image):
    build(options(photographed, tmp_path / "out", image=image))
    assert verify(tmp_path / "out") == []
    _, meta, he, ihc = samples_of(tmp_path / "out")[1]
    assert (meta["width"], meta["height"]) == (64, 32)
    for content, seed in ((he, 50), (ihc, 51)):
        assert b"Exif" not in content
        assert np.abs(decode(content, "a").astype(int) - patch(seed, 32, 64)).mean() < 8


def test_tiles_are_cut_from_upright_patches(photographed, tmp_path):
    build(options(photographed, tmp_path / "out", tile=32))
    tiles = [decode(he, "a") for _, meta, he, _ in samples_of(tmp_path / "out") if meta["key"].startswith("00001")]
    assert len(tiles) == 2
    assert np.abs(np.hstack(tiles).astype(int) - patch(50, 32, 64)).mean() < 8


def test_a_pair_must_show_the_same_field_once_upright(photographed, tmp_path):
    ihc = photographed / "IHC/train/00001_train_1+.png"
    ihc.write_bytes(turned(ihc.read_bytes(), 8))
    with pytest.raises(DataError, match="HE/.*00001.* is 64 x 32 pixels but its IHC .* is 32 x 64: register"):
        build(options(photographed, tmp_path / "out", image="png"))


def test_colour_profiles_are_recorded(tmp_path):
    root = make_bci(tmp_path / "bci", 2)
    path = root / "IHC/train/00001_train_1+.png"
    path.write_bytes(with_segments(path.read_bytes(), (b"\xe2", b"ICC_PROFILE\0\1\1a profile")))
    for image in ("keep", "png"):
        build(options(root, tmp_path / image, image=image))
        first, second = (meta for _, meta, _, _ in samples_of(tmp_path / image))
        assert first["icc"] == {"he": None, "ihc": None}
        assert second["icc"] == {"he": None, "ihc": hashlib.sha256(b"a profile").hexdigest()}


def test_tiles_are_cut_without_loss_and_share_a_group(tmp_path):
    root, out = make_bci(tmp_path / "bci", 3, side=80), tmp_path / "out"
    manifest, _ = build(options(root, out, tile=32, split="group:0.5,0.2,0.3", shard_size=5))
    samples = samples_of(out)
    assert len(samples) == 3 * 4 and manifest.extensions.ihc == "png" and verify(out) == []
    for _, meta, he, _ in samples:
        key, y, x = meta["key"].rsplit("_", 2)
        row, column = int(y[1:]), int(x[1:])
        whole = decode((root / meta["source"]).read_bytes(), "a")
        cut = whole[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert (decode(he, "a") == cut).all() and (meta["width"], meta["group"]) == (32, key)
    sides = {(meta["group"], meta["split"]) for _, meta, _, _ in samples}
    assert len(sides) == 3
    with pytest.raises(DataError, match="80 x 80 pixels, smaller than --tile 96"):
        build(options(root, tmp_path / "big", tile=96))


def test_slides_decide_leakage(tmp_path):
    root = make_bci(tmp_path / "bci", 10)
    keys = sorted(path.stem for path in root.glob("HE/*/*"))
    slides = tmp_path / "slides.csv"

    def name_slides(slide_of):
        slides.write_text("key,slide\n" + "".join(f"{key},{slide_of(key)}\n" for key in keys))

    name_slides(lambda key: f"S{int(key[:5]) // 5}")
    with pytest.raises(DataError, match="2 slides on two sides, such as S0 in test and train: use --split group"):
        build(options(root, tmp_path / "out", slides=str(slides)))
    shared, _ = build(options(root, tmp_path / "out", slides=str(slides), split="group:0.5,0,0.5"))
    assert shared.may_leak is False and verify(tmp_path / "out") == []
    name_slides(lambda key: key.split("_")[1])
    clean, _ = build(options(root, tmp_path / "clean", slides=str(slides)))
    assert clean.may_leak is False and clean.caveats == ()


def test_an_empty_split_is_said(tmp_path):
    root = make_bci(tmp_path / "bci", 2)
    manifest, _ = build(options(root, tmp_path / "out", split="group:0.98,0.01,0.01"))
    assert set(manifest.splits) == {"train"}
    assert [said[:19] for said in manifest.caveats[1:]] == ["The split val is em", "The split test is e"]


def test_keep_needs_a_published_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encode(patch(ord(name)), "png"))
    (tmp_path / "pairs.csv").write_text("he,ihc\na.png,b.png\n")
    asked = {"layout": "csv", "root": str(tmp_path), "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="--split keep: a.png has no published split"):
        build(ShardOptions(**asked))
    assert build(ShardOptions(**asked, split="group:0,0,1"))[0].splits["test"].labels["unknown"] == 1
    (tmp_path / "pairs.csv").write_text("he,ihc,split\na.png,b.png,val\n")
    with pytest.raises(ConfigError, match="published val"):
        build(ShardOptions(**asked, split="keep:0.1"))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"shard_size": 0},
            {"tile": -1},
            {"workers": -1},
            {"image": "gif"},
            {"image": "jpeg:0"},
            {"image": "jpeg:101"},
        ),
        *({"mpp": 0.0}, {"mpp": float("nan")}, {"split": "random"}),
    ],
)
def test_bad_options_name_themselves(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"^(--)?{name}:? "):
        options("r", "o", **change)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda out: (out / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda out: (out / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda out: (out / "manifest.json").write_text('{"format": "x/1"}'), "field format"),
        (
            lambda out: (out / "manifest.json").write_text('{"format": "lgd-shards/1"}'),
            "reads format 2 only",
        ),
        (lambda out: (out / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda out: (out / "test-000000.idx").unlink(), "test-000000.idx is missing"),
        (lambda out: os.truncate(out / "train-000001.tar", 1000), "has 1000 bytes, but the manifest says"),
    ],
)
def test_an_incomplete_set_is_refused(built, tmp_path, spoil, reason):
    out = tmp_path / "out"
    shutil.copytree(built[1], out)
    spoil(out)
    with pytest.raises(DataError, match=reason):
        ShardFolder.open(out)
    assert any(reason in problem for problem in verify(out))


def test_a_manifest_does_not_lead_out_of_its_folder(built, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built[1], out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../train-000000.tar"
    manifest["digest"] = digest_of({name: value for name, value in manifest.items() if name != "digest"})
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="field file is '../train-000000.tar' instead of train-000000.tar"):
        ShardFolder.open(out)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04"])
@pytest.mark.faults
def test_a_broken_index_is_refused(built, tmp_path, content):
    shutil.copytree(built[1], tmp_path / "out")
    (tmp_path / "out/train-000000.idx").write_bytes(content)
    with pytest.raises(DataError, match="train-000000.idx"):
        ShardFolder.open(tmp_path / "out").shards[0].index()


@pytest.mark.faults
def test_every_flipped_bit_in_a_member_is_found(built, tmp_path):
    shard = ShardFolder.open(built[1]).shards[0]
    whole, index = shard.path.read_bytes(), shard.index()
    dice = random.Random(0)
    for trial in range(60):
        row, role = dice.randrange(3), dice.randrange(3)
        entry = index[row, role]
        damaged = bytearray(whole)
        damaged[entry["offset"] + dice.randrange(entry["length"])] ^= 1 << dice.randrange(8)
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(damaged)
        with path.open("rb") as stream, pytest.raises(DataError, match=f"row {row}, .*{shard.roles[role]}: its crc32"):
            read_sample(stream, index, row, shard, shard.roles)
    for field, value in (("offset", 2**63 + 5), ("offset", len(whole)), ("length", len(whole) + 1)):
        forged = index.copy()
        forged[0, 0][field] = value
        assert "the index places it at byte" in tiled(forged, shard.roles, len(whole))[1]


def test_real_native_patches_cut_into_tiles(real_data, tmp_path):
    asked = {"root": str(real_data / "bci-native"), "out": str(tmp_path / "out"), "tile": 256, "mpp": 0.46}
    manifest, _ = build(ShardOptions(layout="bci", **asked))
    assert manifest.splits["test"].labels == {"0": 0, "1+": 16, "2+": 16, "3+": 0, "unknown": 0}
    assert verify(tmp_path / "out") == []
    meta, he = next((meta, he) for _, meta, he, _ in samples_of(tmp_path / "out") if meta["key"].endswith("_y1_x0"))
    whole = decode((real_data / "bci-native" / meta["source"]).read_bytes(), "a")
    assert (decode(he, "a") == whole[256:512, :256]).all()


def test_real_thumbs_split_by_group(real_data, tmp_path):
    out = tmp_path / "out"
    asked = options(real_data / "bci-thumbs", out, split="group:0.5,0.25,0.25", shard_size=4)
    manifest, _ = build(asked)
    assert sum(part.samples for part in manifest.splits.values()) == 16 and manifest.may_leak
    # The names end in .png; the content is what counts.
    assert all(decode(he, "a").shape == (168, 168, 3) for _, _, he, _ in samples_of(out))
    assert verify(out) == []


def test_real_unlabelled_stains_by_csv(real_data, tmp_path):
    shutil.copytree(real_data / "mist-multistain", tmp_path / "data")
    names = ("ER", "HER2", "Ki67", "PR")
    rows = "".join(f"HE/{name}.png,IHC/{name}.png,train\n" for name in names)
    (tmp_path / "data/pairs.csv").write_text("he,ihc,split\n" + rows)
    out = tmp_path / "out"
    manifest, _ = build(ShardOptions(layout="csv", root=str(tmp_path / "data"), out=str(out)))
    assert manifest.splits["train"].labels["unknown"] == 4
    assert [meta["key"] for _, meta, _, _ in samples_of(out)] == sorted(names) and verify(out) == []


def test_real_unregistered_pairs_are_refused(real_data, tmp_path):
    shutil.copytree(real_data / "birl-unregistered", tmp_path / "data")
    names = "Izd2-29-041-w35_HE.jpg,Izd2-29-041-w35_proSPC.jpg\nRat-Kidney_HE.jpg,Rat-Kidney_PanCytokeratin.jpg\n"
    (tmp_path / "data/pairs.csv").write_text("he,ihc\n" + names)
    with pytest.raises(DataError) as raised:
        build(ShardOptions(layout="csv", root=str(tmp_path / "data"), out=str(tmp_path / "out")))
    for name in names.replace("\n", ",").split(",")[:4]:
        assert name in str(raised.value)
    assert "register the two" in str(raised.value)


@pytest.mark.parametrize("form, suffix", [("TIFF", "tif"), ("BMP", "bmp"), ("JPEG2000", "jp2")])
def test_files_that_shards_do_not_hold_are_stored_as_png(tmp_path, caplog, form, suffix):
    """Without loss; the set is that of --image png, and built again it is the same."""
    root = make_bci(tmp_path / "bci", 5, "png")
    for path in sorted(root.rglob("*.png"))[:-1]:
        with Image.open(path) as image:
            image.save(path, form)
    manifest, _ = build(options(root, tmp_path / "out"))
    assert caplog.messages == [
        f"5 of 5 pairs are files that shards do not hold ({suffix}), so that all images are stored as PNG, "
        "without loss, as by --image png"
    ]
    assert manifest.options.image == "png" and manifest.extensions.he == "png"
    for _, meta, he, ihc in samples_of(tmp_path / "out"):
        number = int(meta["key"].partition("_")[0])
        assert (decode(he, "he") == patch(2 * number)).all() and (decode(ihc, "ihc") == patch(2 * number + 1)).all()
    assert not build(options(root, tmp_path / "out"))[1] and not build(options(root, tmp_path / "out", image="png"))[1]
    assert verify(tmp_path / "out") == []


def test_mixed_colour_profiles_are_noted_by_stain(tmp_path, caplog):
    root = make_bci(tmp_path / "bci", 5, "png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for path in sorted((root / "HE").rglob("*.png"))[:2] + sorted((root / "IHC").rglob("*.png")):
        with Image.open(path) as image:
            image.save(path, icc_profile=profile)
    build(options(root, tmp_path / "out"))
    (note,) = caplog.messages
    assert note.startswith("5 H&E images carry different colour profiles, 3 none, 2 'sRGB built-in': their colours")
