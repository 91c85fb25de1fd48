"""Files of features that other tools computed: recognised by what they hold, and read by rows. None is trusted.

| layout | file | vectors | what a row is of |
|---|---|---|---|
| table | .h5, .npz, .parquet | `features` (n, D) | `key` (n,) |
| trident | SLIDE.h5 | `features` (n, D) | `coords` (n, 2), pixels of level 0; side and overlap in its attributes |
| clam | h5_files/SLIDE.h5 | `features` (n, D) | `coords` (n, 2), pixels of level 0; side in patches/SLIDE.h5 |
| stamp | SLIDE.h5 | `feats` (n, D) | `coords` (n, 2), micrometres; side in the attributes of the file |

As written by TRIDENT 0.3.1 and STAMP 2.1 to 2.5 (2026) and by CLAM, which has no versions. What `lgd export-latents`
writes has keys, and is a table.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.errors import DataError
from lgd.base.text import escape_text
from lgd.io.digests import sha256
from lgd.store.features import TOOLS, FeatureFile, LayoutName, Tiles, open_hdf5

if TYPE_CHECKING:
    import h5py


def open_features(path: Path, layout: LayoutName | None = None, patches: Path | None = None) -> FeatureFile:
    """Open one file, of a layout or of that which its content shows; `patches` is CLAM's folder of patches.

    Raises `DataError` for a file that is damaged, of no layout, or lacks what its layout needs.
    """
    suffix = path.suffix.lower()
    if suffix in (".npz", ".parquet") and layout not in (None, "table"):
        raise DataError(f"{path} is no file of {TOOLS[layout]}, which writes HDF5: leave --layout out")
    if suffix == ".npz":
        return _open_npz(path)
    if suffix == ".parquet":
        return _open_parquet(path)
    with open_hdf5(path) as file:
        layout = layout or _tell_layout(path, file)
        return _READERS[layout](path, file, patches)


def _tell_layout(path: Path, file: "h5py.File") -> LayoutName:
    names = {*file}
    if {"features", "key"} <= names:
        return "table"
    if "feats" in names:
        return "stamp"
    if {"features", "coords"} <= names:
        return "trident"
    shown = ", ".join(sorted(names)[:8])
    raise DataError(
        f"{path} holds {shown or 'nothing'}, and no features with keys (features, key) or places (features or feats, "
        "coords): name the folder of the features alone"
    )


def _dataset(path: Path, file: "h5py.File", name: str) -> "h5py.Dataset":
    """A dataset whose bytes lie in this very file: a link or a virtual one could lead to any other."""
    import h5py

    if name not in file:
        raise DataError(f"{path} has no dataset {name}: it is of another layout, or was not written to its end")
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise DataError(f"{path}: {name} is no dataset of its own, but leads to other files: copy what it shows")
    return dataset


def _vectors(path: Path, file: "h5py.File", name: str) -> tuple[int, int]:
    """Rows and numbers in each; (0, 0) of a slide without tiles."""
    dataset = _dataset(path, file, name)
    return _check_vectors(path, name, dataset.shape, dataset.dtype)


def _check_vectors(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int]:
    if shape[:1] == (0,):
        return 0, 0
    if len(shape) != 2 or dtype.kind not in "fiu" or not shape[1]:
        raise DataError(f"{path}: {name} is {dtype} of shape {shape}, and not numbers of shape (rows, length)")
    rows, dim = shape
    return rows, dim


def _open_table(path: Path, file: "h5py.File", patches: Path | None) -> FeatureFile:
    rows, dim = _vectors(path, file, "features")
    keys = _dataset(path, file, "key")
    text = keys.dtype.kind == "S" or keys.dtype == object
    return FeatureFile(
        path=path,
        layout="table",
        sha256=sha256(path),
        rows=rows,
        dim=dim,
        key_n=_as_keys(path, rows, [*keys[()]] if text and keys.ndim == 1 else None),
        encoder=_text(file.attrs.get("encoder")),
        licence=_text(file.attrs.get("licence")),
        centred=bool(file.attrs.get("centred", False)),
    )


def _open_npz(path: Path) -> FeatureFile:
    try:
        with np.load(path, allow_pickle=False) as content:
            if lacking := [name for name in ("key", "features") if name not in content]:
                raise DataError(
                    f"{path} has no array {lacking[0]}, only {', '.join(content)[:200] or 'none'}: it needs key and "
                    "features"
                )
            keys, features_nD = content["key"], content["features"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        remedy = "save texts and numbers, no objects, by numpy.savez"
        raise DataError(f"{path} cannot be read as npz without pickles ({str(error)[:200]}): {remedy}") from error
    return _held_table(path, [*keys] if keys.ndim == 1 and keys.dtype.kind in "US" else None, features_nD)


def _open_parquet(path: Path) -> FeatureFile:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        if lacking := [name for name in ("key", "features") if name not in names]:
            raise DataError(f"{path} has no column {lacking[0]}: it needs key (texts) and features (lists of numbers)")
        table = pq.read_table(path, columns=["key", "features"])
        keys, lists = table["key"].to_pylist(), table["features"]
        lengths_n, flat = pc.list_value_length(lists).to_numpy(), pc.list_flatten(lists)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as a Parquet table of key and features ({str(error)[:200]}): write it again, each "
            "row of features as a list"
        ) from error
    dim = int(lengths_n[0]) if len(lengths_n) and not lists.null_count else 0
    if lists.null_count or flat.null_count or (lengths_n != dim).any():
        raise DataError(f"{path}: the rows of features are no lists of one length, or some are null: correct them")
    return _held_table(path, keys, flat.to_numpy().reshape(len(keys), dim))


def _held_table(path: Path, keys: Sequence[object] | None, features_nD: np.ndarray) -> FeatureFile:
    rows, dim = _check_vectors(path, "features", features_nD.shape, features_nD.dtype)
    if features_nD.dtype.itemsize > 4:
        # Larger values than float32 has become infinite, and are refused as such.
        with np.errstate(over="ignore"):
            features_nD = features_nD.astype(np.float32)
    return FeatureFile(
        path=path,
        layout="table",
        sha256=sha256(path),
        rows=rows,
        dim=dim,
        key_n=_as_keys(path, rows, keys),
        held_nD=features_nD,
    )


def _as_keys(path: Path, rows: int, keys: Sequence[object] | None) -> np.ndarray:
    """Keys as bytes, (rows,)."""
    if keys is None or not all(isinstance(key, str | bytes) for key in keys):
        raise DataError(f"{path}: key is no list of texts: save a text for each row")
    if len(keys) != rows:
        raise DataError(f"{path} has {len(keys)} keys and {rows} rows of features: save one key for each row")
    return np.array([key if isinstance(key, bytes) else str(key).encode() for key in keys], "S")


def _open_trident(path: Path, file: "h5py.File", patches: Path | None) -> FeatureFile:
    attributes = dict(_dataset(path, file, "coords").attrs)
    side = _positive(attributes.get("patch_size_level0"))
    if side is None:
        raise DataError(
            f"{path}: coords has no attribute patch_size_level0, so how large its tiles are is not known: name what "
            "TRIDENT 0.2 or newer wrote; features of CLAM need --layout clam --patches DIR"
        )
    size, overlap = _positive(attributes.get("patch_size")), _positive(attributes.get("overlap")) or 0.0
    step = side * (1 - overlap / size) if size and 0 <= overlap < size else side
    encoder = _text(file["features"].attrs.get("encoder"))
    return _slide_file(path, file, "trident", "features", side, step, encoder=encoder)


def _open_clam(path: Path, file: "h5py.File", patches: Path | None) -> FeatureFile:
    if patches is None:
        raise DataError(
            f"{path}: CLAM's features do not say how large a tile is: name the folder of its patches by --patches DIR"
        )
    if not (beside := patches / path.name).exists():
        raise DataError(f"{beside} is missing, which says how large the tiles of {path} are: name its folder --patches")
    with open_hdf5(beside) as coords:
        attributes = dict(_dataset(beside, coords, "coords").attrs)
    size, down = _positive(attributes.get("patch_size")), np.atleast_1d(attributes.get("downsample", np.nan))
    factor = _positive(down[0])
    if size is None or factor is None:
        raise DataError(f"{beside}: coords has no attributes patch_size and downsample: name what CLAM wrote")
    return _slide_file(path, file, "clam", "features", size * factor, size * factor)


def _open_stamp(path: Path, file: "h5py.File", patches: Path | None) -> FeatureFile:
    side = _positive(file.attrs.get("tile_size_um"))
    if side is None or _text(file.attrs.get("unit")) != "um":
        raise DataError(
            f"{path} does not say that its coords are micrometres (unit um, tile_size_um), as STAMP 2.1 and newer do: "
            "extract the features again by a newer one"
        )
    if (kind := _text(file.attrs.get("feat_type"))) not in (None, "tile"):
        raise DataError(f"{path} holds features of each {kind}: name the features of tiles")
    encoder, version = _text(file.attrs.get("extractor")), _text(file.attrs.get("stamp_version"))
    return _slide_file(path, file, "stamp", "feats", side, side, encoder=encoder, version=version)


_READERS: dict[LayoutName, Callable[[Path, "h5py.File", Path | None], FeatureFile]] = {
    "table": _open_table,
    "trident": _open_trident,
    "clam": _open_clam,
    "stamp": _open_stamp,
}


def _slide_file(  # noqa: PLR0913 - what the three tools have in common
    path: Path,
    file: "h5py.File",
    layout: LayoutName,
    name: str,
    side: float,
    step: float,
    *,
    encoder: str | None = None,
    version: str | None = None,
) -> FeatureFile:
    rows, dim = _vectors(path, file, name)
    place_n2 = _dataset(path, file, "coords")[()] if rows else np.empty((0, 2))
    if place_n2.shape != (rows, 2) or place_n2.dtype.kind not in "fiu" or not np.isfinite(place_n2).all():
        raise DataError(
            f"{path}: coords is {place_n2.dtype} of shape {place_n2.shape}, and not x and y of each of {rows} rows: "
            "compute it again"
        )
    tiles = Tiles(place_n2.astype(np.float64), side, step, layout == "stamp")
    return FeatureFile(
        path=path,
        layout=layout,
        sha256=sha256(path),
        rows=rows,
        dim=dim,
        tiles=tiles,
        encoder=encoder,
        version=version,
    )


def _text(value: object) -> str | None:
    """A text of an attribute, on one line; None where there is none, as TRIDENT writes it too."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return escape_text(text, 500) if isinstance(text, str) and text not in ("", "None") else None


def _positive(value: object) -> float | None:
    """A number of an attribute that is above 0; None for anything else."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
