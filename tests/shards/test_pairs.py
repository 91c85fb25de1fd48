import csv
import itertools
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.shards.archive import read_sample
from lgd.shards.builder import build
from lgd.shards.candidate import safe_key
from lgd.shards.image import encode
from lgd.shards.options import ShardOptions
from lgd.shards.pairs import PatchPair, Source, find_pairs, leave_out_duplicates
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\xff\xd8\xff")


def both(root, *names):
    touch(root, *(f"{stain}/{name}" for name in names for stain in ("HE", "IHC")))


def test_bci_names_give_split_and_level(tmp_path):
    both(tmp_path, "train/00002_train_3+.png", "train/00000_train_0.png", "test/00001_test_1+.png")
    touch(tmp_path, "HE/train/Thumbs.db", "HE/train/._00000_train_0.png")
    (tmp_path / "HE" / "notes.txt").write_text("no image")
    pairs, problems = find_pairs("bci", tmp_path, HER2)
    assert problems == []
    told = [(p.key, p.label, p.split, p.slide, p.group, p.names[0], p.mpp) for p in pairs]
    assert told == [
        ("00000_train_0", 0, "train", None, "00000_train_0", "HE/train/00000_train_0.png", None),
        ("00001_test_1+", 1, "test", None, "00001_test_1+", "HE/test/00001_test_1+.png", None),
        ("00002_train_3+", 3, "train", None, "00002_train_3+", "HE/train/00002_train_3+.png", None),
    ]
    assert pairs[0].ihc == tmp_path / "IHC/train/00000_train_0.png"


def test_bci_pairs_by_stem_whatever_the_suffix(tmp_path):
    touch(tmp_path, "HE/train/a_2+.jpg", "IHC/train/a_2+.png")
    pairs, problems = find_pairs("bci", tmp_path, HER2)
    assert [pair.ihc.name for pair in pairs] == ["a_2+.png"] and problems == []


SUFFIXES = "png PNG jpg jpeg jpe jfif JFIF webp tif tiff bmp jp2 j2k".split()


def test_images_are_found_in_any_depth_and_under_any_name(tmp_path, caplog):
    both(tmp_path, *(f"train/s1/deep/{number}_1+.{suffix}" for number, suffix in enumerate(SUFFIXES)))
    both(tmp_path, "train/s2/none_2+", "train/s2/2.5_2+", "train/s2/odd_2+.dat", "test/s1/0_1+.png")
    names = (
        "HE/train/.ipynb_checkpoints/a-checkpoint.png HE/train/.a.png IHC/train/thumbs/b.png preview.png runs/a/b.jpg"
    )
    touch(tmp_path, *names.split(), "HE/train/._s1.png", "IHC/train/@eaDir/a_1+.png", "HE/train/Thumbs.db")
    (tmp_path / "HE" / "train" / "notes.txt").write_text("no image")
    (tmp_path / "HE" / "train" / "round").symlink_to(tmp_path / "HE")
    pairs, problems = find_pairs("bci", tmp_path, HER2)
    assert problems == [] and {pair.key for pair in pairs} == {
        *(f"s1_deep_{number}_1+" for number in range(len(SUFFIXES))),
        *("s2_none_2+", "s2_2_5_2+", "s2_odd_2+", "s1_0_1+"),
    }
    assert all(pair.names[0].replace("HE/", "IHC/", 1) == pair.names[1] for pair in pairs)
    assert [text.partition(", such as ")[::2] for text in caplog.messages] == [
        (
            "images left out, hidden or thumbnails: 3",
            "HE/train/.a.png, HE/train/.ipynb_checkpoints/a-checkpoint.png, IHC/train/thumbs/b.png",
        ),
        ("images left out, in none of HE, IHC: 2", "preview.png, runs/a/b.jpg"),
    ]


@pytest.mark.parametrize(
    "make, name, reason",
    [
        (lambda r: touch(r, "HE/train/a_1+.png"), "HE/train/a_1+.png", "has no partner a_1+ in IHC/train"),
        (lambda r: touch(r, "IHC/train/a_1+.png"), "IHC/train/a_1+.png", "has no partner a_1+ in HE/train"),
        (lambda r: both(r, "train/a_4+.png"), "HE/train/a_4+.png", "level '4+'"),
        (lambda r: both(r, "train/a.png"), "HE/train/a.png", "level 'a'"),
        (lambda r: touch(r, "HE/train/a_1+.png/x"), "HE/train/a_1+.png/x", "has no partner x in IHC/train/a_1+.png"),
        (lambda r: touch(r, "IHC/train/s/a_1+"), "IHC/train/s/a_1+", "has no partner a_1+ in HE/train/s"),
        (lambda r: touch(r, "HE/train/s/t/a.JP2"), "HE/train/s/t/a.JP2", "has no partner a in IHC/train/s/t"),
        (lambda r: (r / "HE/train/a_1+.tif").symlink_to("gone"), "HE/train/a_1+.tif", "has no partner a_1+ in IHC"),
        (lambda r: both(r, "train/s/a_1+.png", "train/s_a_1+.png"), "HE/train/s/a_1+.png", "has the key s_a_1+ of"),
        (lambda r: both(r, "train/a_1+.png", "test/a_1+.png"), "HE/test/a_1+.png", "has the key a_1+ of"),
        (lambda r: both(r, "train/a_1+.png", "train/a_1+.jpg"), "HE/train/a_1+.jpg", "ambiguous"),
        (lambda r: both(r, "train/a.b_1+.png", "train/a_b_1+.png"), "HE/train/a.b_1+.png", "has the key a_b_1+ of"),
        (lambda r: both(r, f"train/{'a' * 80}_1+.png"), f"HE/train/{'a' * 80}_1+.png", "83 characters"),
        (lambda r: both(r, "a_1+.png"), "HE/a_1+.png", "outside a split"),
        (lambda r: both(r, "train/a\x1b[2J_1+.png"), r"HE/train/a\x1b[2J_1+.png", "cannot be printed"),
        (lambda r: both(r, "train/a\udcff_1+.png"), r"HE/train/a\udcff_1+.png", "cannot be printed"),
    ],
)
def test_what_cannot_be_paired_is_named(tmp_path, make, name, reason):
    both(tmp_path, "train/good_2+.png")
    make(tmp_path)
    pairs, problems = find_pairs("bci", tmp_path, HER2)
    assert [pair.key for pair in pairs] == ["good_2+"]
    assert name in [problem.name for problem in problems]
    assert all(problem.reason for problem in problems)
    assert reason in next(problem.reason for problem in problems if problem.name == name)


def test_the_problems_of_a_csv_are_in_the_order_of_its_rows(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("he,ihc\n" + "".join(f"/abs/{number}.png,a.png\n" for number in range(12)))
    _, problems = find_pairs("csv", table, HER2)
    assert [problem.name for problem in problems] == [f"pairs.csv row {row}" for row in range(2, 14)]


def test_dots_in_a_stem_become_underscores(tmp_path):
    both(tmp_path, "train/x.y z_1+.png")
    pairs, problems = find_pairs("bci", tmp_path, HER2)
    assert [pair.key for pair in pairs] == ["x_y_z_1+"] and problems == []
    assert safe_key("a/b.c") == "a_b_c"


def test_mist_names_give_the_slide(tmp_path):
    names = "trainA/100M2004069_10_9.jpg trainB/100M2004069_10_9.jpg valA/200N_1_2.jpg valB/200N_1_2.jpg"
    touch(tmp_path, *names.split(), "trainA/odd.jpg", "trainB/odd.jpg", "trainA/b2/7_0_1", "trainB/b2/7_0_1")
    pairs, problems = find_pairs("mist", tmp_path, HER2)
    assert problems == []
    told = {p.key: (p.slide, p.group, p.split, p.label, p.he.parent.name) for p in pairs}
    assert told == {
        "100M2004069_10_9": ("100M2004069", "100M2004069", "train", None, "trainA"),
        "200N_1_2": ("200N", "200N", "test", None, "valA"),
        "odd": (None, "odd", "train", None, "trainA"),
        "b2_7_0_1": ("7", "7", "train", None, "b2"),
    }


HER2 = find_target("her2")
CSV = "he,ihc,key,level,slide,split,mpp\n"


def test_csv_columns(tmp_path):
    touch(tmp_path, "h/a.png", "i/a.png", "h/b.png", "i/b.png")
    text = CSV + "h/a.png,i/a.png,,2+,S1,train,0.46\nh/b.png, i/b.png ,second,,,,\n"
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8-sig")
    for root in (tmp_path, tmp_path / "pairs.csv"):
        pairs, problems = find_pairs("csv", root, HER2)
        assert problems == []
        told = [(p.key, p.label, p.slide, p.group, p.split, p.mpp, *p.names) for p in pairs]
        assert told == [
            ("a", 2, "S1", "S1", "train", 0.46, "h/a.png", "i/a.png"),
            ("second", None, None, "second", None, None, "h/b.png", "i/b.png"),
        ]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("gone.png,a.png,,,,,", "he gone.png is missing"),
        (",a.png,,,,,", "he is ''"),
        ("a.png,/a.png,,,,,", "relative to the CSV"),
        ("a.png,folder.png,,,,,", "is a folder"),
        ("a.png,a.png,x.y,,,,", "key is 'x.y'"),
        ("a.png,a.png,,4,,,", "level is '4'"),
        ("../C:\\a.png,a.png,,,,,", "he ../C:/a.png is missing"),
        ("C:\\data\\a.png,a.png,,,,,", "he is 'C:\\\\data\\\\a.png': give the path relative to the CSV"),
        ("\\\\server\\a.png,a.png,,,,,", "give the path relative to the CSV"),
        ("~/a.png,a.png,,,,,", "he is '~/a.png': give the path relative to the CSV"),
        ("file:///a.png,a.png,,,,,", "give the path relative to the CSV"),
        ("a.png,a.png,,,,,-1", "mpp is '-1'"),
        ("a.png,a.png,,,,,nan", "mpp is 'nan'"),
    ],
)
def test_csv_rows_that_cannot_be_used(tmp_path, row, reason):
    touch(tmp_path, "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "pairs.csv").write_text(f"{CSV}{row}\n")
    pairs, problems = find_pairs("csv", tmp_path, HER2)
    assert pairs == [] and len(problems) == 1
    assert problems[0].name == "pairs.csv row 2" and reason in problems[0].reason


PLAIN = "he,ihc,level,slide,mpp,x\nh/a.png,i/a.png,1+,S1,0.46,1234.5\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", ";").replace(".46", ",46").replace("4.5", "4,5").encode(),
        PLAIN.replace("he,ihc,level", "HE, Ihc ,LEVEL").encode(),
        PLAIN.replace("h/a", "h\\a").replace("i/a", "i\\a").encode(),
        PLAIN.replace("x\n", "x,remark\n").replace("5\n", '5,"so, so"\n').encode(),
        PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r").encode(),
        ("sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n")).encode("utf-8-sig"),
        ('"sep=,"\n' + PLAIN).encode("utf-16"),
        ("\n" + PLAIN.replace("\nh/", "\n\n,,,,,\n ,\t,,,,\nh/") + ",,,,,\n\n").encode(),
        PLAIN.replace("\n", ",,\n").encode(),
        PLAIN.replace("5\n", "5,\n").encode(),
        PLAIN.replace(",", " , ").replace("i/a.png ", '"i/a.png"').encode(),
        PLAIN.replace("he,", '"he",').replace("1+", "1.0").encode(),
        PLAIN.replace(",", ";").replace("x\n", 'x;"a,b,c,d,\nremark,"\n').replace("5\n", '5;"1\n2"\n').encode(),
        PLAIN.replace("he,", ",he,").replace("h/", "0,h/").encode(),
    ],
    ids=[
        *("utf-8-sig", "utf-16", "utf-16-be", "crlf", "tabs", "semicolons", "capitals", "backslashes", "remark"),
        *("utf-16-unmarked", "utf-16-be-unmarked", "cr", "sep", "sep-quoted", "empty-rows", "trailing", "trailing-row"),
        *("spaces", "quotes", "lines-in-quotes", "numbered"),
    ],
)
def test_a_csv_as_spreadsheets_write_it(tmp_path, caplog, content):
    touch(tmp_path, "h/a.png", "i/a.png")
    (tmp_path / "pairs.csv").write_bytes(content)
    (pair,), problems = find_pairs("csv", tmp_path, HER2)
    assert problems == [] and (pair.names, pair.label, pair.slide) == (("h/a.png", "i/a.png"), 1, "S1")
    assert (pair.mpp, pair.origin.x) == (0.46, 1234.5)
    unread = re.search("remark|column 1", caplog.text)
    assert (unread is not None) == (b"remark" in content or content.startswith(b",he")) == bool(caplog.messages)
    assert all("pairs.csv: not read, for lgd does not know such columns: " in text for text in caplog.messages)


@pytest.mark.parametrize("form", ["{0}/h/a.png", "~/h/a.png", "h/../h//a.png"])
def test_an_image_below_the_csv_may_be_named_in_full(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "h/a.png")
    (tmp_path / "pairs.csv").write_text(f"he\n{form.format(tmp_path)}\n")
    (pair,), problems = find_pairs("csv", tmp_path, HER2)
    assert problems == [] and Path(pair.names[0]).parts in (("h", "a.png"), ("h", "..", "h", "a.png"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("TRAIN", "train"), ("Training", "train"), ("val", "val"), ("Valid", "val")),
        *(("VALIDATION", "val"), ("dev", "val"), ("Test", "test"), ("testing", "test"), ("tst", None)),
        *(("my set", None), ("trainB", None), ("holdout", None)),
    ],
)
@pytest.mark.parametrize("layout", ["bci", "csv"])
def test_other_names_of_splits_are_read_or_refused(tmp_path, layout, name, split):
    names = [f"{stain}/{name}/a_1+.png" for stain in ("HE", "IHC")]
    for number, one in enumerate(names):
        (tmp_path / one).parent.mkdir(parents=True)
        (tmp_path / one).write_bytes(encode(np.full((8, 8, 3), number, np.uint8), "png"))
    (tmp_path / "pairs.csv").write_text(f"he,ihc,split\n{','.join(names)},{name}\n")
    options = ShardOptions(layout=layout, root=str(tmp_path), out=str(tmp_path / "out"), on_bad="skip")
    if split is None:
        # Before any image is read, unless they may be skipped.
        for asked in (options, replace(options, on_bad="stop")):
            with pytest.raises(DataError, match=rf"^--split keep: HE/.*\.png is of the split '{name}': call it train"):
                build(asked)
        options = replace(options, split="group:0,0,1")
        split = "test"
    assert [*build(options)[0].splits] == [split]


def test_a_thousand_is_no_fraction(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "pairs.csv").write_text("he;x\na.png;1,234\n")
    pairs, (problem,) = find_pairs("csv", tmp_path, HER2)
    assert pairs == [] and problem.name == "pairs.csv row 2" and "field 'x': should be a valid number" in problem.reason


def test_a_file_whose_name_has_a_backslash_is_found(tmp_path):
    touch(tmp_path, "h\\a.png")
    (tmp_path / "pairs.csv").write_text("he\nh\\a.png\n")
    assert find_pairs("csv", tmp_path, HER2)[0][0].names == ("h\\a.png",)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "no column he"),
        (b"ihc;key\na;b\n", "no column he"),
        (b"he,ihc,lvel\na,b,1\n", "column lvel is unknown, and nearly level: rename it to that, or remove it"),
        (b"he,ihc,labels\na,b,1\n", "column labels is unknown, and nearly label:"),
        (b"he,HE\na,b\n", "column he is there more than once"),
        (b"he,ihc\na\n", "row 2 has not 2 values"),
        (b"he,ihc\na,b,c\n", "row 2 has not 2 values"),
        (b"he,ihc\n\xff\xfe,b\n", "cannot be read"),
        (b"he,ihc\n", "holds no pairs"),
    ],
)
def test_broken_csv(tmp_path, content, reason):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        find_pairs("csv", path, HER2)
    assert str(path) in str(raised.value)


def test_slides_name_the_groups(tmp_path):
    both(tmp_path, "train/a_1+.png", "train/b_1+.png", "train/c_1+.png")
    slides = tmp_path / "slides.csv"
    slides.write_text("truth,key,slide\n1,a_1+,S1\n2,b_1+,S2\n3,c_1+,\n4,unused,S9\n")
    pairs, problems = find_pairs("bci", tmp_path, HER2, slides)
    assert [(pair.key, pair.slide, pair.group) for pair in pairs] == [("a_1+", "S1", "S1"), ("b_1+", "S2", "S2")]
    assert [(problem.key, "no slide" in problem.reason) for problem in problems] == [("c_1+", True)]
    slides.write_text("key,slide\na_1+,S1\na_1+,S2\n")
    with pytest.raises(DataError, match="row 3: slide S2 of a_1"):
        find_pairs("bci", tmp_path, HER2, slides)
    with pytest.raises(DataError, match="cannot be read"):
        find_pairs("bci", tmp_path, HER2, tmp_path / "none.csv")


@pytest.mark.parametrize("layout", ["bci", "mist", "csv"])
def test_a_root_that_is_not_there_or_empty(tmp_path, layout):
    with pytest.raises(DataError, match="does not exist: give --root"):
        find_pairs(layout, tmp_path / "nowhere", HER2)
    for name in ("HE", "IHC"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.csv").write_text(CSV)
    with pytest.raises(DataError, match="holds no pairs"):
        find_pairs(layout, tmp_path, HER2)


def test_a_root_of_another_kind(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no folder"):
        find_pairs("bci", tmp_path / "file", HER2)
    with pytest.raises(DataError, match="has no folder HE"):
        find_pairs("bci", tmp_path, HER2)
    with pytest.raises(DataError, match="pairs.csv: cannot be read"):
        find_pairs("csv", tmp_path, HER2)
    both(tmp_path, "train/a_1+.png")
    touch(tmp_path, ".synth-begun")
    with pytest.raises(DataError, match="holds virtual tissue that is not complete: run the same lgd synth again"):
        find_pairs("bci", tmp_path, HER2)


def test_real_names(real_data):
    pairs, problems = find_pairs("bci", real_data / "bci-thumbs", HER2)
    assert problems == []
    assert [sum(pair.label == level for pair in pairs) for level in range(4)] == [1, 1, 8, 6]
    assert {pair.split for pair in pairs} == {"test"}


COLUMNS = ("key", "he", "ihc", "level", "slide", "split")


@pytest.fixture
def table(tmp_path):
    """`table(("k0", 1, 2, "0", "S1", "train"), ...)`: a CSV of pairs, and ten different images called 0 to 9."""
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encode(pixels, "png"))
        (tmp_path / f"copy{number}.png").write_bytes(encode(pixels, "png"))

    def make(*rows):
        with (tmp_path / "pairs.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows([key, f"{he}.png", f"{ihc}.png", *facts] for key, he, ihc, *facts in rows)
        return tmp_path

    return make


def build_csv(root, out, **changes):
    return build(ShardOptions(layout="csv", root=str(root), out=str(root / out), **changes))


def rejected(folder):
    with (folder / "rejected.csv").open(newline="") as stream:
        return {row["key"]: row["reason"] for row in csv.DictReader(stream)}


def keys(folder):
    found = []
    for shard in ShardFolder.open(folder).shards:
        file, index = shard.open()
        with file:
            found += [read_sample(file, index, row, shard, ())[0].key for row in range(len(index))]
    return sorted(found)


GOOD = ("good", 8, 9, "0", "", "train")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [("k", 0, 1, "2+", "", "train"), ("t", "copy0", "copy1", "2+", "", "test")],
            {
                "k": "is the H&E of k and, byte for byte, the H&E of t (copy0.png), but their split is train and",
                "t": "is the H&E of t and, byte for byte, the H&E of k (0.png), but their split is test and",
            },
        ),
        (
            [("k", 0, 1, "2+", "", "train"), ("t", 0, 2, "", "", "train")],
            {
                "k": "of t (0.png), but their label is 2+ and unknown, their IHC is not the same: keep the right pair",
                "t": "of k (0.png), but their label is unknown and 2+, their IHC is not the same: keep the right pair",
            },
        ),
        (
            [("k", 0, 1, "2+", "S1", "train"), ("t", 2, "copy1", "2+", "S2", "train")],
            {
                "k": "1.png: is the IHC of k and, byte for byte, the IHC of t (copy1.png), but their slide is S1 ",
                "t": "copy1.png: is the IHC of t and, byte for byte, the IHC of k (1.png), but their slide is S2 ",
            },
        ),
        (
            [("k", 0, "copy0", "2+", "", "train")],
            {"k": "is the H&E of k and, byte for byte, the IHC of k (copy0.png): correct the wrong one"},
        ),
        (
            [("k", 0, 1, "2+", "", "train"), ("t", "copy1", 2, "2+", "", "train")],
            {
                "k": "1.png: is the IHC of k and, byte for byte, the H&E of t (copy1.png): correct the wrong one",
                "t": "is the H&E of t and, byte for byte, the IHC of k (1.png): correct the wrong one",
            },
        ),
        (
            [("a", 0, 1, "", "", "train"), ("b", 1, 2, "", "", "train"), ("c", 2, 0, "", "", "train")],
            {"a": "the IHC of c", "b": "the IHC of a", "c": "the H&E of a"},
        ),
        (
            # Copies are no way out where a third pair says something else of the image.
            [("a", 0, 1, "", "", "train"), ("b", 0, 1, "", "", "train"), ("c", 0, 2, "", "", "train")],
            {"a": "of c (0.png)", "b": "of c (0.png)", "c": "their IHC is not the same"},
        ),
        (
            [("a", 0, 1, "0", "", "train"), ("b", "copy0", 1, "0", "", "train"), ("c", 0, 1, "0", "", "train")],
            {"b": "b is the same pair as a (0.png): remove one", "c": "c is the same pair as a (0.png): remove one"},
        ),
        (
            # The label tells more than the slide does, and the side more than the label.
            [
                *(("a", 0, 1, "0", "S1", "train"), ("b", 0, 1, "0", "S2", "train")),
                *(("c", 0, 1, "1+", "S1", "train"), ("d", 0, 1, "0", "S3", "test")),
            ],
            {"a": "their split is train and test", "d": "their split is test and train", "c": "their split is train"},
        ),
    ],
)
def test_an_image_has_one_key_and_one_stain(table, rows, told):
    root = table(GOOD, *rows)
    with pytest.raises(DataError) as caught:
        build_csv(root, "out")
    assert not (root / "out").exists() and f"{len(told) if len(rows) < 4 else 4} problems" in str(caught.value)
    manifest, _ = build_csv(root, "out", on_bad="skip")
    reasons = rejected(root / "out")
    assert manifest.sources.rejected == len(reasons)
    for key, reason in told.items():
        assert reason in reasons[key] and reason in str(caught.value)
    assert keys(root / "out") == sorted({"good", *(key for key, *_ in rows)} - reasons.keys())
    assert verify(root / "out") == []


def test_copies_on_two_published_sides_are_copies_where_the_split_is_drawn_anew(table):
    root = table(GOOD, ("k", 0, 1, "2+", "", "train"), ("t", 0, 1, "2+", "", "test"))
    build_csv(root, "out", on_bad="skip", split="group:0.8,0.1,0.1")
    assert keys(root / "out") == ["good", "k"] and list(rejected(root / "out")) == ["t"]


def test_equal_tiles_of_different_patches_are_no_duplicates(tmp_path):
    """Empty glass is white, tile by tile."""
    for number in range(2):
        pixels = np.full((16, 8, 3), 255, np.uint8)
        pixels[8:] = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
        (tmp_path / f"he{number}.png").write_bytes(encode(pixels, "png"))
        (tmp_path / f"ihc{number}.png").write_bytes(encode(255 - pixels, "png"))
    (tmp_path / "pairs.csv").write_text("he,ihc,split\nhe0.png,ihc0.png,train\nhe1.png,ihc1.png,test\n")
    build_csv(tmp_path, "out", tile=8)
    assert len(keys(tmp_path / "out")) == 4 and verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["7", "007", "8", "7.0"], r"'007' \(k1\) and '7' \(k0\) and '7.0' \(k3\)"),
        (["S 1", "s1", "S10", "S2"], r"'S 1' \(k0\) and 's1' \(k1\)"),
        (["M\u00fcller", "Mu\u0308ller", "Muller", "x"], r"'Mu\\u0308ller' \(k1\) and 'M\\xfcller' \(k0\)"),
        (["A", "\uff21", "B", "C"], r"'A' \(k0\) and '\uff21' \(k1\)"),
    ],
)
@pytest.mark.parametrize("way", ["column", "slides"])
def test_slides_that_differ_by_spelling_are_refused(table, names, told, way):
    rows = [(f"k{number}", 2 * number, 2 * number + 1, "0", name, "") for number, name in enumerate(names)]
    root = table(*(rows if way == "column" else [(*row[:4], "", "") for row in rows]))
    (root / "slides.csv").write_text("key,slide\n" + "".join(f"{row[0]},{row[4]}\n" for row in rows))
    given = {"slides": str(root / "slides.csv")} if way == "slides" else {}
    where = f"{root}{'/slides.csv' if given else ''}"
    with pytest.raises(DataError, match=rf"^a slide is written in .* in {where}, column slide, .*:\n  {told}$"):
        build_csv(root, "out", split="group:0.5,0.2,0.3", on_bad="skip", **given)
    assert not (root / "out").exists()


def make_mist(root, *names):
    """Pairs called so in MIST's layout."""
    dice = np.random.default_rng(0)
    for name, folder in itertools.product(names, ("A", "B")):
        split, _, stem = name.partition("/")
        (root / f"{split}{folder}").mkdir(parents=True, exist_ok=True)
        content = encode(dice.integers(0, 256, (8, 8, 3), np.uint8), "jpg")
        (root / f"{split}{folder}" / f"{stem}.jpg").write_bytes(content)
    return root


def test_the_slides_of_mist_are_compared_too(tmp_path):
    root = make_mist(tmp_path, "train/S-7_0_0", "train/s-07_0_1", "val/S-8_0_0")
    with pytest.raises(DataError, match=r"(?s)write it in one way in a CSV with .*--slides.*'S-7' .* and 's-07'"):
        build(ShardOptions(layout="mist", root=str(root), out=str(tmp_path / "out")))


@pytest.mark.parametrize("document", ["docs/shards.md", "configs/mist.yaml"])
def test_mist_as_published_is_built_by_the_documented_command(tmp_path, document):
    """Its patches of one slide lie in train and val."""
    root = Path(__file__).resolve().parents[2]
    command = re.search(r"build-shards --layout mist .*--split (\S+) --mpp ([0-9.]+)\n", (root / document).read_text())
    slides = [f"100M20040{number:02d}" for number in range(60)]
    root = make_mist(
        tmp_path / "mist",
        *(f"{part}/{slide}_{n}_3" for slide in slides for n, part in enumerate(("train", "train", "val"))),
    )
    asked = ShardOptions(layout="mist", root=str(root), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"--split keep puts 60 slides on two sides.*use --split group:0\.8,0\.1,0\.1"):
        build(asked)
    manifest, _ = build(replace(asked, split=command[1], mpp=float(command[2])))
    assert {name: part.samples % 3 for name, part in manifest.splits.items()} == {"train": 0, "val": 0, "test": 0}
    assert verify(tmp_path / "out") == [] and not manifest.may_leak


def source(number, he, ihc, label=None, split=None, slide=None):
    pair = PatchPair(
        stem=f"k{number}",
        key=f"k{number}",
        he=None,
        ihc=None,
        names=(f"{he}-{number}", f"{ihc}-{number}"),
        label=label,
        slide=slide,
        split=split,
        mpp=None,
    )
    shape = {"width": 8, "height": 8, "extensions": ("png", "png"), "icc": (None, None)}
    return Source(pair=pair, sha256=(str(he), str(ihc)), **shape)


pairs = st.lists(
    st.tuples(
        *(st.integers(0, 6), st.integers(3, 9), st.sampled_from([0, 1]), st.sampled_from(["train", "test"])),
        st.sampled_from([None, "S"]),
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(pairs, st.sampled_from(["keep", "group:0.8,0.1,0.1"]))
def test_what_stays_shares_nothing_and_what_goes_did(drawn, rule):
    sources = [source(number, *fields) for number, fields in enumerate(drawn)]
    kept, problems = leave_out_duplicates(sources, rule == "keep", HER2)
    stay = {one.pair.key for one in kept}
    assert stay | {problem.key for problem in problems} == {one.pair.key for one in sources}
    assert len(stay) + len(problems) == len(sources) and [one for one in sources if one.pair.key in stay] == kept
    images = [digest for one in kept for digest in one.sha256]
    assert len(images) == len(set(images))
    fact = (lambda f: (*f[:3], f[4])) if rule.startswith("group") else (lambda f: f)
    for number, fields in enumerate(drawn):
        others = [other for place, other in enumerate(drawn) if place != number and {*other[:2]} & {*fields[:2]}]
        agree = all(fact(other) == fact(fields) for other in others) and fields[0] != fields[1]
        first = not any({*other[:2]} & {*fields[:2]} for other in drawn[:number])
        assert (f"k{number}" in stay) == (agree and first)


def test_many_pairs_that_share_one_image_are_compared_in_time():
    many = [source(number, f"h{number}", "blank", label=number % 4, split="train") for number in range(20_000)]
    many += [source(number, f"h{number}", f"c{number}") for number in range(20_000, 40_000)]
    began = time.process_time()
    kept, problems = leave_out_duplicates(many, True, HER2)
    assert len(kept) == len(problems) == 20_000
    # A second; were every two compared, it would take minutes.
    assert time.process_time() - began < 20
