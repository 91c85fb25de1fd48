"""Files of features of other tools: what is read of each, and what is refused."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign import write_clam, write_stamp, write_trident

from lgd.base.errors import DataError
from lgd.store.feature_layouts import open_features
from lgd.store.features import find_files

FEATURES = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
PLACES = np.stack([np.arange(50) % 10 * 512, np.arange(50) // 10 * 512], axis=1)
KEYS = [f"k{number}" for number in range(50)]


def read(file, row_n):
    row_n = np.array(row_n)
    parts = list(file.read(row_n))
    assert [part for part, _ in parts] == sorted((part for part, _ in parts), key=lambda part: part.start)
    rows = np.concatenate([block for _, block in parts])
    assert len(rows) == len(row_n)
    return rows


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_trident(tmp_path, dtype):
    write_trident(tmp_path / "S1.h5", FEATURES.astype(dtype), PLACES, overlap=64)
    file = open_features(tmp_path / "S1.h5")
    assert (file.layout, file.rows, file.dim, file.slide, file.encoder, file.version) == (
        *("trident", 50, 6, "S1", "uni_v2", None),
    )
    assert (file.tiles.side, file.tiles.step, file.tiles.in_um) == (512, 384, False)
    assert (file.tiles.place_n2 == PLACES).all()
    for rows in ([0], [49], [3, 4, 48], range(50)):
        assert (read(file, rows) == FEATURES.astype(dtype)[rows]).all()


def test_rows_of_a_large_file_are_read_by_blocks_and_one_by_one(tmp_path):
    features = np.arange(9000, dtype=np.float32)[:, None] + np.zeros(3, np.float32)
    np.savez(tmp_path / "a.npz", features=features, key=np.arange(9000).astype(str))
    write_trident(tmp_path / "a.h5", features, np.zeros((9000, 2)))
    dice = np.random.default_rng(0)
    for count in (1, 20, 600, 4000, 9000):
        row_n = np.sort(dice.choice(9000, count, replace=False))
        for name in ("a.npz", "a.h5"):
            assert (read(open_features(tmp_path / name), row_n)[:, 0] == row_n).all()


def test_a_slide_without_tiles_has_no_rows(tmp_path):
    for number, shape in enumerate([(0,), (0, 6)]):
        write_trident(tmp_path / f"S{number}.h5", np.empty(shape, np.float32), np.empty((0, 2)))
        file = open_features(tmp_path / f"S{number}.h5")
        assert (file.rows, file.dim, file.tiles.place_n2.shape) == (0, 0, (0, 2))


def test_clam(tmp_path):
    path, patches = tmp_path / "h5_files" / "S1.h5", tmp_path / "patches"
    write_clam(path, FEATURES, PLACES, patches, size=256, downsample=4.0)
    file = open_features(path, "clam", patches)
    assert (file.layout, file.tiles.side, file.tiles.step, file.encoder) == ("clam", 1024, 1024, None)
    assert (read(file, [1, 7]) == FEATURES[[1, 7]]).all()
    with pytest.raises(DataError, match="do not say how large a tile is: name the folder of its patches by --patches"):
        open_features(path, "clam")
    with pytest.raises(DataError, match="no attribute patch_size_level0, .* need --layout clam --patches DIR"):
        open_features(path)
    (patches / "S1.h5").unlink()
    with pytest.raises(DataError, match=r"patches/S1.h5 is missing, which says how large the tiles of .*S1.h5 are"):
        open_features(path, "clam", patches)


def test_stamp(tmp_path):
    write_stamp(tmp_path / "S1.h5", FEATURES, PLACES / 2)
    file = open_features(tmp_path / "S1.h5")
    assert (file.layout, file.tiles.side, file.tiles.in_um) == ("stamp", 256, True)
    assert (file.encoder, file.version) == ("uni2", "2.5.0")
    assert (read(file, [2]) == FEATURES[[2]].astype(np.float16)).all()
    for attributes in ({"unit": None}, {"unit": "px"}, {"tile_size_um": None}):
        write_stamp(tmp_path / "old.h5", FEATURES, PLACES, **attributes)
        with pytest.raises(DataError, match="old.h5 does not say that its coords are micrometres"):
            open_features(tmp_path / "old.h5")
    write_stamp(tmp_path / "slide.h5", FEATURES, PLACES, feat_type="slide")
    with pytest.raises(DataError, match="slide.h5 holds features of each slide: name the features of tiles"):
        open_features(tmp_path / "slide.h5")


def tables(folder, features=FEATURES):
    with h5py.File(folder / "fixed.h5", "w") as file:
        file["features"], file["key"] = features, np.array(KEYS, "S")
    with h5py.File(folder / "text.h5", "w") as file:
        file["features"] = features
        file.create_dataset("key", data=KEYS, dtype=h5py.string_dtype())
    np.savez(folder / "text.npz", features=features, key=KEYS)
    np.savez_compressed(folder / "bytes.npz", features=features, key=np.array(KEYS, "S"))
    lists = pa.array(features.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"key": KEYS, "features": lists, "more": KEYS}), folder / "a.parquet", row_group_size=7)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), 6)
    pq.write_table(pa.table({"key": KEYS, "features": fixed}), folder / "b.parquet")


def test_tables_by_key_of_three_formats(tmp_path):
    tables(tmp_path)
    files = find_files([tmp_path])
    assert len(files) == 6
    for path in files:
        file = open_features(path)
        assert (file.layout, file.rows, file.dim, file.key_n.tolist()) == ("table", 50, 6, [k.encode() for k in KEYS])
        assert (read(file, [0, 8, 49]) == FEATURES[[0, 8, 49]]).all(), path


def test_float64_is_held_as_float32(tmp_path):
    np.savez(tmp_path / "a.npz", features=FEATURES.astype(np.float64) * 1e300, key=KEYS)
    held = open_features(tmp_path / "a.npz").held_nD
    assert held.dtype == np.float32 and np.isinf(held).all()


def test_files_of_a_folder_are_found_in_any_depth_and_through_links(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    for name in ("root/deep/er/S2.h5", "root/S1.HDF5", "root/notes.txt", "root/.hidden.h5", "root/S3.h5", "far/S4.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "deep" / "far").symlink_to(far)
    (far / "back").symlink_to(root)
    assert [path.name for path in find_files([root, root / "S3.h5"])] == ["S1.HDF5", "S3.h5", "S2.h5", "S4.h5"]


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def damage(folder, kind):
    """A file with something wrong with it."""
    path = folder / f"{kind}.h5"
    if kind == "cut":
        write_trident(path, np.zeros((3000, 6), np.float32), np.zeros((3000, 2)))
        cut(path)
    elif kind == "text":
        path.write_text("no features")
    elif kind == "other":
        with h5py.File(path, "w") as file:
            file["coords"] = PLACES
    elif kind in ("external", "soft"):
        write_trident(folder / "else.h5", FEATURES, PLACES)
        with h5py.File(path, "w") as file:
            file["features"] = h5py.ExternalLink("else.h5", "features") if kind == "external" else h5py.SoftLink("/x")
            file["x"], file["key"] = FEATURES, np.array(KEYS, "S")
    elif kind in ("short", "line", "words"):
        shape = {"short": FEATURES[:9], "line": FEATURES[0], "words": np.full((50, 6), b"1")}[kind]
        with h5py.File(path, "w") as file:
            file["features"], file["key"] = shape, np.array(KEYS, "S")
    elif kind == "numbers":
        with h5py.File(path, "w") as file:
            file["features"], file["key"] = FEATURES, np.arange(50)
    elif kind == "places":
        write_trident(path, FEATURES, PLACES[:40])
    elif kind == "side":
        write_trident(path, FEATURES, PLACES)
        with h5py.File(path, "a") as file:
            file["coords"].attrs["patch_size_level0"] = "None"
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "cut.h5 cannot be read as HDF5 .*: it is cut short or damaged, as a stopped tool leaves it"),
        ("text", "text.h5 cannot be read as HDF5"),
        ("other", "other.h5 holds coords, and no features with keys"),
        ("external", "features is no dataset of its own, but leads to other files"),
        ("soft", "features is no dataset of its own"),
        ("short", "short.h5 has 50 keys and 9 rows of features"),
        ("line", r"features is float32 of shape \(6,\), and not numbers of shape \(rows, length\)"),
        ("words", r"features is \|S1 of shape"),
        ("numbers", "numbers.h5: key is no list of texts"),
        ("places", r"coords is int64 of shape \(40, 2\), and not x and y of each of 50 rows"),
        ("side", "has no attribute patch_size_level0"),
    ],
)
def test_a_damaged_or_odd_hdf5_is_refused_in_one_line(tmp_path, kind, message):
    with pytest.raises(DataError, match=message) as error:
        open_features(damage(tmp_path, kind))
    assert len(error.value.args) == 1 and kind in str(error.value)


def test_what_is_cut_later_is_refused_when_it_is_read(tmp_path):
    write_trident(tmp_path / "a.h5", FEATURES, PLACES)
    file = open_features(tmp_path / "a.h5")
    cut(tmp_path / "a.h5")
    with pytest.raises(DataError, match="a.h5 cannot be read as HDF5"):
        read(file, range(50))


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    canary = tmp_path / "canary"
    objects = np.array([Canary(canary)] * 50, dtype=object)
    np.savez(tmp_path / "features.npz", features=objects, key=KEYS)
    np.savez(tmp_path / "key.npz", features=FEATURES, key=objects)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("features", "key", "plain"):
        with pytest.raises(DataError, match=f"{name}.npz cannot be read as npz without pickles"):
            open_features(tmp_path / f"{name}.npz")
    (tmp_path / "pt_files").mkdir()
    (tmp_path / "pt_files" / "S1.pt").write_bytes(pickle.dumps(Canary(canary)))
    for named in (tmp_path / "pt_files" / "S1.pt", tmp_path / "pt_files"):
        with pytest.raises(DataError, match="S1.pt is a pickle, which may run any code .*, and is never read here"):
            find_files([named])
    assert not canary.exists()


def test_what_is_no_file_of_features_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", FEATURES)
    (tmp_path / "empty").mkdir()
    for name, message in (("a.npy", "holds no keys"), ("empty", "holds no file of features"), ("no", "does not exist")):
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / name])
    np.savez(tmp_path / "a.npz", latents=FEATURES, key=KEYS)
    with pytest.raises(DataError, match="a.npz has no array features, only latents, key: it needs key and features"):
        open_features(tmp_path / "a.npz")
    with pytest.raises(DataError, match="a.npz is no file of TRIDENT, which writes HDF5: leave --layout out"):
        open_features(tmp_path / "a.npz", "trident")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": KEYS[:2]}, "has no column features"),
        (
            {"key": KEYS[:2], "features": [1.0, 2.0]},
            "cannot be read as a Parquet table .*features as a list",
        ),
        ({"key": KEYS[:2], "features": [[1.0], [1.0, 2.0]]}, "no lists of one length, or some are null"),
        ({"key": KEYS[:2], "features": [[1.0], None]}, "no lists of one length, or some are null"),
        ({"key": KEYS[:2], "features": [[1.0], [None]]}, "no lists of one length, or some are null"),
        ({"key": [1, 2], "features": [[1.0], [2.0]]}, "key is no list of texts"),
    ],
)
def test_an_odd_parquet_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_features(tmp_path / "a.parquet")
    cut(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet cannot be read as a Parquet"):
        open_features(tmp_path / "a.parquet")
