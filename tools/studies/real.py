"""BCI and MIST in full: from the folders as they are published to a report and the comparison of methods.

python tools/studies/real.py bci FOLDER [--out DIR] [--seeds N] [--dry-run] [-- OPTION ...]
python tools/studies/real.py mist FOLDER [--bci FOLDER] [--out DIR] [--seeds N] [--dry-run] [-- OPTION ...]

Names of folders and counts of images are compared with what is published before anything is built. MIST has no levels:
with BCI's folder too, BCI's levels and the pairs of both teach one run, as configs/mist.yaml has it; without it the
teacher learns membranes and nuclei, and methods are not compared, for nothing can be scored. All commands run at the
top of the checkout; what is finished is not done again. `--out` becomes the run, with its shards beside it.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser, typed
from lgd.base.errors import ConfigError, DataError
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.models.methods import BASELINE
from lgd.shards.candidate import cut_suffix
from lgd.shards.image_files import list_images
from tools.studies.evidence import run_all


class Published(NamedTuple):
    """What a data set holds as its authors publish it."""

    title: str
    page: str
    images: Mapping[str, int]
    """Folder -> number of images."""
    levels: Mapping[str, Mapping[str, int]]
    """Folder -> number of images of each level, of those whose numbers are published."""
    build: str
    """Options of `lgd build-shards`."""


PUBLISHED = {
    "bci": Published(
        title="BCI",
        page="https://bupt-ai-cz.github.io/BCI/",
        images={"HE/train": 3896, "HE/test": 977, "IHC/train": 3896, "IHC/test": 977},
        levels={f"{stain}/test": {"0": 38, "1+": 235, "2+": 446, "3+": 258} for stain in ("HE", "IHC")},
        build="--split keep:0.1 --mpp 0.46",
    ),
    # It publishes patches of one slide in train and val, so its own split cannot be kept.
    "mist": Published(
        title="MIST's HER2 part",
        page="https://github.com/lifangda01/AdaptiveSupervisedPatchNCE",
        images={"trainA": 4642, "trainB": 4642, "valA": 1000, "valB": 1000},
        levels={},
        build="--split group:0.8,0.1,0.1 --mpp 0.4661",
    ),
}
"""The data sets by their layouts."""


def find_differences(root: Path, published: Published) -> Iterator[str]:
    """In what a folder differs from what is published, a line each."""
    for name, expected in published.images.items():
        if not (root / name).is_dir():
            yield f"{name} is missing: {expected:,} images are published in it"
            continue
        images = list_images(root / name).images
        if len(images) != expected:
            yield f"{name} has {len(images):,} images: {expected:,} are published"
        levels = Counter(cut_suffix(path.name).rpartition("_")[2] for path in images)
        for level, count in published.levels.get(name, {}).items():
            if levels[level] != count:
                yield f"{name} has {levels[level]:,} images of level {level}: {count:,} are published"


def check_folder(root: Path, layout: str) -> None:
    """Raise `DataError` for a folder that is not as it is published; all differences stand in one message."""
    published = PUBLISHED[layout]
    if differences := [*find_differences(root, published)]:
        holds = " and ".join(dict.fromkeys(name.partition("/")[0] for name in published.images))
        raise DataError(
            f"{root} is not {published.title} as it is published:",
            *(f"- {difference}" for difference in differences),
            f"Name the folder that holds {holds}, and where it does, unpack the archive of {published.page} anew. "
            "Other patches are packed as docs/shards.md shows.",
        )


def list_commands(folders: Mapping[str, Path], out: str, seeds: int, options: list[str]) -> list[list[str]]:
    """The commands for folders by layout, of which the last one names the run; `options` are fields of it."""
    shards = {layout: f"{out}/shards/{layout}" for layout in folders}
    commands = []
    for layout, folder in folders.items():
        built = ["--layout", layout, "--root", str(folder), "--out", shards[layout], *PUBLISHED[layout].build.split()]
        commands.append(["lgd", "build-shards", *built])
    given = ["--config", f"configs/{[*folders][-1]}.yaml", "--run.dir", out]
    given += ["--data.shards", f"[{', '.join(shards.values())}]"]
    if "bci" not in folders:
        given += ["--teacher.learns", "[membranes, nuclei]"]
    given += options
    commands += [["lgd", verb, *given] for verb in ("train-teacher", "cache-latents", "build-index", "train")]
    if "bci" not in folders:
        return [*commands, ["lgd", "evaluate", *given]]
    baseline = f"{out}/{BASELINE}"
    return [
        *commands,
        ["lgd", "train", *given, "--student.method", BASELINE, "--student.dir", baseline],
        ["lgd", "evaluate", *given, "--report.also", f"[{baseline}]"],
        ["lgd", "ablate", *given, "--seeds", str(seeds)],
    ]


def run(args: list[str]) -> int:
    """Check the folders and run the commands; returns the exit status."""
    end = args.index("--") if "--" in args else len(args)
    parser = Parser("python tools/studies/real.py", "BCI or MIST from the published folder to the report.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "What follows -- are fields of the run, such as -- --train.workers 2 --data.size 256."
    parser.add_argument("layout", choices=[*PUBLISHED], metavar="NAME", help="bci or mist")
    parser.add_argument("folder", metavar="FOLDER", help="the folder as it is published")
    parser.add_argument("--bci", default="", metavar="FOLDER", help="of mist: that of BCI, whose levels teach too")
    parser.add_argument("--out", default="", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--seeds", type=typed(int), default=5, metavar="N", help="trainings a method (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args[:end])
    if asked.bci and asked.layout == "bci":
        raise ConfigError("--bci is for mist: of bci its folder comes first, so leave --bci out")
    named = {"bci": asked.bci} if asked.bci else {}
    named[asked.layout] = asked.folder
    # Commands run elsewhere.
    folders = {layout: Path(folder).expanduser().absolute() for layout, folder in named.items()}
    out = asked.out or f"runs/{asked.layout}"
    commands = list_commands(folders, out, asked.seeds, args[end + 1 :])
    if asked.dry_run:
        print_lines(*map(shlex.join, commands))
        return 0
    for layout, folder in folders.items():
        check_folder(folder, layout)
    if status := run_all(commands):
        return status
    print_lines("", f"report   {out}/report/summary.md")
    if commands[-1][1] == "ablate":
        print_lines(f"methods  {out}/ablation/ablation.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("real", run, sys.argv[1:]))
