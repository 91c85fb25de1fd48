import functools
import hashlib
import http.server
import itertools
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.shards.builder import build
from lgd.shards.image import encode
from lgd.shards.manifest import File, Manifest
from lgd.shards.options import ShardOptions
from lgd.shards.repeats import find_mixed, open_disjoint
from lgd.shards.shard_set import ShardFolder


@pytest.fixture
def make(tmp_path):
    """`make("a", ("k0", 1, 2, "train", "S1"), ...)`: a shard set of pairs of images, which are called by numbers."""

    def made(name, *rows, **changes):
        (tmp_path / f"{name}-images").mkdir()
        lines = ["key,he,ihc,split,slide"]
        for key, he, ihc, split, slide in rows:
            lines.append(f'{key},{he}.png,{ihc}.png,{split},"{slide}"')
            for image in (he, ihc):
                pixels = np.random.default_rng(image).integers(0, 256, (8, 8, 3), np.uint8)
                (tmp_path / f"{name}-images" / f"{image}.png").write_bytes(encode(pixels, "png"))
        (tmp_path / f"{name}-images" / "pairs.csv").write_text("\n".join(lines) + "\n")
        options = {"shard_size": 2, **changes}
        build(ShardOptions(layout="csv", root=str(tmp_path / f"{name}-images"), out=str(tmp_path / name), **options))
        return str(tmp_path / name)

    return made


A = [("a0", 0, 1, "train", "S1"), ("a1", 2, 3, "train", "S1"), ("a2", 4, 5, "train", "S2"), ("a3", 6, 7, "test", "S3")]


def test_sets_that_share_nothing_pass_in_silence(make, caplog):
    folders = [make("a", *A), make("b", ("b0", 10, 11, "train", "S4"), ("b1", 12, 13, "val", "S10"))]
    caplog.clear()
    open_disjoint(folders)
    open_disjoint(folders[:1])
    assert not caplog.messages


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("b", 0, 21, "test", "S9"), "as the H&E of a0 (train of {a}) and the H&E of b (test of {b}): training"),
        (("b", 20, 7, "val", "S9"), "as the IHC of a3 (test of {a}) and the IHC of b (val of {b}): training"),
        (("b", 3, 21, "test", "S9"), "as the IHC of a1 (train of {a}) and the H&E of b (test of {b}): training"),
        (("b", 2, 3, "test", "S9"), "(test of {b}) (2 in all): training would see what is scored; build these sets"),
        (
            ("b", 20, 21, "test", "S2"),
            "a slide, 'S2', lies on two sides of the split, with a2 (train of {a}) and b (test",
        ),
        (("b", 20, 21, "test", " s02"), "a slide, 'S2' and 's02', lies on two sides of the split, with a2 (train of"),
        (("b", 20, 21, "train", "S3.0"), ""),
        (
            ("S2", 20, 21, "test", ""),
            "a slide, 'S2', lies on two sides of the split, with a2 (train of {a}) and S2 (test",
        ),
        (("a3", 20, 21, "train", ""), ""),
    ],
)
@pytest.mark.parametrize("image", ["keep", "jpeg:80"])
def test_an_image_or_slide_on_two_sides_is_refused(make, row, told, image):
    folders = {"a": make("a", *A), "b": make("b", ("other", 30, 31, "train", "S8"), row, image=image)}
    if not told:
        open_disjoint(list(folders.values()))
        return
    with pytest.raises(DataError) as caught:
        open_disjoint(list(folders.values()))
    assert told.format(**folders) in str(caught.value) and str(caught.value).startswith("data.shards: a")
    with pytest.raises(DataError):
        open_disjoint(list(folders.values())[::-1])


def test_patches_of_unknown_slides_are_known_by_their_keys(make):
    """One patch, encoded twice."""
    folders = [make(name, ("k", number, 9, split, "")) for name, number, split in (("a", 1, "train"), ("b", 2, "test"))]
    with pytest.raises(DataError, match="a patch of an unknown slide, 'k', lies on two sides of the split, with k "):
        open_disjoint([make("c", ("k", 3, 8, "test", "")), folders[0]])


def test_tiles_are_compared_by_what_they_were_cut_from(make):
    whole, tiles = make("a", *A), make("b", ("b", 0, 21, "test", "S9"), tile=4)
    with pytest.raises(DataError, match=r"the H&E of a0 \(train of .* and the H&E of b_y0_x0 \(test of "):
        open_disjoint([whole, tiles])


def test_what_lies_on_one_side_is_logged(make, caplog):
    folders = [make("a", *A), make("b", ("b", 0, 1, "train", "S2"), ("c", 6, 20, "test", "S7"))]
    caplog.clear()
    assert [str(one.folder) for one in open_disjoint(folders).folders] == folders
    assert caplog.messages == [
        "data.shards: its folders share, on one side of the split, images: 3 (each counts twice), slides: 1"
    ]


def test_a_set_that_is_listed_twice_is_refused(make, tmp_path):
    a, b = make("a", *A), make("b", ("b0", 10, 11, "train", "S4"))
    shutil.copytree(a, tmp_path / "copy")
    (tmp_path / "link").symlink_to(a)
    for twice in (a, f"{a}/", f"{tmp_path}/copy/../a"):
        with pytest.raises(
            DataError, match=r"^data\.shards: .* (is listed twice|holds the same set as .*a), .* remove it"
        ):
            open_disjoint([a, b, twice])
    for twice in (tmp_path / "copy", tmp_path / "link"):
        with pytest.raises(DataError, match=rf"^data\.shards: {twice} holds the same set as {a}, and each patch would"):
            open_disjoint([a, b, twice])


def test_behind_a_url_no_shard_is_read_unless_it_is_named(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    make("a", *A), make("b", ("b", 10, 11, "test", "S4")), make("c", ("b", 10, 12, "train", "S4"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in "abc"]
        open_disjoint(urls[:2])
        assert {path.rsplit("/")[-1] for path in asked} == {"manifest.json", "patches.npy"}
        with pytest.raises(
            DataError, match=rf"the H&E of b \(test of {urls[1]}\) and the H&E of b \(train of {urls[2]}\)"
        ):
            open_disjoint(urls)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_other_images_and_slides_with_the_same_64_bits_are_no_leak(make, tmp_path):
    a, b = make("a", *A), make("b", ("b", 20, 21, "test", "S9"))
    manifest = ShardFolder.read(b).manifest
    table = ShardFolder.read(tmp_path / "b").read_patches().copy()
    table[0] = ShardFolder.read(a).read_patches()[0]
    np.save(tmp_path / "b" / "patches.npy", table)
    content = (tmp_path / "b" / "patches.npy").read_bytes()
    patches = File(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    Manifest(**{name: getattr(manifest, name) for name in Manifest.model_fields} | {"patches": patches}).write(
        tmp_path / "b" / "manifest.json"
    )
    first = [ShardFolder.read(tmp_path / name).read_patches()[0] for name in "ab"]
    assert first[0] == first[1], "they look alike until the shards are read"
    open_disjoint([a, b])


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)), max_size=20)


@given(rows)
def test_sharing_is_found_as_pair_by_pair(drawn):
    table = np.array(drawn, np.int64).reshape(-1, 3)
    found_leaks, same_side = find_mixed(table[:, 0].astype(np.uint64), table[:, 1], table[:, 2])
    leaks, same = set(), set()
    for (value, folder, side), (other, elsewhere, across) in itertools.combinations(drawn, 2):
        if value == other and value and folder != elsewhere:
            (leaks if side != across else same).add(value)
    # One value may do both.
    assert {drawn[places[0]][0] for places in found_leaks} == leaks and same_side == len(same - leaks)
    for places in found_leaks:
        assert sorted(places) == [n for n, (value, _, _) in enumerate(drawn) if value == drawn[places[0]][0]]


def test_a_million_rows_are_compared_at_once():
    dice = np.random.default_rng(0)
    value_n = dice.integers(1, 2**63, 1_000_000, np.uint64)
    value_n[-2:] = value_n[:2]
    folder_n = np.arange(1_000_000) // 500_000
    began = time.process_time()
    leaks, same_side = find_mixed(value_n, folder_n, np.minimum(folder_n, np.arange(1_000_000) % 2))
    assert len(leaks) == 1 and same_side == 1
    # 0.2 s on a quiet machine.
    assert time.process_time() - began < 3
