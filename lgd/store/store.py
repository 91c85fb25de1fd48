"""The feature store: its recipes, its parts, and rows by address or by key.

DIR/store.json                    recipes, layers and the list of parts; written last
DIR/sources.json                  where the shards and the teachers were
DIR/parts/LAYER/NAME.{h5,json}    one part a shard and layer (`lgd.store.parts`): `patches`, and one a teacher
DIR/index/TEACHER/                what queries search (`lgd.retrieval.index`)
DIR/probe/TEACHER.json            what gives the levels of a teacher that no label taught (`lgd.store.probe`)
DIR/.lgd.lock                     while `lgd cache-latents` runs, or after it was killed
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.base.logs import progress
from lgd.base.target import Target
from lgd.io.digests import digest_of
from lgd.io.documents import MissingDocument
from lgd.io.files import list_folder
from lgd.io.location import Location, as_location
from lgd.shards.archive import Shard
from lgd.shards.shard_set import WITHOUT_IHC, ShardFolder
from lgd.store.document import PATCHES, REMEDY, TEACHER, Recipe, SourcesDocument, StoreDocument
from lgd.store.drift import refuse_recipe
from lgd.store.parts import Part, PartFile

__all__ = ["PATCHES", "SUPERVISION", "TEACHER", "Rows", "Store"]

SUPERVISION = ("pooled", "map", "nuclei", "membrane", "positive")
"""The datasets that a student is trained on."""


class Store:
    """A finished feature store: the latents, targets, labels and slides of patches, read by (part, row).

    A store may hold the latents of several teachers. It is seen through one or more of them: `parts` are those that all
    of these have, and of each but the first a dataset is named `pooled@NAME`.

    Args:
        folder: The store's folder, or a url.
        recipe: What targets and the first teacher's latents must have been made by; by default it may be anything.
        teachers: Names of latents; by default `teacher`, or the only ones.

    Raises:
        DataError: For a folder that holds no finished store, for latents that it does not hold, and, field by field,
            for one of another `recipe`.

    Example:
        >>> store = lgd.Store("runs/demo/latents")
        >>> ((part, row),) = store.find("00012_test_3+")
        >>> store.parts[part].array("pooled")[row]
    """

    def __init__(self, folder: str | Location, recipe: Recipe | None = None, teachers: Sequence[str] = ()) -> None:
        self.folder = as_location(folder)
        self.document = StoreDocument.read(self.folder / "store.json")
        self.teachers = tuple(teachers) or self._choose_teacher()
        for name in self.teachers:
            if name not in self.document.teachers:
                raise DataError(
                    f"the store {self.folder} holds no latents of {name!r:.80}, only of "
                    f"{', '.join(self.document.teachers)}: name one of these, or run lgd cache-latents with "
                    "--teacher.name"
                )
        if recipe and recipe != self.recipe:
            refuse_recipe(self.folder, self.recipe, recipe, self.teacher)
        layers = {name: self.document.layers[name] for name in (PATCHES, *self.teachers)}
        self.parts = []
        for number, entry in enumerate(self.document.entries):
            files = {
                layer: PartFile(self.folder / "parts" / layer, entry.name, digest, facts.datasets, self.target)
                for layer, facts in layers.items()
                if (digest := facts.parts[number]) is not None
            }
            if len(files) == len(layers):
                self.parts.append(Part(files, entry))
        self._of_tar = {part.tar_sha256: part for part in self.parts}

    def _choose_teacher(self) -> tuple[str]:
        names = [*self.document.teachers]
        if TEACHER not in names and len(names) > 1:
            holds = f"the store {self.folder} holds latents of {', '.join(names)}"
            raise DataError(f"{holds}: name one of them by --teacher")
        return (TEACHER if TEACHER in names else names[0],)

    @property
    def verb(self) -> str:
        """What adds latents of its first teacher."""
        return "import-latents" if self.recipe.teacher.source == "imported" else "cache-latents"

    @property
    def teacher(self) -> str:
        """The first of the teachers that the store is seen through."""
        return self.teachers[0]

    @property
    def digest(self) -> str:
        """Digest of the store's recipes and rows, wherever its shards and its teacher lie."""
        return self.document.digest

    @property
    def recipe(self) -> Recipe:
        """What the targets and the first teacher's latents depend on."""
        return self.document.recipe(self.teacher)

    @property
    def target(self) -> Target:
        """What labels are of."""
        return self.document.target

    @property
    def sources(self) -> SourcesDocument:
        """Where the shards and the teachers were."""
        return SourcesDocument.read(self.folder / "sources.json")

    def open_sources(self, known: Sequence[ShardFolder] = (), otherwise: str = "") -> Callable[[Part], Shard]:
        """Open the folders that the store was made of; returns what gives the shard of a part.

        `known` are open already. Raises `DataError` for a folder that is gone, where `otherwise` is another way out
        than to put it back; what it returns raises it for a part whose shard is not there any more.
        """
        shards: dict[str, Shard] = {}
        by_folder = {str(one.folder): one for one in known}
        folders = self.sources.shards
        for folder in folders:
            try:
                opened = by_folder.get(folder) or ShardFolder.open(folder)
            except MissingDocument as error:
                raise DataError(
                    f"the shards of {self.folder} were in {folder}, which is gone: put them back{otherwise}"
                ) from error
            shards |= {shard.sha256: shard for shard in opened.shards}

        def find_shard(part: Part) -> Shard:
            if shard := shards.get(part.tar_sha256):
                return shard
            raise DataError(
                f"the shards of {self.folder}, in {', '.join(folders)}, changed since it was made ({part.name}): "
                "run lgd cache-latents"
            )

        return find_shard

    @property
    def rows(self) -> int:
        """Samples of which the store has latents."""
        return sum(part.rows for part in self.parts)

    def digest_of(self, shards: Sequence[Shard]) -> str:
        """Digest of the rows of some shards, whatever else the store holds."""
        parts = self.parts_of(shards)
        recipes = [self.document.recipe(teacher).as_json() for teacher in self.teachers]
        rows = [
            [recipe, [part.digest(name) for part in parts]] for name, recipe in zip(self.teachers, recipes, strict=True)
        ]
        return digest_of(rows[0] if len(rows) == 1 else rows)

    def datasets(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of datasets, and those of the further teachers' ones."""
        return tuple(name for name in self.parts[0].layout if name.partition("@")[0] in names)

    def with_latents(self, shards: Sequence[Shard]) -> list[Shard]:
        """All of these shards but those that have no IHC, and no part here either."""
        return [shard for shard in shards if "ihc" in shard.roles or shard.sha256 in self._of_tar]

    def parts_of(self, shards: Sequence[Shard]) -> list[Part]:
        """Look up the part of each shard, so that a shard's number is its part's number too.

        Raises:
            DataError: For a shard that the store does not have, or has with another number of samples.
        """
        lacking = [shard for shard in shards if shard.sha256 not in self._of_tar]
        if without := [shard for shard in lacking if "ihc" not in shard.roles]:
            raise DataError(
                f"{without[0].path.parent} holds no second image (IHC), and {self.folder} no latents of it: "
                f"{WITHOUT_IHC}, or leave it out of data.shards"
            )
        if lacking:
            raise DataError(
                f"the feature store {self.folder} lacks latents of {' or '.join(self.teachers)} for {len(lacking)} of "
                f"{len(shards)} shards, the first of them {lacking[0].path}: run lgd {self.verb}"
            )
        parts = [self._of_tar[shard.sha256] for shard in shards]
        for shard, part in zip(shards, parts, strict=True):
            if part.rows != shard.samples:
                raise DataError(
                    f"{part.path} has {part.rows} rows, and {shard.path} {shard.samples} samples: run lgd cache-latents"
                )
        return parts

    def find(self, key: str) -> list[tuple[int, int]]:
        """Look up a key.

        Keys are sorted within a part, and store.json has the first and last one of each: no index is needed, and
        only parts that may hold the key are opened.

        Args:
            key: The key of a patch.

        Returns:
            Its (part, row), the number in `parts` and the place in it: none where the store does not have it, several
            where shard sets that were cached together share it.

        Raises:
            DataError: For a part that is missing or damaged.
        """
        found = []
        for number, part in enumerate(self.parts):
            if part.first <= key <= part.last:
                keys = part.array("key")
                row = int(np.searchsorted(keys, key.encode()))
                if row < part.rows and keys[row] == key.encode():
                    found.append((number, row))
        return found

    def verify(self) -> list[str]:
        """Read everything, behind a bar of progress.

        Returns:
            A line for each problem of the parts of all teachers, and for each file that is none of the store.
        """
        problems = []
        try:
            SourcesDocument.read(self.folder / "sources.json")
        except DataError as error:
            problems.append(str(error))
        entries, layers = self.document.entries, self.document.layers
        with progress(sum(entry.rows for entry in entries), "verify", "rows") as bar:
            for number, entry in enumerate(entries):
                for layer, facts in layers.items():
                    if digest := facts.parts[number]:
                        file = PartFile(self.folder / "parts" / layer, entry.name, digest, facts.datasets, self.target)
                        problems += [problem] if (problem := file.problem()) else []
                bar.update(entry.rows)
        for layer in list_folder(self.folder / "parts"):
            folder = self.folder / "parts" / layer
            if layer not in layers:
                problems.append(f"{folder} is of no teacher of store.json")
                continue
            parts = zip(entries, layers[layer].parts, strict=True)
            known = {f"{entry.name}{suffix}" for entry, digest in parts if digest for suffix in (".h5", ".json")}
            problems += [
                f"{folder / name} is of no part of store.json: it is being written, or left from a stopped run; "
                "lgd cache-latents --prune removes what the run does not need"
                for name in list_folder(folder)
                if name not in known
            ]
        return problems


class Rows:
    """Reads rows of some parts by address, as training needs them: from any thread."""

    def __init__(self, parts: Sequence[Part], datasets: Sequence[str] = SUPERVISION) -> None:
        """`parts` by their number, such as `Store.parts_of` gives; all of one store."""
        self.parts = parts
        layout = parts[0].layout
        self._layout = {name: layout[name] for name in datasets if name in layout}
        self._names = frozenset(("key", *self._layout))

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
        maps = [self.parts[number].mapped(self._names) for number in part_n]
        for number, row, key, mapped in zip(part_n, row_n, key_n, maps, strict=True):
            there = mapped.arrays["key"][row]
            if key is not None and there != key.encode():
                raise DataError(
                    f"{self.parts[number].path}, row {row}, is of {there.decode()}, but the shard's sample is {key}: "
                    f"{REMEDY}"
                )
        found = {}
        for name, layout in self._layout.items():
            dtype, shape, views = np.dtype(layout.dtype), layout.shape, 1
            if name.partition("@")[0] in ("pooled", "map"):
                views, shape = shape[0], shape[1:]
            size = math.prod(shape) * dtype.itemsize
            starts = [row * views * size for row in row_n]
            if views > 1 and view_n is not None:
                starts = [start + view * size for start, view in zip(starts, view_n, strict=True)]
            # Joining slices of the maps takes half the time of copying rows of arrays one by one.
            joined = bytearray().join(
                [mapped.bytes[name][start : start + size] for mapped, start in zip(maps, starts, strict=True)]
            )
            found[name] = np.frombuffer(joined, dtype).reshape(len(maps), *shape)
        return found
