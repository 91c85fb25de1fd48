"""Two slides become pairs of patches: which, of what pixels, where they lie, and what is left out."""

import csv
import shutil

import numpy as np
import pytest
from drawn_slides import write_ome
from foreign import write_stamp, write_trident
from sections import MPP, draw_section, write_rows, write_sections
from test_builder import build_by, contents, kill_after_two, lose_workers, samples_of

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.shards.builder import build
from lgd.shards.image import decode
from lgd.shards.options import ShardOptions
from lgd.shards.verify import verify
from lgd.slides.slide import open_slide
from lgd.store.store import Store
from lgd.tissue.pyramid import write_pyramid

TILE, MOVED = 128, 76


def options(root, out, **changes):
    asked = {"tile": TILE, "mpp": MPP, "split": "group:1,0,0", "shard_size": 4, **changes}
    return ShardOptions(layout="slides", root=str(root), out=str(out), **asked)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A registered pair of slides, and one whose IHC is 35 um off."""
    folder = tmp_path_factory.mktemp("slides")
    rows = [
        write_sections(folder, "a", 1) | {"label": "1+", "center": "north", "marker": "HER2"},
        write_sections(folder, "moved", 3, shift=(MOVED, 0)),
    ]
    write_rows(folder / "slides.csv", rows)
    return folder


@pytest.fixture(scope="module")
def built(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    return out, build(options(drawn, out))[0]


def test_pairs_are_squares_of_both_slides(drawn, built):
    out, manifest = built
    samples = samples_of(out)
    assert manifest.layout == "slides" and not manifest.may_leak and 8 < len(samples) < 15
    for _, meta, *images in samples:
        assert meta["group"] == meta["slide"] == "a" and meta["mpp"] == MPP and meta["alignment"] >= 2
        assert (meta["label"], meta["center"], meta["marker"]) == (1, "north", "HER2")
        assert meta["key"] == f"a_y{meta['y']:g}_x{meta['x']:g}"
        assert meta["ihc_slide"] == "a-ihc.tif" and meta["side"] == meta["ihc_side"] == TILE
        assert (meta["ihc_x"], meta["ihc_y"]) == (meta["x"], meta["y"])
        for stain, image in zip(("he", "ihc"), images, strict=True):
            with open_slide(drawn / f"a-{stain}.tif") as slide:
                expected = slide.read(int(meta["x"]), int(meta["y"]), TILE, TILE, MPP)
            assert (decode(image, "image") == expected).all()
    verify(out)


def test_what_is_misaligned_is_left_out_and_counted(drawn, built, tmp_path, caplog, capsys):
    out, manifest = built
    rows = [*csv.DictReader((out / "rejected.csv").open())]
    moved = [row for row in rows if row["he"] == "moved-he.tif"]
    assert len(rows) == manifest.sources.rejected and len(moved) > 8
    assert all("below --least-alignment 2" in row["reason"] for row in rows)
    kept = {meta["key"] for _, meta, _, _ in samples_of(out)}
    assert len(kept) == manifest.sources.pairs and not kept & {row["key"] for row in rows}
    assert len(rows) <= len(moved) + 1

    caplog.clear()
    everything = build(options(drawn, tmp_path / "all", least_alignment="none"))[0]
    assert everything.sources.rejected == 0 and everything.sources.pairs == len(kept) + len(rows)
    assert "slide moved: not registered, or not well: the median alignment" in caplog.text
    assert "slide a:" not in caplog.text

    command = ["build-shards", "--layout", "slides", "--root", str(drawn), "--tile", str(TILE), "--mpp", str(MPP)]
    assert main([*command, "--split", "group:1,0,0", "--shard-size", "4", "--out", str(out)]) == 0
    assert f"from {len(kept)} pairs, {len(rows)} left out (rejected.csv)" in capsys.readouterr().out


def test_bytes_do_not_depend_on_how_they_were_built(drawn, built, tmp_path):
    asked = options(drawn, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        build_by(kill_after_two, asked)
    assert not (tmp_path / "out" / "manifest.json").exists()
    build_by(lose_workers, asked)
    assert contents(tmp_path / "out") == contents(built[0])
    assert not build(asked)[1]


def test_a_slide_that_changes_while_shards_are_built(drawn, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(drawn, folder)

    def change(function, jobs):
        if not isinstance(jobs[0], list):
            write_pyramid(folder / "a-ihc.tif", draw_section("ihc", 9), MPP)
        return map(function, jobs)

    with pytest.raises(DataError, match="a-ihc.tif: changed while the shards were built"):
        build_by(change, options(folder, tmp_path / "out"))


ROTATION = np.deg2rad(7)


def test_a_transform_leads_to_the_same_tissue(tmp_path):
    """An IHC of another frame, scale and angle: its patches are those of the IHC in the H&E's frame."""
    row = write_sections(tmp_path, "s", 5)
    cos, sin = np.cos(ROTATION), np.sin(ROTATION)
    # H&E pixel -> IHC pixel: turned, with pixels of 0.4 um, and moved.
    scale = MPP / 0.4
    matrix = np.array([[scale * cos, -scale * sin, 120], [scale * sin, scale * cos, -40]])
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    write_pyramid(tmp_path / "turned.tif", draw_section("ihc", 5, 800, 800, matrix=inverse, frame=512), 0.4)
    np.savetxt(tmp_path / "matrix.txt", matrix)
    write_rows(tmp_path / "turned.csv", [row | {"ihc": "turned.tif", "transform": "matrix.txt"}])
    build(options(tmp_path / "turned.csv", tmp_path / "turned"))
    write_rows(tmp_path / "plain.csv", [row])
    build(options(tmp_path / "plain.csv", tmp_path / "plain"))
    plain = {meta["key"]: (meta, ihc) for _, meta, _, ihc in samples_of(tmp_path / "plain")}
    turned = samples_of(tmp_path / "turned")
    assert len(turned) >= 0.7 * len(plain)
    for _, meta, _, ihc in turned:
        there, image = plain[meta["key"]]
        one, other = (decode(content, "ihc").astype(float) for content in (ihc, image))
        inner = (slice(8, -8), slice(8, -8))
        assert np.corrcoef(one[inner].ravel(), other[inner].ravel())[0, 1] > 0.9
        centre = matrix @ [there["x"] + TILE / 2, there["y"] + TILE / 2, 1]
        found = np.array([meta["ihc_x"], meta["ihc_y"]]) + meta["ihc_side"] / 2
        assert np.abs(found - centre).max() < 0.1 and meta["ihc_side"] == pytest.approx(TILE * scale, abs=0.01)


@pytest.mark.parametrize("tool", ["trident", "stamp"])
def test_features_of_other_tools_are_imported_by_place(drawn, built, tmp_path, tool):
    """Of the IHC slides, one file each, with rows of other tiles and in another order."""
    rng, files = np.random.default_rng(0), []
    for name in ("a", "moved"):
        with open_slide(drawn / f"{name}-ihc.tif") as slide:
            grid = [(x, y) for y in range(0, slide.height, TILE) for x in range(0, slide.width, TILE)]
        coords = rng.permutation(np.array(grid))
        features = (coords / TILE + 100 * (name == "moved")).astype(np.float32)
        files.append(str(tmp_path / f"{name}-ihc.h5"))
        if tool == "trident":
            write_trident(tmp_path / f"{name}-ihc.h5", features, coords, side=TILE)
        else:
            write_stamp(tmp_path / f"{name}-ihc.h5", features, coords * MPP, side_um=TILE * MPP)
    run = {"run.dir": tmp_path / "run", "data.shards": built[0], "teacher.source": "imported", "train.workers": 0}
    assert main(["import-latents", *(f"--{name}={value}" for name, value in run.items()), *files]) == 0
    store = Store(tmp_path / "run" / "latents")
    centre, places = store.document.teachers["teacher"].centre, {}
    for _, meta, *_ in samples_of(built[0]):
        places[meta["key"]] = (meta["x"] / TILE, meta["y"] / TILE)
    keys = [key.decode() for part in store.parts for key in part.array("key")]
    rows = [row[0] + centre for part in store.parts for row in part.array("pooled").astype(float)]
    assert sorted(keys) == sorted(places)
    for key, row in zip(keys, rows, strict=True):
        assert row == pytest.approx(places[key], abs=0.02), "the features of another place"


def write_valis(folder):
    """As VALIS leaves them: OME-TIFF with levels below the first page, 1,000 um in its tags."""
    for stain in ("he", "ihc"):
        write_ome(folder / f"{stain}.ome.tiff", draw_section(stain, 6), mpp=MPP, tag=1000.0)
    return {"he": "he.ome.tiff", "ihc": "ihc.ome.tiff", "slide": "S"}


def write_deeperhistreg(folder):
    """As DeeperHistReg leaves them: a warped source without a resolution."""
    for name, stain in (("target", "he"), ("warped_source", "ihc")):
        write_pyramid(folder / f"{name}.tiff", draw_section(stain, 6), 1000.0)
    return {"he": "target.tiff", "ihc": "warped_source.tiff", "slide": "S", "mpp": str(MPP)}


@pytest.mark.parametrize("write", [write_valis, write_deeperhistreg])
def test_what_programs_that_register_leave(tmp_path, write):
    write_rows(tmp_path / "slides.csv", [write(tmp_path)])
    manifest = build(options(tmp_path, tmp_path / "out"))[0]
    assert manifest.sources.pairs > 10 and manifest.splits["train"].shapes[0].mpp == MPP
    names = {meta["ihc_slide"] for _, meta, _, _ in samples_of(tmp_path / "out")}
    assert len(names) == 1 and names <= {"ihc.ome.tiff", "warped_source.tiff"}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Slides that make no pair."""
    folder = tmp_path_factory.mktemp("odd")
    tissue = draw_section("he", 1)
    for name, pixels, mpp in (
        ("he", tissue, MPP),
        ("ihc", draw_section("ihc", 1), MPP),
        ("small", tissue[:300], MPP),
        ("finer", tissue, 0.25),
        ("coarse", tissue, 1.0),
        ("unknown", tissue, 1000.0),
        ("glass", np.full_like(tissue, 240), MPP),
        ("strips", np.where(np.indices((512, 512))[0, ..., None] % 128 < 24, tissue, 240).astype(np.uint8), MPP),
        ("other", draw_section("ihc", 8), MPP),
    ):
        write_pyramid(folder / f"{name}.tif", pixels, mpp)
    (folder / "text.svs").write_text("no slide")
    return folder


HE = {"he": "he.tif", "slide": "S"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HE | {"ihc": "none.tif"}], r"slides.csv row 2: ihc none.tif is missing: correct the path or remove the row"),
        ([HE | {"ihc": ""}], "slides.csv row 2: has no IHC: name the slide of it, or remove the row"),
        ([HE | {"ihc": "text.svs"}], "he.tif: text.svs is no slide"),
        ([HE | {"ihc": "small.tif"}], "he.tif: its H&E has 512 x 512 pixels of 0.46 um and its IHC 512 x 300 pixels"),
        ([HE | {"ihc": "finer.tif"}], "so that they have no common frame: name the slides that the registration has"),
        ([{"he": "unknown.tif", "ihc": "unknown.tif"}], "slide unknown.tif is there more than once: keep it in one"),
        ([{"he": "unknown.tif", "ihc": "ihc.tif"}], "unknown.tif: its TIFF resolution says 1000 um .* column mpp"),
        ([HE | {"ihc": "ihc.tif", "mpp": "9"}], "mpp is 9: slides have 0.1 to 2 um a pixel"),
        ([HE | {"ihc": "glass.tif"}], "he.tif: glass.tif: less than 0.1 % of it is tissue"),
        ([HE | {"ihc": "strips.tif"}], "of 1. tiles with tissue on the H&E none has it on the IHC: register the sli"),
        (
            [HE | {"ihc": "ihc.tif", "transform": "1 0 9000 0 1 0"}],
            "leads from all tissue of the H&E to places out",
        ),
        ([HE | {"ihc": "ihc.tif", "transform": "1 2 0 2 4 0"}], r"transform is singular \(1 2 0 2 4 0\)"),
        ([HE | {"ihc": "ihc.tif", "transform": "1 0 0"}], "row 2: transform is '1 0 0', which is no affine map"),
        ([HE | {"ihc": "ihc.tif", "transform": "m.txt"}], "transform 'm.txt' is no file: correct its path"),
        (
            [HE | {"ihc": "ihc.tif", "transform": "16 0 0 0 16 0"}],
            "the transform enlarges by 16, but the scales of",
        ),
        ([HE | {"ihc": "ihc.tif"}, {"he": "he.tif", "ihc": "other.tif"}], "slide he.tif is there more than once"),
        (
            [HE | {"ihc": "ihc.tif"}, {"he": "finer.tif", "ihc": "other.tif", "slide": "S"}],
            "several pairs .* called S",
        ),
        ([HE | {"ihc": "ihc.tif", "label": "7"}], "label is '7'"),
    ],
)
def test_what_makes_no_pairs_is_refused_in_words(odd, tmp_path, rows, message):
    path = write_rows(odd / "slides.csv", rows)
    with pytest.raises(DataError, match=message) as caught:
        build(options(path, tmp_path / "out"))
    assert "Traceback" not in str(caught.value) and not [*tmp_path.glob("out/*")]


def test_no_pair_above_the_bound_is_an_error_that_names_the_option(odd, tmp_path):
    path = write_rows(odd / "slides.csv", [HE | {"ihc": "ihc.tif"}])
    with pytest.raises(DataError, match=r"all 1. pairs are aligned worse than --least-alignment 900 \(median .*none"):
        build(options(path, tmp_path / "out", least_alignment=900.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 0}, "--layout slides cuts tiles: give --tile, such as 256"),
        ({"mpp": None}, "--layout slides cuts tiles of one scale: give --mpp, such as 0.46"),
        ({"mpp": "unknown"}, "give --mpp, such as 0.46"),
        ({"slides": "s.csv"}, "name each slide in the column slide of its CSV"),
        ({"least_alignment": "low"}, "least_alignment: 'low' should be a number or one of none"),
    ],
)
def test_options_that_slides_need(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, tmp_path / "out", **changes)


def test_columns_that_are_exchanged_are_noted(odd, tmp_path, caplog):
    path = write_rows(odd / "slides.csv", [{"he": "ihc.tif", "ihc": "he.tif"}])
    build(options(path, tmp_path / "out"))
    assert "looks less like an H&E than" in caplog.text and "are the columns he and ihc exchanged?" in caplog.text


def test_slides_that_are_too_coarse_to_be_measured(odd, tmp_path):
    write_pyramid(odd / "coarse-ihc.tif", draw_section("ihc", 1), 1.0)
    path = write_rows(odd / "slides.csv", [{"he": "coarse.tif", "ihc": "coarse-ihc.tif"}])
    with pytest.raises(DataError, match=r"more than 0.5 um a pixel, at which .* accept all pairs by --least-alignm"):
        build(options(path, tmp_path / "out", mpp=1.0))
    build(options(path, tmp_path / "out", mpp=1.0, least_alignment="none"))
    assert {meta["alignment"] for _, meta, _, _ in samples_of(tmp_path / "out")} == {None}
    with pytest.raises(DataError, match="coarse.tif has 1 um a pixel, too coarse for --mpp 0.46: raise it"):
        build(options(path, tmp_path / "finer"))


def test_a_slide_with_a_fault_is_left_out_where_that_is_asked(drawn, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(drawn, folder)
    content = (folder / "moved-he.tif").read_bytes()
    (folder / "moved-he.tif").write_bytes(content[: len(content) // 3])
    manifest = build(options(folder, tmp_path / "out", on_bad="skip"))[0]
    rows = [*csv.DictReader((tmp_path / "out" / "rejected.csv").open())]
    assert manifest.sources.pairs > 5 and {row["he"] for row in rows} >= {"moved-he.tif"}
