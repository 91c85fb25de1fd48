import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_answers import ALL, GRADE, HER2, KI67, SUBTYPE, draw_answers
from PIL import Image

from lgd.base.errors import DataError
from lgd.base.target import Target
from lgd.labels.predictions import paired_differences, score_with_intervals
from lgd.report.caveats import caveats_of
from lgd.report.charts import confusion_matrix
from lgd.report.colour import COLOUR, describe_colour
from lgd.report.columns import list_robust
from lgd.report.contact_sheet import Field, Picture, Query, contact_sheet
from lgd.report.embeddings import Embedding, measure
from lgd.report.evaluation import measure_results
from lgd.report.pictures import Pictured
from lgd.report.report import format_scores, write_report
from lgd.report.results import (
    AtStrength,
    ChangeText,
    ModelRobustness,
    Results,
    Robustness,
    UnderChange,
    format_interval,
)
from lgd.report.sites import Taught
from lgd.retrieval.answers import Answer, Hit
from lgd.shards.manifest import Manifest, Split, Values
from lgd.shards.shard_set import ShardFolder, ShardSet

NAMED_AS_ITS_WORD = Target(name="Allred Score", kind="ordinal", classes=("a", "b"), word="score", unit=None)


def model(name="LGD-Net", skill=1.0, slides=12, each=5, level=None, groups=None):
    """A model of some skill on patches of slides that each have one level."""
    return draw_answers(HER2, name, skill, slides, each, level, groups)


def query(level=2, ihc=True):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = [
        Hit(key=f"k_$1$_{other}", slide=None, split="train", label=HER2.name_label(other), part=0, row=0, distance=0.1)
        for other in (2, 1, 0, -1)
    ]
    return Query(
        answer=Answer(image="q" * 60, label="1+", known=HER2, neighbours=found),
        slide="S1",
        label=None if level is None else HER2.name_label(level),
        he=Field(image, 0.46),
        ihc=Field(image, 0.46) if ihc else None,
        images=[Picture("IHC", Field(image, 0.46))] * 4,
    )


def report(folder, scored, queries=(), **changed):
    options = {
        "caveats": ["Mind this."],
        "provenance": {"command": "lgd evaluate --config c.yaml", "model": "abc"},
        "resamples": 40,
        "seed": 0,
    } | changed
    results = measure_results(scored, **options)
    write_report(folder, results, scored, Pictured(queries))
    return results.document()


def strict(path):
    """The JSON of a file, in which NaN and Infinity are no numbers."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def retrieval(predictions, level_m=(0, 1, 2, -1)):
    """An embedding that finds its own pair first, one that has none, and a gallery without level 3+."""
    latents = np.random.default_rng(0).normal(size=(len(predictions.keys), 4))
    gallery = np.random.default_rng(1).normal(size=(len(level_m), 4))
    embeddings = [
        Embedding("LGD-Net, latents", latents, gallery, latents),
        Embedding("IHC|teacher", latents, gallery, None),
    ]
    return measure(embeddings, predictions, np.array(level_m, np.int64), 40, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    scored = [model(), model("H&E-only", 0.5), model("IHC|teacher", 3.0)]
    document = report(folder, scored, retrieval=retrieval(scored[0]), queries=[query(), query(None, ihc=False)])
    return folder, scored, document


def test_text_of_others_is_only_text(tmp_path):
    evil = "x\n\n# Result\n\n<img src=http://evil/b.png> [click](javascript:alert(1)) \x1b[2J \u202e"
    command = "lgd evaluate --config 'runs/a\n\n# Cleared/config.yaml'"
    scored = [model(f"LGD|Net {evil}", slides=4, each=2), model("H&E-only", 0.5, slides=4, each=2)]
    document = report(tmp_path, scored, caveats=[evil, "y" * 1_000_000], provenance={"command": command})
    assert document["caveats"][0] == evil, "JSON holds it as it is"
    assert strict(tmp_path / "metrics.json") == document
    text = (tmp_path / "summary.md").read_text()
    shown = r"x\\n\\n# Result\\n\\n&#60;img `src=http://evil/b.png`> \[click\](javascript:alert(1)) \\x1b\[2J \\u202e"
    assert f"- {shown}\n" in text and f"| LGD\\|Net {shown} |" in text
    assert "    lgd evaluate --config 'runs/a\\n\\n# Cleared/config.yaml'\n" in text
    assert not re.search("(?m)^# (Result|Cleared)|\x1b|\u202e|y{5000}", text)


def test_the_document_holds_every_number(written):
    folder, scored, document = written
    assert strict(folder / "metrics.json") == document
    assert document["levels"] == dict.fromkeys(HER2.classes, 15)
    assert document["always_the_commonest_level"] == 0.25
    assert document["provenance"]["model"] == "abc"
    for made, predictions in zip(document["models"], scored, strict=True):
        names, values = predictions.measures.names, predictions.measures.score(predictions.label, predictions.output)
        metrics = made["by_patch"]["metrics"]
        assert {name: metrics[name]["value"] for name in names} == values
        assert all(metrics[name]["low"] <= values[name] <= metrics[name]["high"] for name in names)
        counts = np.array(made["by_patch"]["confusion"])
        assert counts.sum(1).tolist() == [15] * 4
        assert np.trace(counts) / 60 == pytest.approx(values["accuracy"])
        assert np.sum(made["by_slide"]["confusion"]) == made["by_slide"]["groups"] == 12
    for row, other in zip(document["differences"], scored[1:], strict=True):
        assert (row["of"], row["minus"]) == ("LGD-Net", other.name)
        assert row["metrics"]["kappa"] == paired_differences(scored[0], other, ["kappa"], 40, 0)["kappa"].as_json()


def test_latents_that_are_all_alike_are_told(written, tmp_path):
    _, scored, document = written
    assert document["caveats"] == ["Mind this."], "each finds its own first"
    latents = np.random.default_rng(0).normal(size=(len(scored[0].keys), 4))
    alike = np.ones(4) + 1e-3 * np.random.default_rng(1).normal(size=latents.shape)
    found = measure([Embedding("LGD-Net, latents", alike, latents, latents)], scored[0], scored[0].label, 40, 0)
    [first, caveat] = report(tmp_path, scored, retrieval=found)["caveats"]
    assert first == "Mind this." and "LGD-Net, latents: they find their own IHC no better than by chance" in caveat
    assert caveat in (tmp_path / "summary.md").read_text()


def test_the_pictures_are_pictures(written):
    folder, _, _ = written
    for name in ("confusion.png", "reliability.png", "queries.png"):
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 10
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            *("confusion.png", "metrics.json", "predictions-by-patch.csv", "predictions-by-slide.csv", "queries.png"),
            *("reliability.png", "summary.md"),
        ]
    )


def test_the_summary_says_what_a_reader_needs(written):
    folder, _, document = written
    text = (folder / "summary.md").read_text()
    assert text.index("Mind this.") < text.index("Scores by patch")
    accuracy = document["models"][0]["by_patch"]["metrics"]["accuracy"]
    shown = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**accuracy)
    assert f"| LGD-Net | 60 | {shown} |" in text
    assert "| LGD-Net | 12 |" in text
    assert "LGD-Net minus H&E-only" in text
    area = document["models"][0]["by_area"]["metrics"]["accuracy"]
    assert "| LGD-Net | area | {value:.3f} [{low:.3f}, {high:.3f}] |".format(**area) in text
    less = document["models"][0]["area_minus_mean"]["accuracy"]
    assert "| LGD-Net | area minus mean | {value:+.3f} [{low:+.3f}, {high:+.3f}] |".format(**less) in text
    assert all(f"- {way}.\n" in text for way in document["slide_rules"].values())
    assert "In 12 of 12 slides the patches are so few" in text
    assert "| LGD-Net, latents | 1 | 1.0 [1.0, 1.0] | 1.000 [1.000, 1.000] |" in text
    assert "| by chance | 30.5 | 30.5 | 0.017 | 0.083 | 0.167 |" in text
    by_level = document["retrieval"]["embeddings"][0]["by_level"]
    overall = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**by_level["overall"])
    assert f"| LGD-Net, latents | IHC latents of the training patches | {overall} |" in text
    assert by_level["3+"] == {"value": None, "low": None, "high": None, "chance": None, "queries": 0}
    assert all(f"- {caveat}\n" in text for caveat in document["retrieval"]["caveats"])
    assert "    lgd evaluate --config c.yaml\n" in text
    for name in ("confusion.png", "reliability.png", "queries.png"):
        assert f"]({name})" in text
    rows = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("| IHC")]
    assert len(rows) == 8
    assert {row.count("|") for row in rows} == {8, 7, 6}


def test_the_table_is_aligned_and_agrees(written):
    folder, _, document = written
    head, *rows = format_scores(Results.read(folder / "metrics.json")).splitlines()
    assert [row.split("  ")[0] for row in rows] == ["LGD-Net", "H&E-only", "IHC|teacher"]
    kappa = document["models"][0]["by_patch"]["metrics"]["kappa"]
    assert rows[0][head.index("kappa") :].startswith("{value:.3f} [{low:.3f}, {high:.3f}]".format(**kappa))


def test_an_unlabelled_split_gets_no_scores(tmp_path):
    unlabelled = model(level=[-1] * 10)
    (tmp_path / "confusion.png").write_bytes(b"of an earlier report")
    document = report(tmp_path, [unlabelled], queries=[query(None)])
    assert document["labelled"] == 0
    assert document["models"][0]["by_patch"]["metrics"]["accuracy"] == {"value": None, "low": None, "high": None}
    assert strict(tmp_path / "metrics.json") == document
    text = (tmp_path / "summary.md").read_text()
    assert "nothing to score" in text
    assert "Scores by" not in text
    assert not (tmp_path / "confusion.png").exists()
    assert "(queries.png)" in text
    assert "–" in format_scores(Results.read(tmp_path / "metrics.json"))


@pytest.mark.filterwarnings("error")
def test_one_level_of_one_slide_has_no_intervals(tmp_path):
    document = report(tmp_path, [model(level=[2] * 4, groups=["a"] * 4)])
    metrics = document["models"][0]["by_patch"]["metrics"]
    assert metrics["accuracy"]["value"] is not None
    assert metrics["accuracy"]["low"] is None
    assert metrics["auc_low"] == {"value": None, "low": None, "high": None}
    strict(tmp_path / "metrics.json")
    assert "[–]" in (tmp_path / "summary.md").read_text()


def test_retrieval_without_a_gallery_or_an_own_pair(tmp_path):
    found = retrieval(model(), ())
    found = found.model_copy(update={"embeddings": found.embeddings[1:]})
    report(tmp_path, [model()], retrieval=found)
    strict(tmp_path / "metrics.json")
    text = (tmp_path / "summary.md").read_text()
    assert "Retrieval by level" not in text and "Retrieval of the own IHC" not in text


def test_slides_without_one_level_get_no_table_by_slide(tmp_path):
    mixed = report(tmp_path / "a", [model(level=[0, 1, 2, 3], groups=["a", "a", "b", "b"])])
    assert mixed["models"][0]["by_slide"] is None
    assert "patches of different levels, like a" in (tmp_path / "a" / "summary.md").read_text()
    single = report(tmp_path / "b", [model(level=[0, 1, 2, 3], groups=["a", "b", "c", "d"])])
    assert single["models"][0]["by_slide"] is None
    assert "every group is a single patch" in (tmp_path / "b" / "summary.md").read_text()


def test_models_of_different_patches_are_not_compared(tmp_path):
    with pytest.raises(DataError, match="LGD-Net and other do not hold the same patches"):
        report(tmp_path / "new", [model(), model("other", slides=3)])
    assert not (tmp_path / "new").exists()


def manifest(layout="csv", may_leak=False, caveats=(), levels=None, virtual=False):
    """Only what caveats are computed from."""
    splits = {} if levels is None else {"train": Split.model_construct(labels=levels)}
    return Manifest.model_construct(
        layout=layout, may_leak=may_leak, caveats=tuple(caveats), splits=splits, virtual=virtual
    )


def shard_set(manifests):
    return ShardSet(tuple(ShardFolder(Path("shards"), manifest, ()) for manifest in manifests))


@pytest.mark.parametrize(
    ("words", "manifests", "predictions"),
    [
        ("may leak", [manifest(), manifest(may_leak=True)], model()),
        ("of the whole slide", [manifest("bci")], model(level=[0, 1], groups=["a", "b"])),
        ("of the whole slide", [manifest()], model()),
        ("virtual", [manifest("bci", virtual=True)], model()),
        ("Patches of level 0 that are scored: only 15", [manifest()], model()),
        ("only 8. The intervals mean little", [manifest()], model(slides=8)),
        ("very few slides or source patches: 2+ (2), 3+ (2)", [manifest()], model(slides=10)),
        ("No patch of level 0, 3+", [manifest()], model(level=[1, 2] * 5)),
        ("1 of 3 patches have no level", [manifest()], model(level=[1, 2, -1])),
        ("nothing to score", [manifest("mist")], model(level=[-1] * 3)),
        ("background is grey", [manifest("bci")], model()),
        (
            "No patch of level 0, 2+ was in training",
            [manifest(levels={"1+": 3}), manifest(levels={"3+": 1})],
            model(),
        ),
        ("From the shards.", [manifest(caveats=["From the shards."])] * 2, model()),
        ("independent design", [], model()),
    ],
)
def test_caveats_are_computed(words, manifests, predictions):
    found = caveats_of(shard_set(manifests), predictions)
    assert sum(words in caveat for caveat in found) == 1, found


def test_a_sound_split_has_no_caveat_but_the_design():
    sound = model(slides=80, each=5)
    found = caveats_of(shard_set([manifest()]), sound)
    assert [caveat.split(" is ")[0] for caveat in found] == ["A level", "This"]
    varied = model(level=np.arange(400) % 4, each=5)
    assert len(caveats_of(shard_set([manifest()]), varied)) == 1


def test_the_confusion_matrix_takes_absent_levels_and_any_title(tmp_path):
    confusion_matrix(model(level=[1, 1, 2]), tmp_path / "c.png", "an $unfinished formula")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] > 400


def test_without_any_label_no_frame_speaks_of_one(tmp_path):
    asked = query(None)
    unknown = [dataclasses.replace(hit, label=None) for hit in asked.answer.neighbours]
    asked = dataclasses.replace(asked, answer=dataclasses.replace(asked.answer, label=None, neighbours=unknown))
    contact_sheet([asked], tmp_path / "q.png", votes=True)
    with Image.open(tmp_path / "q.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert not (pixels == (153, 153, 153)).all(1).sum() > 500


def test_a_network_that_was_taught_no_label_says_nothing_of_the_patches_labels():
    few = "Slides or source patches that ask: only 1. The intervals mean little."
    blind = model(level=[-1] * 2)
    assert caveats_of(shard_set([manifest()]), blind, taught_labels=False)[0] == few
    assert [one.split(":")[0] for one in caveats_of(shard_set([manifest()]), blind)][:2] == [
        "No patch of this split has a level",
        "Slides or source patches that ask",
    ]


def test_frames_tell_how_far_a_level_is(tmp_path):
    contact_sheet([query(2)], tmp_path / "q.png")
    with Image.open(tmp_path / "q.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {"same": (0, 158, 115), "one off": (230, 159, 0), "beyond": (213, 94, 0), "unknown": (153, 153, 153)}
    for name, colour in colours.items():
        assert (pixels == colour).all(1).sum() > 500, name


def test_real_patches_fill_a_sheet(real_data, tmp_path):
    names = sorted(path.name for path in (real_data / "bci-thumbs" / "HE" / "test").iterdir())[:3]
    images = {
        stain: [np.array(Image.open(real_data / "bci-thumbs" / stain / "test" / name).convert("RGB")) for name in names]
        for stain in ("HE", "IHC")
    }
    levels = [name.removesuffix(".png").split("_")[2] for name in names]
    found = [
        Hit(key=name, slide=None, split="test", label=level, part=0, row=0, distance=0.5)
        for name, level in zip(names, levels, strict=True)
    ]
    rows = [
        Query(
            answer=Answer(image=name, known=HER2, neighbours=found[:2]),
            slide=None,
            label=level,
            he=Field(he, None),
            ihc=Field(ihc, None),
            images=[Picture("IHC", Field(image, None)) for image in images["IHC"][:2]],
        )
        for name, level, he, ihc in zip(names, levels, images["HE"], images["IHC"], strict=True)
    ]
    contact_sheet(rows, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 168 and sheet.height > 3 * 168


def test_what_colour_alone_tells_is_a_caveat(tmp_path):
    """Colour that goes with the level is told; and a network that is not shown to beat it."""
    document = report(tmp_path, [model(skill=3.0), model(COLOUR, 1.5)])
    assert len(document["caveats"]) == 2
    kappa = document["models"][1]["by_patch"]["metrics"]["kappa"]
    assert kappa["low"] > 0 and f"predict the level with a kappa of {kappa['value']:.3f} [" in document["caveats"][1]
    document = report(tmp_path, [model(skill=1.5), model(COLOUR, 1.6)])
    difference = document["differences"][0]["metrics"]["kappa"]
    assert (
        f"LGD-Net is not shown to beat stain and background alone: its kappa minus theirs is {difference['value']:+.3f}"
        in (document["caveats"][2])
    )
    text = (tmp_path / "summary.md").read_text()
    assert describe_colour(HER2) in text and text.count("Stain and background alone, without any shape") == 1
    document = report(tmp_path, [model(skill=3.0), model(COLOUR, 0.0), model("IHC teacher", 3.0)])
    assert document["caveats"] == ["Mind this."]
    report(tmp_path, [model(skill=3.0), model("IHC teacher", 3.0)])
    assert describe_colour(HER2) not in (tmp_path / "summary.md").read_text()


def test_colour_beside_one_group_or_no_level_is_no_caveat(tmp_path):
    """No interval: nothing is claimed."""
    for scored in (
        [model(slides=1), model(COLOUR, slides=1)],
        [model(level=[-1] * 5), model(COLOUR, level=[-1] * 5)],
    ):
        assert report(tmp_path, scored)["caveats"] == ["Mind this."]


@pytest.mark.parametrize("target", [*ALL, NAMED_AS_ITS_WORD], ids=lambda target: target.name)
def test_a_report_follows_its_target(tmp_path, target):
    """In its words, its metrics and its pictures; and the document can be read again."""
    sites = {"center": ["A", "A", "B"] * 20}
    models = [("LGD-Net", 2.0), (COLOUR, 0.5), ("IHC teacher", 4.0)]
    scored = [draw_answers(target, name, skill, sites=sites) for name, skill in models]
    latents = np.random.default_rng(0).normal(size=(60, 4))
    found = measure([Embedding("LGD-Net, latents", latents, latents, latents)], scored[0], scored[0].label, 20, 0)
    values = Values(mean=40.0, std=10.0, least=1.0, most=90.0) if target.is_number else None
    document = report(tmp_path, scored, retrieval=found, taught=Taught(values, {"center": ["A"]}, {}))
    results = Results.read(tmp_path / "metrics.json")
    assert results.predicted == target and ("target" in document) == (target is not HER2)
    assert results.training_sites == {"center": {"A": 1}}
    assert results.models[0].by_patch.metrics.keys() == dict.fromkeys(scored[0].measures.names).keys()
    text, word = (tmp_path / "summary.md").read_text(), target.label_word
    title = target.name if target is NAMED_AS_ITS_WORD else f"{target.name} {word}"
    assert text.startswith(f"# {title} from H&E: report\n") and f"60 have a {word} (" in text
    for title in (
        *scored[0].measures.headline.values(),
        f"Retrieval by {word}",
        "Scores by center",
        "not in training: B.",
    ):
        assert title in text
    assert describe_colour(target) in text and ("### Two ways to score a slide" in text) == (target is HER2)
    assert format_scores(results).splitlines()[0].split()[:3] == ["model", "patches", "groups"]
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == ({"values", "agreement"} if target.is_number else {"confusion", "reliability"})
    assert all(f"]({name}.png)" in text for name in pictures)
    if target.is_number:
        expected = abs(scored[0].label - 40.0).mean()
        assert f"Always answering the mean of the training values would have an MAE of {expected:.3f}." in text
        assert "## Limits of agreement" in text and "| LGD-Net | slide |" in text and "repeated measures" in text
        assert "confusion" not in text and document["levels"] == {"known": 60}
    else:
        assert f"Sensitivity by {word}" in text and f"commonest {word} would reach" in text
    if target is not HER2:
        others = "ASCO", "2+", "HER2-low", *(() if "HER2" in target.name else ("HER2",))
        assert not any(other in text for other in others)


def test_a_report_of_another_kind_leaves_nothing_of_the_last(tmp_path):
    report(tmp_path, [draw_answers(HER2)])
    report(tmp_path, [draw_answers(KI67, groups=[f"s{row}" for row in range(60)])])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["agreement.png", "metrics.json", "predictions-by-patch.csv", "summary.md", "values.png"]
    )
    report(tmp_path, [draw_answers(KI67).without_labels()])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md"}


@pytest.mark.parametrize(
    ("words", "taught", "label"),
    [
        ("No training value is above 60%, and 2 of 24 scored patches are", (20.0, 60.0), [61.0, 75.0]),
        ("No training value is below 20%, and 1 of 24 scored patches are", (20.0, 60.0), [3.0]),
        ("Every training value is 20%", (20.0, 20.0), [30.0]),
        ("only 2. The intervals mean little", (0.0, 100.0), []),
        ("1 of 25 patches have no value", (0.0, 100.0), [np.nan]),
    ],
)
def test_caveats_of_values_are_computed(words, taught, label):
    drawn = draw_answers(KI67, label=[*np.linspace(30, 50, 24 - len([x for x in label if x == x])), *label])
    drawn = dataclasses.replace(
        drawn, groups=[f"s{row % (2 if 'only 2' in words else 12)}" for row in range(len(drawn.keys))]
    )
    split = Split.model_construct(
        labels={"known": 9, "unknown": 0}, values=Values(mean=30.0, std=0.0, least=taught[0], most=taught[1])
    )
    train = manifest()
    train.splits["train"] = split
    found = caveats_of(shard_set([train]), drawn)
    assert sum(words in caveat for caveat in found) == 1, found


def test_constant_values_are_a_caveat():
    alike = draw_answers(KI67, label=[7.0] * 24)
    found = caveats_of(shard_set([manifest()]), alike)
    assert sum("Every scored value is 7%: no correlation is defined" in caveat for caveat in found) == 1


@pytest.mark.parametrize("target", [GRADE, SUBTYPE], ids=lambda target: target.name)
def test_caveats_of_other_classes_have_their_names(target):
    found = caveats_of(shard_set([manifest()]), draw_answers(target, slides=4, each=3))
    assert any(caveat.startswith("Labels that come from very few slides") for caveat in found)
    assert any(caveat.startswith("A label is that of the whole slide") for caveat in found)
    assert any("Telling 1 from 2" in caveat for caveat in found) == (target is GRADE)
    assert not any("level" in caveat for caveat in found)


@pytest.mark.parametrize("target", [HER2, SUBTYPE, KI67], ids=lambda target: target.name)
def test_robustness_is_shown_by_the_metrics_of_the_target(tmp_path, target):
    before, after = draw_answers(target, skill=3.0), draw_answers(target, skill=0.5)
    names = list_robust(before.measures)
    metrics = [score_with_intervals(one, 20, 0, names) for one in (before, after)]
    less = paired_differences(after, before, names, 20, 0)
    at = AtStrength(strength=1.0, label="much", metrics=metrics[1], minus_unchanged=less)
    one = ModelRobustness(name="LGD-Net", unchanged=metrics[0], changes=(UnderChange(name="blur", at=(at,)),))
    text = ChangeText(name="blur", what="out of focus", why="a reason")
    found = measure_results([before], caveats=[], provenance={}, resamples=20, seed=0)
    found = found.model_copy(update={"robustness": Robustness(seed=0, changes=(text,), models=(one,))})
    write_report(tmp_path, found, [before])
    lines = (tmp_path / "summary.md").read_text().splitlines()
    head, titles, main = {
        "Ki67": ("error and correlation", "MAE (%) | Pearson r | concordance", "mae"),
    }.get(target.name, ("accuracy and calibration", "accuracy | kappa | ECE", "kappa"))
    assert f"## Robustness: {head} as images change" in lines and "](robustness.png)" in "".join(lines)
    unit = "MAE (%)" if main == "mae" else main
    assert f"| model | change | {titles} | {unit} minus that of the unchanged |" in lines
    assert any(line.endswith(f"| {format_interval(less[main], '+.3f')} |") for line in lines)
