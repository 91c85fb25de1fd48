"""Shard folders, opened once and handed down.

    shards = ShardSet.open(config.shard_dirs)
    shards.of_split("train")

What a run reads of its manifests is read here; nothing downstream opens a manifest again.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import KNOWN, UNKNOWN, Target
from lgd.io.folders import list_local_sizes
from lgd.io.location import Location, as_location
from lgd.shards.archive import Shard, load_table
from lgd.shards.manifest import PATCHES, REBUILD, Manifest, Values

logger = logging.getLogger(__name__)

WITHOUT_IHC = "import latents by lgd import-latents, or train --student.method he-only"
"""What to do with a set without second images."""
_MOST = 20


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """One shard folder or url: its manifest, and its shards in the manifest's order."""

    folder: Location
    manifest: Manifest
    shards: tuple[Shard, ...]

    @classmethod
    def read(cls, folder: str | Location) -> "ShardFolder":
        """Read the manifest alone; `DataError` where it is missing, malformed, edited or of another format."""
        folder = as_location(folder)
        path = folder / "manifest.json"
        manifest = Manifest.read(path)
        extensions, options = manifest.extensions.by_role(), manifest.options
        shards = [
            Shard(
                path=folder / entry.file,
                name=entry.file.removesuffix(".tar"),
                split=name,
                samples=entry.samples,
                bytes=entry.bytes,
                sha256=entry.sha256,
                idx_sha256=entry.idx_sha256,
                extensions=extensions,
                keeps_files=options.image == "keep" and not options.tile,
                he_size=options.he_size,
                target=manifest.target,
            )
            for name, split in manifest.splits.items()
            for entry in split.shards
        ]
        return cls(folder, manifest, tuple(shards))

    @classmethod
    def open(cls, folder: str | Location) -> "ShardFolder":
        """`read`, and see that the shard files are there.

        `DataError` names those that are missing or have another size than the manifest says; those of a url are
        checked when they are fetched.
        """
        opened = cls.read(folder)
        names = (f"{shard.name}{suffix}" for shard in opened.shards for suffix in (".tar", ".idx"))
        if (sizes := list_local_sizes(opened.folder, names)) is None:
            return opened
        problems = []
        for shard in opened.shards:
            tar, idx = f"{shard.name}.tar", f"{shard.name}.idx"
            problems += [f"{opened.folder / file} is missing: {REBUILD}" for file in (tar, idx) if file not in sizes]
            if sizes.get(tar, shard.bytes) != shard.bytes:
                problems.append(f"{shard.path} has {sizes[tar]} bytes, but the manifest says {shard.bytes}: {REBUILD}")
        if problems:
            more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
            raise DataError(*problems[:_MOST], *more)
        return opened

    @property
    def is_labelled(self) -> bool:
        """Whether any sample has a label."""
        return any(split.labels[UNKNOWN] < split.samples for split in self.manifest.splits.values())

    def with_target(self, target: Target) -> "ShardFolder":
        """The same, read as of another target."""
        return replace(self, shards=tuple(replace(shard, target=target) for shard in self.shards))

    def read_patches(self) -> np.ndarray:
        """The table of patches.npy, (samples,) of `PATCHES`; `DataError` for a file that is not the manifest's."""
        path, said = self.folder / "patches.npy", self.manifest.patches
        return load_table(path, said.sha256, said.bytes, PATCHES, (sum(shard.samples for shard in self.shards),))


@dataclass(frozen=True, slots=True)
class ShardSet:
    """All shard folders of a run, in the order in which it names them."""

    folders: tuple[ShardFolder, ...]

    @classmethod
    def open(cls, folders: Iterable[str | Location]) -> "ShardSet":
        """Open each folder or url; `DataError` as `ShardFolder.open`, and where labels are of two targets."""
        opened = tuple(map(ShardFolder.open, folders))
        named: dict[Target, str] = {}
        for one in opened:
            if one.is_labelled:
                named.setdefault(one.manifest.target, str(one.folder))
        if len(named) > 1:
            lines = (f"  {folder}: {target.name} ({target.describe_labels()})" for target, folder in named.items())
            remedy = "train on one of them, or build the others without labels"
            raise DataError(f"data.shards has labels of {len(named)} targets:", *lines, remedy)
        target = next(iter(named), opened[0].manifest.target)
        # A set without labels says nothing of a target.
        return cls(tuple(one if one.manifest.target == target else one.with_target(target) for one in opened))

    @property
    def target(self) -> Target:
        """What the labels are of; of sets without any that of the first."""
        return self.folders[0].shards[0].target

    @property
    def shards(self) -> list[Shard]:
        """All shards, folder by folder."""
        return [shard for one in self.folders for shard in one.shards]

    def of_split(self, split: str) -> list[Shard]:
        """The shards of a split; none where no folder has it."""
        return [shard for shard in self.shards if shard.split == split]

    def require_split(self, split: str, field: str) -> list[Shard]:
        """The shards of a split that `field` names; `DataError` where no folder has it."""
        shards = self.of_split(split)
        if not shards:
            names = ", ".join(sorted({shard.split for shard in self.shards}))
            raise DataError(f"{field} {split!r} has no patches; the shards have {names}")
        return shards

    def with_ihc(self, reader: str) -> "ShardSet":
        """The folders that hold second images, for a `reader` of these; `DataError` where none does.

        A note names those that are left out.
        """
        lacking = [str(one.folder) for one in self.folders if one.manifest.extensions.ihc is None]
        if not lacking:
            return self
        hold = f"{', '.join(lacking)} {'holds' if len(lacking) == 1 else 'hold'} no second image (IHC)"
        if len(lacking) == len(self.folders):
            raise DataError(f"{hold}, which {reader} needs: {WITHOUT_IHC}")
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s: left out by %s", hold, reader)
        return ShardSet(tuple(one for one in self.folders if one.manifest.extensions.ihc is not None))

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifest of each folder."""
        return tuple(one.manifest for one in self.folders)

    @property
    def digests(self) -> tuple[str, ...]:
        """The digest of each folder's manifest."""
        return tuple(manifest.digest for manifest in self.manifests)

    def count_labels(self, split: str) -> dict[str, int]:
        """Samples of each class, and of `unknown`, in one split."""
        counts = [manifest.splits[split].labels for manifest in self.manifests if split in manifest.splits]
        return {name: sum(labels.get(name, 0) for labels in counts) for name in (*self.target.counted, UNKNOWN)}

    def count_groups(self, split: str) -> int:
        """Slides of one split, or source patches where slides are unknown; of each folder patches.npy is read."""
        groups = [np.zeros(0, np.uint64)]
        for one in self.folders:
            splits = np.repeat([shard.split for shard in one.shards], [shard.samples for shard in one.shards])
            groups.append(one.read_patches()["group"][splits == split])
        return len(np.unique(np.concatenate(groups)))

    def summarise_values(self, split: str) -> Values | None:
        """The known values of one split, where labels are such and there are any."""
        parts = [
            (one.labels[KNOWN], one.values)
            for manifest in self.manifests
            if (one := manifest.splits.get(split)) and one.values is not None
        ]
        if not parts:
            return None
        total = sum(count for count, _ in parts)
        mean = sum(count * one.mean for count, one in parts) / total
        spread = sum(count * (one.std**2 + (one.mean - mean) ** 2) for count, one in parts) / total
        least, most = min(one.least for _, one in parts), max(one.most for _, one in parts)
        return Values(mean=mean, std=spread**0.5, least=least, most=most)
