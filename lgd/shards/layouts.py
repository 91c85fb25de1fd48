"""How paired patches lie on disk: BCI, MIST, a CSV, slides to be cut, and layouts of other packages.

Only names are looked at, and the first bytes of a file that is not called like an image. Images may lie in any depth.
Nothing is dropped silently: an image that cannot be paired comes back as a `Problem`, and those that are hidden, or lie
outside the layout's folders, are counted in a note. In a set of H&E alone no candidate has an IHC. A layout of another
package is named `python:package.module:name`:

    class Flat(Layout):
        def scan(self, root):
            for he in sorted(root.glob("*-he.png")):
                yield Candidate(he.stem, he, he.with_name(he.name.replace("-he", "-ihc")), label=None)
"""

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lgd.base.errors import DataError, require
from lgd.base.extensions import FORM, is_python, load_object
from lgd.base.target import Target
from lgd.io.files import Kind, list_folder, peek_kind
from lgd.io.folders import walk_files
from lgd.io.location import Location, relative_name
from lgd.io.tables import read_csv
from lgd.shards.candidate import COLUMNS, Candidate, Cut, Layout, Problem, as_split, cut_suffix, is_csv, read_row
from lgd.shards.image_files import has_image_name, list_images
from lgd.shards.slide_layout import Slides

_MOST = 3
"""Names in a note."""

logger = logging.getLogger(__name__)


class Bci(Layout):
    """`HE/SPLIT/NAME_LABEL.png` and the same name under `IHC/`; of HER2 the label is 0, 1+, 2+ or 3+."""

    labels_slides = True
    caveats = (
        "BCI's background is grey in some images and white in others, a shortcut that a network can learn, and "
        "its two stains are neighbouring sections that are registered only approximately.",
    )

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        top = list_folder(root)
        for stain in ("HE", "IHC"):
            if top.get(stain) != "folder":
                raise DataError(f"{root} has no folder {stain}: --layout bci wants HE/SPLIT and IHC/SPLIT in --root")
        if ".synth-begun" in top:
            # `lgd synth` removes it at its end.
            raise DataError(f"{root} holds virtual tissue that is not complete: run the same lgd synth again")
        images = _list_images(root, top, ("HE", "IHC"))
        for stain, names in images.items():
            for name in (name for name in names if "/" not in name):
                reason = f"lies outside a split: move it into a folder such as {stain}/train"
                yield Problem(f"{stain}/{name}", _explain_folder(root / stain / name) or reason)
            images[stain] = [name for name in names if "/" in name]
        for entry in _match(root, "HE", "IHC", images):
            if isinstance(entry, Problem):
                yield entry
                continue
            assert entry.ihc is not None, "both stains were matched"
            split, _, stem = entry.stem.partition("/")
            he, ihc = (relative_name(path, root) for path in (entry.he, entry.ihc))
            text, named = stem.rpartition("_")[2], self.target.describe_labels()
            lies = "not" if self.target.is_number else "none of"
            if text in self.target.classes:
                yield replace(entry, stem=stem, label=self.target.parse_label(text), split=as_split(split))
            else:
                reason = f"{self.target.label_word} {text!r} in its name is {lies} {named}: rename it"
                yield Problem(he, reason, "", he, ihc)


class Mist(Layout):
    """`trainA trainB valA valB`, A being the H&E; `SLIDE_ROW_COLUMN.jpg`.

    MIST publishes `val` as its held-out set, so it is named `test` here.
    """

    caveats = ("MIST's two stains are neighbouring sections that are registered only approximately.",)

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        splits = {"train": "train", "val": "test", "test": "test"}
        images = _list_images(root, list_folder(root), [f"{folder}{stain}" for folder in splits for stain in "AB"])
        for folder, split in splits.items():
            for entry in _match(root, f"{folder}A", f"{folder}B", images):
                if isinstance(entry, Candidate):
                    slide = re.search(r"([^/]+)_\d+_\d+$", entry.stem)
                    entry = replace(entry, slide=slide[1] if slide else None, split=split)
                yield entry


class Csv(Layout):
    """A folder with `pairs.csv`, or the CSV itself.

    Columns he and ihc (relative to the CSV), and as you have them key, label, slide, split, mpp and the fields of
    `Origin`. Without a column ihc, or with an empty one, the set holds H&E alone. Whether the files of a remote CSV
    exist is seen when they are read.
    """

    takes_csv = True

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        base, path = (root.parent, root) if is_csv(root) else (root, root / "pairs.csv")
        for number, row in read_csv(path, required=("he",), allowed=COLUMNS):
            try:
                yield read_row(base, row, self.target)
            except DataError as error:
                name, named = f"{path.name} row {number}", [row.get(column, "") for column in ("key", "he", "ihc")]
                yield Problem(name, str(error), *named)


LAYOUTS: dict[str, type[Layout]] = {"bci": Bci, "mist": Mist, "csv": Csv, "slides": Slides}
"""The layouts by their names in `--layout`."""


def check_layout(name: str) -> None:
    """Raise `ConfigError` for a name that is neither a layout of LGD nor of one outside it; nothing is imported."""
    require(
        name in LAYOUTS or is_python(name), f"--layout is {name!r:.120}: use one of {', '.join(LAYOUTS)}, or {FORM}"
    )


def find_layout(name: str, target: Target, cut: Cut | None = None) -> Layout:
    """The layout of a name, which is imported where it is outside LGD, for labels of a target.

    `cut`: how slides are cut, for a layout of slides.

    Raises `ConfigError` for an unknown name.
    """
    check_layout(name)
    kind = LAYOUTS.get(name) or load_object(name, "--layout")
    good = isinstance(kind, type) and issubclass(kind, Layout) and not inspect.isabstract(kind)
    require(good, f"--layout is {name}, which is no layout: derive it from lgd.shards.layouts.Layout, with a `scan`")
    return kind(target, cut) if cut else kind(target)


def _list_images(root: Location, top: Mapping[str, Kind], folders: Sequence[str]) -> dict[str, list[str]]:
    """The images in each of some folders, in any depth, by their names below it, sorted; `top` is what the root holds.

    A note counts those that are hidden, or lie elsewhere below the root.
    """
    images, hidden, elsewhere = dict[str, list[str]](), list[Location](), list[Location]()
    for folder in folders:
        listed = list_images(root / folder)
        images[folder] = sorted(relative_name(path, root / folder) for path in listed.images)
        hidden += listed.hidden
    for name, lies in top.items():
        if name not in folders:
            below = walk_files(root / name) if lies == "folder" else [(root / name, lies, name.startswith("."))]
            elsewhere += [path for path, _, _ in below if has_image_name(path.name)]
    for paths, where in ((hidden, "hidden or thumbnails"), (elsewhere, f"in none of {', '.join(folders)}")):
        if paths:
            names = ", ".join(relative_name(path, root) for path in paths[:_MOST])
            logger.warning("images left out, %s: %d, such as %s", where, len(paths), names)
    return images


def _match(root: Location, he: str, ihc: str, images: Mapping[str, Sequence[str]]) -> Iterator[Candidate | Problem]:
    """Pair the images of two folders by their names below these, but for their suffixes."""
    by_stem: dict[str, dict[str, list[str]]] = {}
    for folder in (he, ihc):
        for name in images[folder]:
            by_stem.setdefault(cut_suffix(name), {}).setdefault(folder, []).append(f"{folder}/{name}")
    for stem, names_of in sorted(by_stem.items()):
        names = [name for some in names_of.values() for name in some]
        if len(names_of) == 1:
            other = ihc if he in names_of else he
            above, _, last = f"{other}/{stem}".rpartition("/")
            reason = f"has no partner {last} in {above}: add it, or remove this one"
            for name in names:
                of_he, of_ihc = (name if other == ihc else "", name if other == he else "")
                yield Problem(name, _explain_folder(root / name) or reason, "", of_he, of_ihc)
        elif len(names) > 2:
            yield Problem(names[0], f"its pair is ambiguous ({', '.join(names)}): keep one a stain")
        else:
            yield Candidate(stem, root / names[0], root / names[1], label=None)


def _explain_folder(path: Location) -> str:
    """Why a folder stands among the images; empty for any other."""
    folder = peek_kind(path, "file") == "folder"
    return "is a folder that cannot be listed: get read access, or remove it" if folder else ""
