"""What the tests of the store share."""

from lgd.store.document import Recipe, TargetsRecipe, TeacherRecipe

RECIPE = Recipe(
    targets=TargetsRecipe(nuclei_grid=8, membrane_grid=4, dtype="float16", settings={"version": 1}),
    teacher=TeacherRecipe(
        source="trained",
        weights_sha256="a" * 64,
        encoder={"name": "resnet10"},
        pool="mean",
        size=64,
        mpp=None,
        resize="none",
        precision="fp32",
        views=1,
        map=2,
        dtype="float16",
    ),
)
"""Of rows that no teacher made."""


def contents_of(folder):
    """Layer/name -> content of every file of a store's parts."""
    parts = folder / "parts"
    return {str(path.relative_to(parts)): path.read_bytes() for path in parts.rglob("*") if path.is_file()}
