import pytest

from lgd.base.errors import DataError
from lgd.shards.layouts import safe_key
from lgd.shards.pairs import find_pairs


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def both(root, *names):
    touch(root, *(f"{stain}/{name}" for name in names for stain in ("HE", "IHC")))


def test_bci_names_give_split_and_level(tmp_path):
    both(tmp_path, "train/00002_train_3+.png", "train/00000_train_0.png", "test/00001_test_1+.png")
    touch(tmp_path, "HE/train/Thumbs.db", "HE/train/._00000_train_0.png", "HE/notes.txt")
    pairs, problems = find_pairs("bci", tmp_path)
    assert problems == []
    told = [(p.key, p.label, p.split, p.slide, p.group, p.source, p.mpp) for p in pairs]
    assert told == [
        ("00000_train_0", 0, "train", None, "00000_train_0", "HE/train/00000_train_0.png", None),
        ("00001_test_1+", 1, "test", None, "00001_test_1+", "HE/test/00001_test_1+.png", None),
        ("00002_train_3+", 3, "train", None, "00002_train_3+", "HE/train/00002_train_3+.png", None),
    ]
    assert pairs[0].ihc == tmp_path / "IHC/train/00000_train_0.png"


def test_bci_pairs_by_stem_whatever_the_suffix(tmp_path):
    touch(tmp_path, "HE/train/a_2+.jpg", "IHC/train/a_2+.png")
    pairs, problems = find_pairs("bci", tmp_path)
    assert [pair.ihc.name for pair in pairs] == ["a_2+.png"] and problems == []


@pytest.mark.parametrize(
    "make, name, reason",
    [
        (lambda r: touch(r, "HE/train/a_1+.png"), "HE/train/a_1+.png", "has no partner a_1+ in IHC/train"),
        (lambda r: touch(r, "IHC/train/a_1+.png"), "IHC/train/a_1+.png", "has no partner a_1+ in HE/train"),
        (lambda r: both(r, "train/a_4+.png"), "HE/train/a_4+.png", "level '4+'"),
        (lambda r: both(r, "train/a.png"), "HE/train/a.png", "level 'a'"),
        (lambda r: (r / "HE/train/a_1+.png").mkdir(parents=True), "HE/train/a_1+.png", "is a folder"),
        (lambda r: (r / "IHC/train/a_1+.png").mkdir(parents=True), "IHC/train/a_1+.png", "is a folder"),
        (lambda r: both(r, "train/a_1+.png", "test/a_1+.png"), "HE/test/a_1+.png", "has the key a_1+ of"),
        (lambda r: both(r, "train/a_1+.png", "train/a_1+.jpg"), "HE/train/a_1+.jpg", "ambiguous"),
        (lambda r: both(r, "train/a.b_1+.png", "train/a_b_1+.png"), "HE/train/a.b_1+.png", "has the key a_b_1+ of"),
        (lambda r: both(r, f"train/{'a' * 80}_1+.png"), f"HE/train/{'a' * 80}_1+.png", "83 characters"),
        (lambda r: both(r, "a_1+.png"), "HE/a_1+.png", "outside a split"),
        (lambda r: both(r, "my set/a_1+.png"), "HE/my set", "plain word"),
        (lambda r: both(r, "train/a\x1b[2J_1+.png"), r"HE/train/a\x1b[2J_1+.png", "cannot be printed"),
        (lambda r: both(r, "train/a\udcff_1+.png"), r"HE/train/a\udcff_1+.png", "cannot be printed"),
    ],
)
def test_what_cannot_be_paired_is_named(tmp_path, make, name, reason):
    both(tmp_path, "train/good_2+.png")
    make(tmp_path)
    pairs, problems = find_pairs("bci", tmp_path)
    assert [pair.key for pair in pairs] == ["good_2+"]
    assert name in [problem.name for problem in problems]
    assert all(problem.reason for problem in problems)
    assert reason in next(problem.reason for problem in problems if problem.name == name)


def test_the_problems_of_a_csv_are_in_the_order_of_its_rows(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("he,ihc\n" + "".join(f"/abs/{number}.png,a.png\n" for number in range(12)))
    _, problems = find_pairs("csv", table)
    assert [problem.name for problem in problems] == [f"pairs.csv row {row}" for row in range(2, 14)]


def test_dots_in_a_stem_become_underscores(tmp_path):
    both(tmp_path, "train/x.y z_1+.png")
    pairs, problems = find_pairs("bci", tmp_path)
    assert [pair.key for pair in pairs] == ["x_y_z_1+"] and problems == []
    assert safe_key("a/b.c") == "a_b_c"


def test_mist_names_give_the_slide(tmp_path):
    names = "trainA/100M2004069_10_9.jpg trainB/100M2004069_10_9.jpg valA/200N_1_2.jpg valB/200N_1_2.jpg"
    touch(tmp_path, *names.split(), "trainA/odd.jpg", "trainB/odd.jpg")
    pairs, problems = find_pairs("mist", tmp_path)
    assert problems == []
    told = {p.key: (p.slide, p.group, p.split, p.label, p.he.parent.name) for p in pairs}
    assert told == {
        "100M2004069_10_9": ("100M2004069", "100M2004069", "train", None, "trainA"),
        "200N_1_2": ("200N", "200N", "test", None, "valA"),
        "odd": (None, "odd", "train", None, "trainA"),
    }


CSV = "he,ihc,key,level,slide,split,mpp\n"


def test_csv_columns(tmp_path):
    touch(tmp_path, "h/a.png", "i/a.png", "h/b.png", "i/b.png")
    text = CSV + "h/a.png,i/a.png,,2+,S1,train,0.46\nh/b.png, i/b.png ,second,,,,\n"
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8-sig")
    for root in (tmp_path, tmp_path / "pairs.csv"):
        pairs, problems = find_pairs("csv", root)
        assert problems == []
        told = [(p.key, p.label, p.slide, p.group, p.split, p.mpp, p.source, p.ihc_source) for p in pairs]
        assert told == [
            ("a", 2, "S1", "S1", "train", 0.46, "h/a.png", "i/a.png"),
            ("second", None, None, "second", None, None, "h/b.png", "i/b.png"),
        ]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("gone.png,a.png,,,,,", "he gone.png is missing"),
        ("a.png,,,,,,", "ihc is ''"),
        ("a.png,/a.png,,,,,", "relative to the CSV"),
        ("a.png,folder.png,,,,,", "is a folder"),
        ("a.png,a.png,x.y,,,,", "key is 'x.y'"),
        ("a.png,a.png,,4,,,", "level is '4'"),
        ("a.png,a.png,,,,my split,", "split is 'my split'"),
        ("a.png,a.png,,,,,-1", "mpp is '-1'"),
        ("a.png,a.png,,,,,nan", "mpp is 'nan'"),
    ],
)
def test_csv_rows_that_cannot_be_used(tmp_path, row, reason):
    touch(tmp_path, "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "pairs.csv").write_text(f"{CSV}{row}\n")
    pairs, problems = find_pairs("csv", tmp_path)
    assert pairs == [] and len(problems) == 1
    assert problems[0].name == "pairs.csv row 2" and reason in problems[0].reason


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "no column he, ihc"),
        (b"he;ihc\na;b\n", "no column he, ihc"),
        (b"he,ihc,lvel\na,b,1\n", "column lvel is unknown"),
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
        find_pairs("csv", path)
    assert str(path) in str(raised.value)


def test_slides_name_the_groups(tmp_path):
    both(tmp_path, "train/a_1+.png", "train/b_1+.png", "train/c_1+.png")
    slides = tmp_path / "slides.csv"
    slides.write_text("truth,key,slide\n1,a_1+,S1\n2,b_1+,S2\n3,c_1+,\n4,unused,S9\n")
    pairs, problems = find_pairs("bci", tmp_path, slides)
    assert [(pair.key, pair.slide, pair.group) for pair in pairs] == [("a_1+", "S1", "S1"), ("b_1+", "S2", "S2")]
    assert [(problem.key, "no slide" in problem.reason) for problem in problems] == [("c_1+", True)]
    slides.write_text("key,slide\na_1+,S1\na_1+,S2\n")
    with pytest.raises(DataError, match="row 3: slide S2 of a_1"):
        find_pairs("bci", tmp_path, slides)
    with pytest.raises(DataError, match="cannot be read"):
        find_pairs("bci", tmp_path, tmp_path / "none.csv")


@pytest.mark.parametrize("layout", ["bci", "mist", "csv"])
def test_a_root_that_is_not_there_or_empty(tmp_path, layout):
    with pytest.raises(DataError, match="does not exist: give --root"):
        find_pairs(layout, tmp_path / "nowhere")
    for name in ("HE", "IHC"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.csv").write_text(CSV)
    with pytest.raises(DataError, match="holds no pairs"):
        find_pairs(layout, tmp_path)


def test_a_root_of_another_kind(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no folder"):
        find_pairs("bci", tmp_path / "file")
    with pytest.raises(DataError, match="has no folder HE"):
        find_pairs("bci", tmp_path)
    with pytest.raises(DataError, match="pairs.csv: cannot be read"):
        find_pairs("csv", tmp_path)


def test_real_names(real_data):
    pairs, problems = find_pairs("bci", real_data / "bci-thumbs")
    assert problems == []
    assert [sum(pair.label == level for pair in pairs) for level in range(4)] == [1, 1, 8, 6]
    assert {pair.split for pair in pairs} == {"test"}
