"""The feature store: its recipe, its parts, and rows by address or by key.

DIR/store.json          the recipe, where the shards and the teacher were, and the list of parts; written last
DIR/parts/NAME.{h5,json}   one part a shard (`lgd.store.parts`)
DIR/index/              what queries search (`lgd.store.index`)
DIR/.lock .owner.json   while `lgd cache-latents` runs, or after it was killed
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lgd.data.shards import Shard
from lgd.errors import DataError
from lgd.files import digest_of, list_folder, place, read_json, remove, told_differences, write_json
from lgd.store.parts import Part
from lgd.store.sidecar import FORMAT, REMEDY, check_layout, layout_of, part_name, read_sidecar

SUPERVISION = ("pooled", "map", "nuclei", "membrane")
"""The datasets that a student is trained on."""


class Store:
    """A finished store, read by (part, row)."""

    def __init__(self, folder: str | Path, recipe: dict[str, Any] | None = None) -> None:
        """Open a store, which may lie at a url; one made by another `recipe` is refused with the difference."""
        self.folder = place(folder)
        path = self.folder / "store.json"
        try:
            self.document = read_json(path)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise DataError(
                f"{self.folder} holds no finished feature store ({path} is missing): run lgd cache-latents"
            ) from error
        if not isinstance(self.document, dict) or self.document.get("format") != FORMAT:
            raise DataError(f"{path} does not describe a feature store of format {FORMAT}")
        try:
            said = {name: value for name, value in self.document.items() if name != "digest"}
            if digest_of(said) != self.document["digest"]:
                raise ValueError("it does not match its own digest")
            check_layout(self.document["datasets"])
            parts = self.folder / "parts"
            self.parts = [Part(parts, entry, self.document["datasets"]) for entry in self.document["parts"]]
            self.recipe: dict[str, Any] = self.document["recipe"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path} cannot be used ({error}): {REMEDY}") from error
        if recipe is not None:
            check_recipe(path, self.recipe, recipe)
        self._of_tar = {part.tar_sha256: part for part in self.parts}

    @property
    def digest(self) -> str:
        """Digest of the store's recipe and rows, wherever its shards and its teacher lie."""
        return self.document["content"]

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
        parts = [self._of_tar[shard.sha256] for shard in shards]
        for shard, part in zip(shards, parts, strict=True):
            if part.rows != shard.samples:
                raise DataError(
                    f"{part.path} has {part.rows} rows, and {shard.path} {shard.samples} samples: run lgd cache-latents"
                )
        return parts

    def find(self, key: str) -> list[tuple[int, int]]:
        """The (part, row) of a key; several where shard sets that were cached together share it.

        Keys are sorted within a part, and store.json has the first and last one of each: no index is needed, and
        only parts that may hold the key are opened.
        """
        found = []
        for number, part in enumerate(self.parts):
            if part.first <= key <= part.last:
                keys = part.array("key")
                row = int(np.searchsorted(keys, key.encode()))
                if row < part.rows and keys[row] == key.encode():
                    found.append((number, row))
        return found

    def verify(self, tell: Any = None) -> list[str]:
        """Every problem of the store's parts, and files that are none; `tell(rows)` hears of each part that is done."""
        problems = []
        for part in self.parts:
            problem = part.problem()
            problems += [problem] if problem else []
            if tell:
                tell(part.rows)
        known = {f"{part.name}{suffix}" for part in self.parts for suffix in (".h5", ".json")}
        strangers = sorted(set(list_folder(self.folder / "parts")) - known)
        return problems + [f"{self.folder / 'parts' / name} is of no part: remove it" for name in strangers]


def commit(folder: Path, recipe: dict[str, Any], shards: Sequence[Shard], sources: dict[str, Any]) -> Store:
    """Write store.json over the parts of these shards, and remove parts that no shard has any more.

    `sources` tells where shards and teacher were, for pictures and for `lgd verify --reencode`; it is no part of the
    recipe.
    """
    names = list(dict.fromkeys(part_name(shard) for shard in shards))
    sidecars = [read_sidecar(folder / "parts" / f"{name}.json") for name in names]
    datasets = layout_of(sidecars[0])
    assert all(layout_of(sidecar) == datasets for sidecar in sidecars), "parts of one recipe have the same datasets"
    fields = ("name", "split", "tar_sha256", "rows", "first", "last", "digest")
    document = {
        "format": FORMAT,
        "content": digest_of([recipe, [sidecar["digest"] for sidecar in sidecars]]),
        "recipe": recipe,
        "sources": sources,
        "datasets": datasets,
        "rounding": _largest([sidecar["rounding"] for sidecar in sidecars]),
        "parts": [{field: sidecar[field] for field in fields} for sidecar in sidecars],
    }
    write_json(folder / "store.json", document | {"digest": digest_of(document)})
    known = {f"{name}{suffix}" for name in names for suffix in (".h5", ".json")}
    for name in list_folder(folder / "parts"):
        if name not in known:
            remove(folder / "parts" / name)
    return Store(folder)


def _largest(roundings: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The largest of each number over the parts."""
    found: dict[str, dict[str, float]] = {}
    for rounding in roundings:
        for name, numbers in rounding.items():
            there = found.setdefault(name, dict(numbers))
            there.update({what: max(number, there[what]) for what, number in numbers.items()})
    return found


def check_recipe(path: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `DataError` that shows, field by field, how two recipes differ."""
    if there == asked:
        return
    raise DataError(
        f"{path} was made by another recipe:\n"
        + told_differences(there, asked, "in the store")
        + "\nUse the teacher and settings that made it, name another folder as latents.dir, or delete this one"
    )


class _Field(NamedTuple):
    """A dataset, as rows of it are read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Of one row, or of one view of it."""
    views: int
    bytes: int
    """Of one row, or of one view of it."""


class Rows:
    """Reads rows of some parts by address, as training needs them: from any thread."""

    def __init__(self, parts: Sequence[Part], datasets: Sequence[str] = SUPERVISION) -> None:
        """`parts` by their number, such as `Store.parts_of` gives; all of one store."""
        self.parts = parts
        layout = parts[0].layout
        self._fields = {name: _field(name, layout[name]) for name in datasets if name in layout}

    def read(
        self,
        part_n: Sequence[int],
        row_n: Sequence[int],
        key_n: Sequence[str | None],
        view_n: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """The supervision at (part, row), (n, ...) each, in the stored type.

        Of a store with eight views those of `view_n`, by default the first; of one view always that. Raises
        `DataError` unless the rows are those of the keys (None is not asked), and for a part that is not as its digest
        says.
        """
        maps = [self.parts[number].mapped() for number in part_n]
        for number, row, key, mapped in zip(part_n, row_n, key_n, maps, strict=True):
            there = mapped.arrays["key"][row]
            if key is not None and there != key.encode():
                raise DataError(
                    f"{self.parts[number].path}, row {row}, is of {there.decode()}, but the shard's sample is {key}: "
                    f"{REMEDY}"
                )
        found = {}
        for name, field in self._fields.items():
            size = field.bytes
            starts = [row * field.views * size for row in row_n]
            if field.views > 1 and view_n is not None:
                starts = [start + view * size for start, view in zip(starts, view_n, strict=True)]
            # Joining slices of the maps takes half the time of copying rows of arrays one by one.
            joined = bytearray().join(
                [mapped.bytes[name][start : start + size] for mapped, start in zip(maps, starts, strict=True)]
            )
            found[name] = np.frombuffer(joined, field.dtype).reshape(len(maps), *field.shape)
        return found


def _field(name: str, layout: dict[str, Any]) -> _Field:
    dtype, shape, views = np.dtype(layout["dtype"]), tuple(layout["shape"]), 1
    if name in ("pooled", "map"):
        views, *shape = shape  # type: ignore[assignment]
    return _Field(dtype, tuple(shape), views, math.prod(shape) * dtype.itemsize)


def read_all(parts: Sequence[Part], dataset: str) -> np.ndarray:
    """A whole dataset over the given parts, (rows, ...)."""
    return np.concatenate([part.array(dataset) for part in parts])
