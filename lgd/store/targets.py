"""The domain targets of shards as what teaches: the layer `patches` alone, before any teacher and store.json are there.

A teacher that learns membranes or nuclei is trained on these rows, and `lgd cache-latents` adds its latents to the same
parts later: no target is computed twice.
"""

from collections.abc import Sequence

from lgd.base.errors import DataError
from lgd.io.digests import digest_of
from lgd.io.documents import MissingDocument
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.store.document import PATCHES, Entry, TargetsRecipe, part_name, read_sidecar
from lgd.store.parts import Part, PartFile


class TargetParts:
    """The parts of the layer `patches` in a store's folder, finished or not, as `lgd.store.store.Store` gives parts."""

    def __init__(self, folder: Location, recipe: TargetsRecipe) -> None:
        self.folder, self.recipe = folder, recipe

    def digest_of(self, shards: Sequence[Shard]) -> str:
        """Digest of the rows of some shards."""
        parts = self.parts_of(shards)
        return digest_of([self.recipe.as_json(), [part.files[PATCHES].digest for part in parts]])

    def parts_of(self, shards: Sequence[Shard]) -> list[Part]:
        """Look up the part of each shard; `DataError` for one that is missing, damaged or of other settings."""
        return [self._open(shard) for shard in shards]

    def datasets(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of datasets, as they are."""
        return tuple(names)

    def _open(self, shard: Shard) -> Part:
        folder, name = self.folder / "parts" / PATCHES, part_name(shard)
        remedy = "run lgd train-teacher, which measures them first"
        try:
            sidecar = read_sidecar(folder, name)
        except MissingDocument as error:
            raise DataError(f"{folder} lacks the domain targets of {shard.path}: {remedy}") from error
        asked = digest_of(self.recipe.as_json()), shard.sha256, shard.samples
        if (sidecar.recipe, sidecar.tar_sha256, sidecar.rows) != asked:
            raise DataError(f"{folder / name}.json is of other settings, or of another {shard.path}: {remedy}")
        entry = Entry(**sidecar.model_dump(include=set(Entry.model_fields)))
        return Part({PATCHES: PartFile(folder, name, sidecar.digest, sidecar.layout, shard.target)}, entry)
