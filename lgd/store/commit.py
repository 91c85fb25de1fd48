"""store.json over the parts of some shards: what makes parts a store. Run at the end by the process that wrote them."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from lgd.io.documents import MissingDocument
from lgd.io.files import list_folder, remove
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.store.document import (
    PATCHES,
    TEACHER,
    Entry,
    Layer,
    Recipe,
    Rounding,
    Sidecar,
    SourcesDocument,
    StoreDocument,
    TargetsLayer,
    TeacherLayer,
    part_name,
    read_sidecar,
)
from lgd.store.drift import FixedVectors
from lgd.store.store import Store


def commit(  # noqa: PLR0913 - what a store is made of
    folder: Location,
    recipe: Recipe,
    shards: Sequence[Shard],
    *,
    name: str = TEACHER,
    sources: Iterable[str] = (),
    teacher: str = "",
    versions: dict[str, str] | None = None,
    fixed: FixedVectors | None = None,
    centre: tuple[float, ...] | None = None,
    prune: bool = False,
) -> Store:
    """Write store.json over the parts of these shards, and of those that it names already.

    `name` is that of the latents; those of others stay as they are. `prune` drops the parts of other shards. `sources`
    (shard folders) and `teacher` say where they were, for pictures and for `lgd verify --reencode`. `versions`,
    `fixed`, what the teacher made of two fixed images (`lgd.store.drift`), and `centre` are kept as they were first.
    """
    mine = list(dict.fromkeys(part_name(shard) for shard in shards))
    ordered, folders, teachers, others = mine, list(sources), {name: teacher}, dict[str, TeacherLayer]()
    own = set(mine)
    with contextlib.suppress(MissingDocument):
        before, was = StoreDocument.read(folder / "store.json"), SourcesDocument.read(folder / "sources.json")
        # Those that were there keep their numbers.
        numbers = {entry.name: number for number, entry in enumerate(before.entries)}
        ordered = list(dict.fromkeys([*(one for one in numbers if not prune or one in own), *mine]))
        folders += was.shards if len(ordered) > len(mine) else ()
        teachers = {**was.teachers, name: teacher}
        if there := before.teachers.get(name):
            versions, fixed, centre = there.versions, there.probe, there.centre
            own |= {one for one in ordered if one in numbers and there.parts[numbers[one]]}
        for other, layer in before.teachers.items():
            parts = tuple(layer.parts[numbers[one]] if one in numbers else None for one in ordered)
            if other != name and any(parts):
                others[other] = layer.model_copy(update={"parts": parts})
    sidecars: dict[str, list[Sidecar | None]] = {
        PATCHES: [read_sidecar(folder / "parts" / PATCHES, one) for one in ordered],
        name: [read_sidecar(folder / "parts" / name, one) if one in own else None for one in ordered],
    }
    document = _as_document(recipe, name, sidecars, versions or {}, fixed, centre, others)
    teachers = {one: teachers[one] for one in document.teachers}
    SourcesDocument(shards=tuple(sorted(set(folders))), teachers=teachers).write(folder / "sources.json")
    folders_of_parts = [folder / "parts" / each for each in (PATCHES, *document.teachers)]
    # The caller holds the store's lock: what a killed `publish` left is nobody's. Before store.json, for nobody looks
    # once that is there.
    _remove(folders_of_parts, lambda file: file.endswith(".tmp"))
    document.write(folder / "store.json")
    if prune:
        known = {f"{one}{suffix}" for one in ordered for suffix in (".h5", ".json")}
        _remove(folders_of_parts, lambda file: file not in known)
    return Store(folder, teachers=(name,))


def _remove(folders: Sequence[Location], is_unwanted: Callable[[str], bool]) -> None:
    for folder in folders:
        for file in list_folder(folder):
            if is_unwanted(file):
                remove(folder / file)


def _as_document(
    recipe: Recipe,
    teacher: str,
    sidecars: Mapping[str, Sequence[Sidecar | None]],
    versions: dict[str, str],
    fixed: FixedVectors | None,
    centre: tuple[float, ...] | None,
    others: Mapping[str, TeacherLayer],
) -> StoreDocument:
    """The document over the sidecars of the patches and of one teacher, alike ordered, beside the `others`' layers."""
    shared = set(Entry.model_fields)
    layer = TeacherLayer(
        recipe=recipe.teacher,
        licence=str(terms) if (terms := recipe.teacher.encoder.get("licence")) else None,
        versions=versions,
        probe=fixed,
        centre=centre,
        **dict(_join_layer(sidecars[teacher])),
    )
    return StoreDocument(
        entries=tuple(Entry(**one.model_dump(include=shared)) for one in sidecars[PATCHES] if one),
        patches=TargetsLayer(recipe=recipe.targets, **dict(_join_layer(sidecars[PATCHES]))),
        teachers=dict(sorted({**others, teacher: layer}.items())),
    )


def _join_layer(sidecars: Sequence[Sidecar | None]) -> Layer:
    present = [sidecar for sidecar in sidecars if sidecar]
    layout, rounding = present[0].layout, dict[str, Rounding]()
    assert all(sidecar.layout == layout for sidecar in present), "parts of one recipe have the same datasets"
    for sidecar in present:
        rounding |= {name: lost.largest(rounding.get(name)) for name, lost in sidecar.rounding.items()}
    return Layer(datasets=layout, rounding=rounding, parts=tuple(one.digest if one else None for one in sidecars))
