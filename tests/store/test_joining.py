"""Patches and rows of features, joined by key or by place, whatever their order."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.store.features import FeatureFile, Tiles
from lgd.store.joining import Patches, join, match_places

STEP = 100.0
cells = st.tuples(st.integers(0, 12), st.integers(0, 12))
grids = st.lists(cells, min_size=1, max_size=40, unique=True)


def slide_file(place_n2, name="S1.h5", side=STEP, step=STEP, in_um=False):
    place_n2 = np.array(place_n2, np.float64).reshape(-1, 2)
    return FeatureFile(
        path=Path(name),
        layout="stamp" if in_um else "trident",
        sha256="0" * 64,
        rows=len(place_n2),
        dim=4,
        tiles=Tiles(place_n2, side, step, in_um),
    )


def table(keys, name="features.npz"):
    return FeatureFile(
        path=Path(name), layout="table", sha256="0" * 64, rows=len(keys), dim=4, key_n=np.array(keys, "S")
    )


def patches_at(place_n2, slides="S1", side=STEP, mpp=np.nan, keys=None):
    place_n2 = np.array(place_n2, np.float64).reshape(-1, 2)
    count = len(place_n2)
    return Patches(
        keys=keys or [f"p{number}" for number in range(count)],
        slides=[slides] * count if isinstance(slides, str | None) else slides,
        place_n2=place_n2,
        side_n=np.full(count, side),
        mpp_n=np.full(count, mpp),
    )


@given(grids, st.randoms(use_true_random=False), st.integers(-49, 49), st.integers(-49, 49))
def test_each_patch_finds_its_tile_whatever_the_order(tiles, dice, dx, dy):
    """Also where all are moved by less than half a step."""
    wanted = dice.sample(tiles, dice.randint(1, len(tiles)))
    file = slide_file(np.array(tiles) * STEP + [dx, dy])
    file_n, row_n = join(patches_at(np.array(wanted) * STEP), [file])
    assert [tiles[row] for row in row_n] == wanted and not file_n.any()


@given(grids, st.randoms(use_true_random=False), st.integers(-49, 49))
def test_a_hole_is_never_filled_by_a_neighbour(tiles, dice, shift):
    hole = dice.choice(tiles)
    left = [tile for tile in tiles if tile != hole]
    found_n = match_places(np.array(tiles) * STEP, np.array(left).reshape(-1, 2) * STEP + shift, STEP / 2)
    assert [None if found < 0 else left[found] for found in found_n] == [
        None if tile == hole else tile for tile in tiles
    ]


points = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=25, unique=True)


@given(points, points, st.integers(1, 120))
def test_matches_are_one_to_one_and_the_nearest_of_each_other(patches, tiles, reach):
    patch_n2, tile_m2 = np.array(patches, float), np.array(tiles, float)
    found_n = match_places(patch_n2, tile_m2, reach)
    distance_nm = np.abs(patch_n2[:, None] - tile_m2).max(axis=2)
    taken = found_n[found_n >= 0]
    assert len(set(taken.tolist())) == len(taken)
    for patch, tile in enumerate(found_n):
        nearest = distance_nm[patch].min()
        if tile >= 0:
            assert distance_nm[patch, tile] == nearest == distance_nm[:, tile].min() and nearest < reach
        elif nearest < reach:
            # Each of its nearest tiles is at least as near to another patch.
            tied = np.flatnonzero(distance_nm[patch] == nearest)
            assert any(np.delete(distance_nm[:, one], patch).min(initial=np.inf) <= nearest for one in tied)


@given(st.lists(st.text("abc0", min_size=1, max_size=6), min_size=1, max_size=30, unique=True), st.data())
def test_keys_are_joined_whatever_the_order_and_the_files(keys, data):
    order = data.draw(st.permutations(keys))
    cut = data.draw(st.integers(0, len(keys)))
    files = [table(part, name) for name, part in (("a.npz", order[:cut]), ("b.npz", order[cut:])) if part]
    wanted = data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
    file_n, row_n = join(patches_at(np.zeros((len(wanted), 2)), keys=wanted), files)
    found = [files[file].key_n[row].decode() for file, row in zip(file_n, row_n, strict=True)]
    assert found == wanted


def test_what_is_lacking_is_counted_and_named_on_both_sides():
    places = [(column * STEP, 0) for column in range(6)]
    with pytest.raises(DataError) as error:
        join(patches_at(places), [slide_file([*places[:2], (5000, 0), (6000, 0), (7000, 0)]), slide_file([], "S9.h5")])
    assert error.value.args == (
        "4 of 6 patches have no features: p2 (S1, x 200, y 0), p3 (S1, x 300, y 0), p4 (S1, x 400, y 0) and 1 more",
        "  2 patches have some; of 5 rows of 2 files 3 are of no patch, and all of S9.h5",
        "name the features of all patches of data.shards, or build shards of those that have some",
    )
    with pytest.raises(DataError, match="1 of 2 patches have no features: b\n  1 patches have some; of 2 rows of 1"):
        join(patches_at(np.zeros((2, 2)), None, keys=["a", "b"]), [table(["x", "a"])])


@pytest.mark.parametrize(
    ("slide", "file"),
    [
        ("S1", "S1.h5"),
        ("scans/S1.svs", "S1.h5"),
        ("S1.ome.tif", "S1.ome.h5"),
        ("S1.ome.tiff", "S1.h5"),
        ("s-01.ndpi", "S-1.h5"),
        ("a.b", "a.b.h5"),
    ],
)
def test_a_slide_s_file_is_found_by_its_name(slide, file):
    assert join(patches_at([(0, 0)], slide), [slide_file([(0, 0)], "T.h5"), slide_file([(3, 0)], file)]).file_n == [1]


def test_places_in_micrometres_are_taken_by_the_slide_s_scale():
    """STAMP: tiles of 256 um; level 0 has 0.25 um/px, so that they are 1,024 px wide."""
    tiles = np.array([(column * 256.0, row * 256.0) for row in range(3) for column in range(4)])
    file = slide_file(tiles[::-1], side=256.0, step=256.0, in_um=True)
    patches = patches_at(tiles * 4 + 30, side=1024, mpp=0.25)
    assert join(patches, [file]).row_n.tolist() == list(range(11, -1, -1))
    unknown = patches_at(tiles * 4 + 30, side=1024)
    with pytest.raises(DataError, match="S1.h5 has places in micrometres, .* do not state the scale .* --slide-mpp X"):
        join(unknown, [file])
    assert join(unknown, [file], slide_mpp=0.25).row_n.tolist() == list(range(11, -1, -1))
    with pytest.raises(DataError, match="S1.h5 of tiles of 512 px, patches of 1024: compute features of tiles of that"):
        join(unknown, [file], slide_mpp=0.5)


def test_tiles_that_overlap_are_matched_within_half_a_step():
    """By half: the neighbours lie at 50 px, and a patch that is 30 px away from all is none of theirs."""
    file = slide_file([(column * 50, 0) for column in range(9)], step=50)
    assert join(patches_at([(110, 0), (310, 20)]), [file]).row_n.tolist() == [2, 6]
    with pytest.raises(DataError, match="1 of 2 patches have no features: p1"):
        join(patches_at([(110, 0), (310, 30)]), [file])


@pytest.mark.parametrize(
    ("patches", "files", "message"),
    [
        (
            patches_at([(0, 0)], None),
            [slide_file([(0, 0)])],
            "1 of 1 patches have no place on the slide of their second",
        ),
        (
            patches_at([(0, np.nan)]),
            [slide_file([(0, 0)])],
            r"no place .*\(p0\).* a CSV with ihc_slide, ihc_x, ihc_y and",
        ),
        (
            patches_at([(0, 0)]),
            [slide_file([(0, 0), (9, 9), (0, 0)])],
            "S1.h5 has 1 places twice, the first at x 0, y 0",
        ),
        (patches_at([(0, 0)]), [slide_file([(0, 0)], f) for f in ("20x/S1.h5", "10x/S1.h5")], "are both of slide S1"),
        (patches_at([(0, 0)]), [slide_file([(0, 0)], side=200)], "S1.h5 of tiles of 200 px, patches of 100"),
        (patches_at([(0, 0)] * 2), [slide_file([(0, 0)])], "1 of 2 patches have no features"),
        (
            patches_at([(0, 0)] * 2, keys=["a", "a"]),
            [table(["a"])],
            r"1 keys are in several folders of data.shards \(a\)",
        ),
        (
            patches_at([(0, 0)], keys=["a"]),
            [table(["a"]), table(["b", "a"], "b.npz")],
            r"a \(features.npz, b.npz\): keep",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused_in_words(patches, files, message):
    with pytest.raises(DataError, match=message):
        join(patches, files)
