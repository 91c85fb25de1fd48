"""HDF5 parts: write, open, verify, read by address.

    DIR/store.json          the recipe, where the shards were, and the list of parts; written last
    DIR/parts/NAME.h5       one part a shard, rows in shard order
    DIR/parts/NAME.json     rows, bytes, digests, the tar's sha256; its appearance commits the part

A part is named for its shard and the first digits of the tar's digest, so a changed shard gets a new part. The
datasets are contiguous and unfiltered: a reader maps the file at the offset that the sidecar names and never
parses HDF5, which makes reading as fast as a bare memory map and leaves nothing to a hostile file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config import DataError
from lgd.data.shards import Shard
from lgd.files import digest_of, publish, read_json, sha256, write_json

FORMAT = "lgd-latents/1"


def part_name(shard: Shard) -> str:
    """Name of the part that mirrors a shard."""
    return f"{shard.name}-{shard.sha256[:12]}"


def write_part(store: Path, shard: Shard, recipe: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Publish one part: `arrays` have one row a sample of the shard, in its order. Returns the sidecar."""
    import h5py

    assert all(len(array) == shard.samples for array in arrays.values())
    name = part_name(shard)
    path = store / "parts" / f"{name}.h5"
    with publish(path) as temporary:
        with h5py.File(temporary, "w", libver="latest") as file:
            for dataset, array in arrays.items():
                file.create_dataset(dataset, data=np.ascontiguousarray(array))
            file.flush()
            offsets = {dataset: file[dataset].id.get_offset() for dataset in arrays}
        digest = sha256(temporary)
        size = temporary.stat().st_size
    sidecar = {
        "format": FORMAT,
        "name": name,
        "shard": shard.name,
        "split": shard.split,
        "tar_sha256": shard.sha256,
        "recipe": digest_of(recipe),
        "rows": shard.samples,
        "bytes": size,
        "sha256": digest,
        "datasets": {
            dataset: {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offsets[dataset]}
            for dataset, array in arrays.items()
        },
    }
    write_json(path.with_suffix(".json"), sidecar)
    return sidecar


def is_complete(store: Path, shard: Shard, recipe: dict[str, Any]) -> bool:
    """Whether the shard's part was committed under this recipe, and its file is there."""
    path = store / "parts" / f"{part_name(shard)}.json"
    rows = path.with_suffix(".h5")
    if not path.is_file() or not rows.is_file():
        return False
    sidecar = read_json(path)
    asked = (digest_of(recipe), shard.sha256, rows.stat().st_size)
    return (sidecar.get("recipe"), sidecar.get("tar_sha256"), sidecar.get("bytes")) == asked


@dataclass(frozen=True)
class Part:
    """One part, opened lazily; its digest is checked once before the first use."""

    path: Path
    sidecar: dict[str, Any]
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Samples in the part."""
        return self.sidecar["rows"]

    def array(self, dataset: str) -> np.ndarray:
        """A dataset as a read-only memory map, one row a sample."""
        if not self._arrays:
            self._open()
        if dataset not in self._arrays:
            raise DataError(f"{self.path} has no dataset {dataset!r}: run lgd cache-latents with a store that has it")
        return self._arrays[dataset]

    def _open(self) -> None:
        problem = self.problem()
        if problem:
            raise DataError(f"{problem}: delete it and run lgd cache-latents again")
        for dataset, entry in self.sidecar["datasets"].items():
            array = np.memmap(
                self.path, np.dtype(entry["dtype"]), "r", offset=entry["offset"], shape=tuple(entry["shape"])
            )
            self._arrays[dataset] = array

    def problem(self) -> str | None:
        """What is wrong with the part, or None."""
        if not self.path.is_file():
            return f"part {self.path} is missing"
        size = self.path.stat().st_size
        if size != self.sidecar["bytes"]:
            return f"part {self.path} has {size} bytes and not {self.sidecar['bytes']}"
        if sha256(self.path) != self.sidecar["sha256"]:
            return f"part {self.path} does not match its digest"
        for dataset, entry in self.sidecar["datasets"].items():
            length = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
            if entry["shape"][0] != self.rows or not 0 <= entry["offset"] <= size - length:
                return f"part {self.path}: dataset {dataset!r} of its sidecar does not fit the file"
        return None


class Store:
    """A finished store, read by (part, row)."""

    def __init__(self, folder: str | Path, recipe: dict[str, Any] | None = None) -> None:
        """Open a store; with a `recipe`, one that was made by another recipe is refused with the difference."""
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.is_file():
            raise DataError(f"{self.folder} holds no finished feature store ({path} is missing): run lgd cache-latents")
        self.document = read_json(path)
        if not isinstance(self.document, dict) or self.document.get("format") != FORMAT:
            raise DataError(f"{path} does not describe a feature store of format {FORMAT}")
        if recipe is not None:
            check_recipe(path, self.document["recipe"], recipe)
        self.parts = [Part(self.folder / "parts" / f"{p['name']}.h5", p) for p in self.document["parts"]]
        self._of_tar = {part.sidecar["tar_sha256"]: part for part in self.parts}

    @property
    def digest(self) -> str:
        """Digest of the store's recipe and content."""
        return self.document["digest"]

    @property
    def rows(self) -> int:
        """Samples in the store."""
        return sum(part.rows for part in self.parts)

    def parts_of(self, shards: Sequence[Shard]) -> list[Part]:
        """The part of each shard, so that a shard's number is its part's number too."""
        lacking = [shard for shard in shards if shard.sha256 not in self._of_tar]
        if lacking:
            raise DataError(
                f"the feature store {self.folder} lacks {len(lacking)} of {len(shards)} shards, the first of them "
                f"{lacking[0].path}: run lgd cache-latents"
            )
        return [self._of_tar[shard.sha256] for shard in shards]

    def verify(self) -> list[str]:
        """Every problem of the store's parts and of its own document."""
        problems = [problem for part in self.parts if (problem := part.problem())]
        if store_digest(self.document["recipe"], self.document["parts"]) != self.digest:
            problems.append(f"{self.folder / 'store.json'} does not match its own digest: run lgd cache-latents again")
        for part in self.parts:
            sidecar = part.path.with_suffix(".json")
            if not sidecar.is_file() or read_json(sidecar) != part.sidecar:
                problems.append(f"{sidecar} is missing or differs from store.json: run lgd cache-latents again")
        return problems


def store_digest(recipe: dict[str, Any], parts: list[dict[str, Any]]) -> str:
    """Digest of a store's recipe and content."""
    return digest_of({"recipe": recipe, "parts": [[p["name"], p["sha256"]] for p in parts]})


def commit(folder: Path, recipe: dict[str, Any], shards: Sequence[Shard]) -> Store:
    """Write store.json over the parts of these shards, and remove parts that no shard has any more."""
    parts = [read_json(folder / "parts" / f"{part_name(shard)}.json") for shard in shards]
    write_json(
        folder / "store.json",
        {
            "format": FORMAT,
            "recipe": recipe,
            # Where the images were when the store was made, for the pictures of a query; not part of the recipe.
            "shards": sorted({str(shard.path.absolute().parent) for shard in shards}),
            "parts": parts,
            "digest": store_digest(recipe, parts),
        },
    )
    known = {part["name"] for part in parts}
    for path in (folder / "parts").iterdir():
        if path.stem not in known:
            path.unlink()
    return Store(folder)


def check_recipe(path: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `DataError` that shows, field by field, how two recipes differ."""
    if there == asked:
        return
    differences = [
        f"  {name}: {_short(there.get(name))} in the store, {_short(asked.get(name))} asked for"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    ]
    raise DataError(
        f"{path} was made by another recipe:\n"
        + "\n".join(differences)
        + "\nUse the teacher and settings that made it, name another folder as latents.dir, or delete this one"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."


def read_rows(parts: Sequence[Part], dataset: str, part_n: np.ndarray, row_n: np.ndarray) -> np.ndarray:
    """Rows of a dataset at addresses (part, row), as one array (n, ...)."""
    return np.stack([parts[p].array(dataset)[r] for p, r in zip(part_n, row_n, strict=True)])


def read_all(parts: Sequence[Part], dataset: str) -> np.ndarray:
    """A whole dataset over the given parts, (rows, ...)."""
    return np.concatenate([part.array(dataset) for part in parts])
