"""What a run asks of its feature store, and the store of a run, opened when it is what the run asks for."""

from lgd.base.errors import DataError
from lgd.base.target import DEFAULT_TARGET, Target, find_target
from lgd.config import Config
from lgd.io.documents import MissingDocument
from lgd.io.files import exists
from lgd.io.location import as_location
from lgd.models.description import TeacherConfig
from lgd.models.method import choose_staining
from lgd.shards.image import RESIZE
from lgd.stain.nuclear import POSITIVE_SETTINGS
from lgd.stain.targets import TARGET_SETTINGS
from lgd.store.document import Recipe, StoreDocument, TargetsRecipe, TeacherRecipe
from lgd.store.store import Store


def recipe_of(config: Config, target: Target) -> Recipe:
    """Everything that the stored numbers depend on, beside the shards; of imported latents what the store states."""
    latents = config.latents
    if config.teacher.source == "imported":
        return _stored_recipe(config, target)
    teacher = TeacherConfig.read_folder(config.teacher.dir)
    return Recipe(
        targets=targets_of(config, target),
        teacher=TeacherRecipe(
            source=teacher.source,
            weights_sha256=teacher.weights_sha256,
            encoder=teacher.encoder.as_json(),
            pool=teacher.pool,
            size=teacher.size,
            mpp=teacher.encoder.mpp,
            resize=RESIZE,
            precision=latents.precision,
            views=latents.views,
            map=latents.map,
            dtype=latents.dtype,
        ),
    )


def _stored_recipe(config: Config, target: Target) -> Recipe:
    """That of latents which no network here computes, and the targets that the run asks for, where there are any."""
    folder, name = config.latents.dir, config.teacher.name
    try:
        stored = StoreDocument.read(as_location(folder) / "store.json")
    except MissingDocument as error:
        raise DataError(
            f"{folder} holds no latents yet, and teacher.source is imported: run lgd import-latents"
        ) from error
    layer = stored.teachers.get(name)
    if layer is None or layer.recipe.source != "imported":
        holds = f"computed latents of {name}" if layer else f"no latents of {name}"
        raise DataError(
            f"{folder} holds {holds}, and teacher.source is imported: run lgd import-latents, or correct teacher.name"
        )
    targets = targets_of(config, target, paired=stored.patches.recipe.nuclei_grid is not None)
    return Recipe(targets=targets, teacher=layer.recipe)


def targets_of(config: Config, target: Target, paired: bool = True) -> TargetsRecipe:
    """Everything that the stored domain targets depend on, beside the shards; there are none unless these are pairs."""
    latents, staining = config.latents, choose_staining(config, target)
    settings = dict(TARGET_SETTINGS)
    if staining == "nuclei":
        settings |= {f"positive_{name}": value for name, value in POSITIVE_SETTINGS.items()}
    return TargetsRecipe(
        nuclei_grid=latents.nuclei_grid if paired else None,
        membrane_grid=latents.membrane_grid if paired else None,
        dtype=latents.dtype,
        settings=settings,
        staining=None if staining == "membranes" else staining,
        target=None if target == find_target(DEFAULT_TARGET) else target,
    )


def open_store(config: Config, target: Target) -> Store:
    """The store of a run, seen through the teachers of its student.

    Raises `DataError` where it was made by other teachers or settings than those of the run, or where a further teacher
    was trained again since.
    """
    folder, names = config.latents.dir, config.taught_by
    if config.teacher.source == "imported":
        _stored_recipe(config, target)
    store = Store(folder, teachers=names)
    own = store.document.teachers.get(config.teacher.name)
    if own and own.recipe.source == "imported" != config.teacher.source:
        raise DataError(
            f"the latents of {config.teacher.name} in {folder} were imported, and teacher.source is "
            f"{config.teacher.source}: set it to imported"
        )
    if config.teacher.name in names:
        Store(folder, recipe_of(config, target), (config.teacher.name,))
    for name in names:
        trained_in = store.sources.teachers[name]
        imported = store.document.teachers[name].recipe.source == "imported"
        if imported or name == config.teacher.name or not exists(as_location(trained_in) / "config.json"):
            continue
        weights = TeacherConfig.read_folder(trained_in).weights_sha256
        if weights != store.document.teachers[name].recipe.weights_sha256:
            raise DataError(
                f"the latents of {name} in {folder} are of another teacher than {trained_in} holds now: cache them "
                "under another name (lgd cache-latents --teacher.name), or leave it out of student.teachers"
            )
    return store
