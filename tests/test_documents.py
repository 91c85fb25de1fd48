"""Odd fields in every kind of JSON document, with a digest that fits: the verbs that read it refuse them in a line.

An edit that leaves a document in its form may be taken; what then is not as it says is told as well.
"""

import copy
import json
import random
import shutil

import pytest

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.io.digests import digest_of
from lgd.io.documents import Document
from lgd.metrics import Interval
from lgd.report.ablation_table import AblationDocument, Compared
from lgd.report.leave_out import AtCenter, Change, LeaveOutDocument
from lgd.report.teachers_table import Judged, TeachersDocument
from lgd.report.transfer_table import Asked, Probed, TransferDocument
from lgd.scoring import tile_scorer
from lgd.shards import builder
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.tissue.slide_set import RegionTruth, SlidesTruth, SlideTruth, StrokeTruth
from tests.support.shades import write_ramp

pytestmark = pytest.mark.faults

ODD = [None, True, -1, 0, 7, 1.5, 1e-320, 2**53, 2**64, 10**400, 1e308, "", "x", "~", "../../victim/x", "/", "NaN"]
ODD += ["http://[", "\x1b[2J", "\ud800", "\0", "\u202e", "é" * 100_000, "0" * 64, "f" * 32]
ODD += [[], {}, [[]], [None], {"a": 1}, [1] * 10_000]


def places(tree, at=()):
    """Every place of a JSON tree but its root."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in entries:
        yield (*at, name)
        yield from places(value, (*at, name))


def harm(fields, dice):
    """A copy of a document's fields with one that is odd, gone, new, or taken from another place; and what was done."""
    harmed = copy.deepcopy(fields)
    # Evenly over names, not over the entries of long lists.
    named = {tuple("*" if isinstance(name, int) else name for name in place): place for place in places(fields)}
    *above, last = dice.choice(list(named.values()))
    parent = harmed
    for name in above:
        parent = parent[name]
    do = dice.choice(["odd"] * 6 + ["gone", "new", "other"])
    if do == "gone":
        del parent[last]
    elif do == "new" and isinstance(parent, dict):
        parent[dice.choice(["surprise", "", "\x1b[2J"])] = dice.choice(ODD)
    else:
        value = dice.choice(ODD)
        if do == "other":
            value = copy.deepcopy(fields)
            for name in dice.choice(list(named.values())):
                value = value[name]
        parent[last] = value
    what = f"{do} at {[*above, last]}: {str(parent)[:200]}"
    harmed.pop("digest", None)
    try:
        return harmed | {"digest": digest_of(harmed)}, what
    except UnicodeEncodeError:
        return harmed | {"digest": "0" * 64}, what


@pytest.fixture(scope="module")
def at(tissue, tmp_path_factory):
    """A folder with every kind of document: shards, a run, an export, virtual tissue, shards that are half built."""
    at = tmp_path_factory.mktemp("documents") / "all"
    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.5,0.25,0.25"}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(at / "shards"), shard_size=8, mpp=0.46, **split))
    sections = {
        "run": {"dir": str(at / "run")},
        "data": {"shards": [str(at / "shards")], "size": 64, "threads": 1},
        "latents": {"map": 2},
        "teacher": {"epochs": 1},
        "student": {"epochs": 1},
        "train": {"workers": 0, "engine": "torch", "batch": 8},
        "report": {"bootstrap": 10},
    }
    (at / "run.yaml").write_text(json.dumps(sections))
    for verb in ("train-teacher", "cache-latents", "build-index", "train", "evaluate"):
        assert main([verb, "--config", f"{at}/run.yaml"]) == 0
    assert main(["export-latents", "--store", f"{at}/run/latents", "--out", f"{at}/exported"]) == 0
    # Latents of no network here get a probe.
    assert main(["import-latents", "--config", f"{at}/run.yaml", "--teacher.name", "again", f"{at}/exported"]) == 0
    assert main(["synth", f"{at}/drawn", "--pairs", "2", "--size", "64", "--workers", "1"]) == 0
    estimate = Interval(value=0.5, low=None, high=None)
    AblationDocument(
        seeds=1,
        resamples=10,
        patches=20,
        groups=3,
        rows={"LGD-Net": {"kappa": Compared(mean=estimate, lgd_minus=None)}},
        gap_closed={"kappa": estimate},
        caveats=("one seed",),
        explained_by_levels=0.9,
        command="lgd ablate",
        shards=("0" * 64,),
        teacher="0" * 64,
    ).write(at / "ablation.json")
    change = Change(seen=estimate, left_out=estimate, change=estimate, lgd_minus=None)
    at_center = AtCenter(patches=20, groups=3, training_patches=9, rows={"LGD-Net": {"kappa": change}})
    LeaveOutDocument(
        seeds=1,
        resamples=10,
        training_patches=30,
        centers={"all centers": at_center, "north": at_center},
        caveats=("one seed",),
        command="lgd ablate --leave-out center",
    ).write(at / "leave-out.json")
    judged = Judged(
        title="labels",
        encoder="resnet10",
        learns=("label",),
        **dict.fromkeys(("teacher", "fewer", "distil", "lgd", "gain"), estimate),
        **dict.fromkeys(("explained", "tells", "tells_beyond", "rank", "own_rank", "hubs"), (0.5,)),
        weights=("0" * 64,),
    )
    TeachersDocument(
        seeds=1,
        resamples=10,
        metric="kappa",
        patches=20,
        groups=3,
        labelled={"0": 2},
        labelled_fewer={"0": 1},
        teachers={"label": judged},
        caveats=("one seed",),
        command="lgd teachers",
        shards=("0" * 64,),
    ).write(at / "teachers.json")
    probed = {"LGD-Net": Probed(mean=estimate, lgd_minus=None)}
    asked = Asked(
        question="share", measure="r2", training_patches=400, patches=20, groups=3, sizes={"100": probed, "300": probed}
    )
    TransferDocument(
        seeds=1,
        draws=20,
        resamples=10,
        questions="0" * 64,
        asked=(asked,),
        caveats=("one seed",),
        command="lgd ablate --transfer asked.csv",
        shards=("0" * 64,),
        teacher="0" * 64,
    ).write(at / "transfer.json")

    region = RegionTruth(
        number=1,
        label="2+",
        grade=0.5,
        stained_fraction=0.5,
        membrane_od=0.5,
        completeness=0.9,
        area_mm2=0.1,
        tumour_mm2=0.05,
    )
    slide = SlideTruth(
        slide="slide-0000",
        label="2+",
        center=None,
        scanner=None,
        width=512,
        height=512,
        mpp=0.46,
        registered=True,
        shift_um=[0.0, 0.0],
        regions=[region],
        strokes=[StrokeTruth(colour="blue", width=20.0, line=[[1.0, 2.0], [3.0, 4.0]])],
    )
    SlidesTruth(grain=32, slides=[slide]).write(at / "truth.json")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder, "describe_split", interrupt)
        build(ShardOptions(layout="bci", root=str(tissue), out=str(at / "begun"), shard_size=8, mpp=0.46))
    write_ramp(at / "one.tif", 0.46, height=500, width=500)
    score = ["predict", "--config", f"{at}/run.yaml", f"{at}/one.tif", "--out"]
    assert main([*score, f"{at}/scores"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_scorer, "write_part", interrupt)
        assert main([*score, f"{at}/begun-scores"]) == 130
    return at


def kinds(document=Document):
    """Every kind of document in the package."""
    for kind in document.__subclasses__():
        if kind.__module__.startswith("lgd."):
            yield kind
            yield from kinds(kind)


def test_an_odd_field_is_refused_by_name_or_taken(at, fault_count):
    of_format, found = {kind.FORMAT: kind for kind in kinds() if hasattr(kind, "FORMAT")}, set()
    for path in sorted(at.rglob("*.json")):
        fields = json.loads(path.read_text())
        if fields["format"] in found:
            continue
        kind, dice = of_format[fields["format"]], random.Random(str(path.relative_to(at)))
        kind.read(path)
        for _ in range(fault_count(1000)):
            harmed, what = harm(fields, dice)
            try:
                kind.parse(json.dumps(harmed).encode(), str(path))
            except DataError as error:
                assert str(error).startswith(str(path)) and str(error).isprintable() and len(str(error)) < 1000, what
        found.add(fields["format"])
    assert found == set(of_format), "every kind was tried"


CONFIG = ("--config", "{at}/run.yaml")
QUERY = ("query", *CONFIG, "{at}/one.png")
PROBED = ("evaluate", *CONFIG, "--teacher.source", "imported", "--teacher.name", "again")
READERS = {
    "shards/manifest.json": [("verify", "{at}/shards"), ("train", *CONFIG, "--overwrite"), ("evaluate", *CONFIG)],
    "run/latents/store.json": [("verify", "{at}/run/latents"), ("cache-latents", *CONFIG), QUERY],
    "run/latents/**/parts/patches/*.json": [("verify", "{at}/run/latents"), ("cache-latents", *CONFIG), QUERY],
    "run/latents/**/parts/teacher/*.json": [("verify", "{at}/run/latents"), ("cache-latents", *CONFIG), QUERY],
    "run/latents/**/index.json": [("verify", "{at}/run/latents"), QUERY, ("build-index", *CONFIG)],
    "run/latents/probe/again.json": [("verify", "{at}/run/latents"), ("info", "{at}/run/latents"), PROBED],
    "run/teacher/config.json": [("verify", "{at}/run/teacher"), ("cache-latents", *CONFIG), ("evaluate", *CONFIG)],
    "run/student/config.json": [("verify", "{at}/run/student"), ("predict", *CONFIG, "{at}/one.png"), QUERY],
    "run/student/checkpoints/*/state.json": [("verify", "{at}/run/student")],
    "run/run.json": [("verify", "{at}/run"), ("build-index", *CONFIG)],
    "exported/export.json": [("export-latents", "--store", "{at}/run/latents", "--out", "{at}/exported")],
    "scores/one/slide.json": [("predict", *CONFIG, "{at}/one.tif", "--out", "{at}/scores")],
    "drawn/synth.json": [("synth", "{at}/drawn", "--pairs", "2", "--size", "64", "--workers", "1")],
}


@pytest.mark.parametrize("name", READERS)
def test_a_verb_tells_of_an_odd_field_in_a_line(at, name, fault_count, tmp_path_factory, capsys):
    shutil.copyfile(next((at / "drawn" / "HE").rglob("*.png")), at / "one.png")
    whole = shutil.copytree(at, tmp_path_factory.mktemp("whole") / "all")
    (path, *_), dice = sorted(at.glob(name)), random.Random(name)
    for number in range(fault_count(100)):
        harmed, what = harm(json.loads(path.read_text()), dice)
        path.write_text(json.dumps(harmed))
        verb = READERS[name][number % len(READERS[name])]
        status = main([word.format(at=at) for word in verb])
        told = capsys.readouterr()
        lines = [line for line in told.err.splitlines() if not line.startswith("WARNING")]
        assert "Traceback" not in told.err and "\x1b" not in told.out + told.err, (verb, what, told.err)
        assert status in (0, 1, 2) and (status == 0 or lines or told.out), (verb, what)
        shutil.rmtree(at)
        shutil.copytree(whole, at)
