"""The card of a student, before and after it is scored."""

import dataclasses
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_answers import HER2, draw_answers

from lgd import pipeline
from lgd.base.plain_yaml import read_yaml
from lgd.cli import main
from lgd.models.description import StudentConfig, TeacherRef
from lgd.report.card import is_untouched, make_card, make_head, seal, state_licence, write_card
from lgd.report.card_facts import Part, gather_facts
from lgd.report.checklist import TITLES, describe_items
from lgd.report.evaluation import measure_results
from lgd.report.results import Results
from lgd.report.sites import Taught
from lgd.scoring.predict import load_scorer
from lgd.shards.shard_set import ShardSet

SECTIONS = """
Results|What it predicts, and from what|Intended use|How to use it|Training data|Teachers|Licence|Method and settings
Caveats|Provenance|TRIPOD+AI
""".strip().replace("\n", "|")
EVIL = "x\n\n# Result\n\n---\nlicense: mit\n<img src=http://evil/b.png> [click](javascript:alert(1)) \x1b[2J | y"


def read_card(config):
    return (Path(config.student.dir) / "README.md").read_text()


def split_card(text):
    """The metadata of a card, and its sections by their titles."""
    _, head, body = text.split("---\n", 2)
    parts = re.split(r"^## (.*)$", body, flags=re.MULTILINE)
    return read_yaml(head).value, dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def carded(tissue_run, change, tmp_path_factory):
    """A run that trained a student of the teacher of `tissue_run`, and its card."""
    folder = tmp_path_factory.mktemp("carded")
    student = {"dir": str(folder / "run" / "student"), "epochs": 0.5}
    report = {"dir": str(folder / "run" / "report"), "queries": 0}
    config = change(tissue_run, run={"dir": str(folder / "run")}, student=student, report=report)
    pipeline.train_student(config)
    return config, read_card(config)


@pytest.fixture(scope="module")
def scored(carded):
    """That run, its card after an evaluation, and the report's numbers."""
    config, _ = carded
    pipeline.evaluate(config)
    return config, read_card(config), Results.read(Path(config.report.dir) / "metrics.json")


@pytest.fixture
def copied(scored, change, tmp_path):
    """A copy of the scored run, which a test may change."""
    shutil.copytree(scored[0].run.dir, tmp_path / "run")
    folders = {
        "student": {"dir": str(tmp_path / "run" / "student")},
        "report": {"dir": str(tmp_path / "run" / "report")},
    }
    return change(scored[0], run={"dir": str(tmp_path / "run")}, **folders), scored[2]


def test_without_results_it_says_how_to_get_them(carded):
    config, text = carded
    head, sections = split_card(text)
    assert head["library_name"] == "lgd" and head["pipeline_tag"] == "image-classification"
    assert {"lgd", "her2", "virtual-tissue"} < {*head["tags"]}
    assert "|".join(sections) == SECTIONS
    assert "lgd evaluate --config RUN/config.yaml" in sections["Results"] and "accuracy" not in sections["Results"]
    assert "it was not scored" in sections["Caveats"]
    assert "Real tissue: it saw what a program drew" in sections["Intended use"]
    student = StudentConfig.read_folder(config.student.dir)
    assert student.weights_sha256 in sections["Provenance"] and student.training.shards[0] in sections["Training data"]
    assert "| teacher | trained | resnet10 | label |" in sections["Teachers"]
    assert "epochs 0.5" in sections["Method and settings"] and "lr 0.001" in sections["Method and settings"]
    for name, count in student.training.labels.items():
        assert f"| {name} | {count} |" in sections["Training data"]
    assert config.run.dir not in text, "nobody else needs to know where it lay"
    assert is_untouched(text.encode())


def test_an_evaluation_adds_what_the_report_says(scored):
    config, text, results = scored
    head, sections = split_card(text)
    report = (Path(config.report.dir) / "summary.md").read_text()
    rows = [
        line for line in report.splitlines() if line.startswith(("| LGD-Net |", "| IHC teacher |", "| colour only"))
    ]
    # Patches, and slides.
    assert len(rows) >= 6 and all(row in sections["Results"] for row in rows[:3])
    assert "20 patches of" in sections["Results"] and "Split test" in sections["Results"]
    for caveat in results.caveats:
        assert caveat[:60] in sections["Caveats"]
    assert results.provenance["student"] in sections["Provenance"]
    assert all(digest in sections["Provenance"] for digest in results.provenance["shards"])
    assert "scored patches" in sections["Training data"] and "| train | 20 | 20 |" in sections["Training data"]
    assert "not scored" not in text and config.run.dir not in text
    assert head == split_card(text)[0] and is_untouched(text.encode())


def test_the_same_commands_keep_it(copied, caplog):
    config, _ = copied
    before = read_card(config)
    pipeline.train_student(config)
    assert read_card(config) == before


def test_a_folder_that_was_copied_elsewhere_is_the_same_model(scored, tmp_path, capsys):
    config = scored[0]
    shutil.copytree(config.student.dir, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    assert main(["verify", str(tmp_path / "model")]) == 0 and main(["info", str(tmp_path / "model")]) == 0
    assert "no problems" in capsys.readouterr().out
    image_BHW3 = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    ours, theirs = (load_scorer(folder).score(image_BHW3) for folder in (config.student.dir, tmp_path / "model"))
    assert (ours["output"] == theirs["output"]).all() and (ours["query"] == theirs["query"]).all()


def test_a_card_that_somebody_changed_is_left_as_it_is(copied, caplog):
    config, results = copied
    path = Path(config.student.dir) / "README.md"
    path.write_text(path.read_text().replace("Left to people", "Filled in by people"))
    before = path.read_text()
    write_card(config, ShardSet.open(config.shard_dirs), results)
    assert path.read_text() == before and "is not as lgd wrote it" in caplog.text
    # Somebody's own, too.
    path.write_text("# My model\n")
    write_card(config, ShardSet.open(config.shard_dirs))
    assert path.read_text() == "# My model\n"


def test_another_run_leaves_the_card(copied, change, tmp_path, caplog):
    config, results = copied
    before = read_card(config)
    other = change(config, run={"dir": str(tmp_path / "other")}, report={"dir": str(tmp_path / "other" / "report")})
    with caplog.at_level(logging.INFO, "lgd"):
        write_card(other, ShardSet.open(config.shard_dirs), results.model_copy(update={"caveats": ("Another.",)}))
    assert read_card(config) == before and "this run did not train the student" in caplog.text


def test_another_network_in_the_folder_has_no_results_of_the_last(copied, change):
    config, _ = copied
    assert "Split test" in read_card(config)
    longer = change(config, student={"epochs": 0.8})
    pipeline.train_student(longer, overwrite=True)
    sections = split_card(read_card(config))[1]
    assert "Not scored yet" in sections["Results"] and "epochs 0.8" in sections["Method and settings"]
    assert StudentConfig.read_folder(config.student.dir).weights_sha256 in sections["Provenance"]


def test_a_card_that_cannot_be_written_is_a_warning(copied, caplog):
    config, results = copied
    path = Path(config.student.dir) / "README.md"
    path.unlink()
    path.mkdir()
    write_card(config, ShardSet.open(config.shard_dirs), results)
    assert "README.md was not written" in caplog.text
    assert [one.name for one in path.parent.iterdir() if one.name.endswith(".tmp")] == []


def test_a_folder_that_is_read_only_does_not_end_an_evaluation(copied, change, disk, caplog):
    config, _ = copied
    folder = disk("size=50m")
    shutil.copytree(config.student.dir, folder / "student", ignore=shutil.ignore_patterns("checkpoints"))
    disk("ro")
    pipeline.evaluate(change(config, student={"dir": str(folder / "student")}))
    assert "no pictures in TensorBoard" in caplog.text and "README.md was not written" in caplog.text


def test_text_of_others_is_only_text(copied):
    config, results = copied
    facts = gather_facts(config, ShardSet.open(config.shard_dirs), results)
    target = facts.target.model_copy(
        update={"name": EVIL, "classes": (EVIL, "1+", "2+", "3+"), "unit": EVIL, "groups": None}
    )
    training = facts.config.training.model_copy(update={"target": target, "labels": {EVIL: 3, "unknown": 1}})
    # Names of encoders have no line breaks.
    name = " ".join(re.split(r"[\x00-\x1f]+", EVIL))
    encoder = facts.config.morphology.model_copy(update={"name": f"hf:{name}", "licence": EVIL})
    evil = dataclasses.replace(
        facts,
        config=facts.config.model_copy(update={"training": training, "morphology": encoder, "engine": EVIL}),
        teachers=[
            facts.teachers[0]._replace(
                encoder=EVIL,
                learnt=[EVIL],
                ref=TeacherRef.model_construct(name=EVIL, weights_sha256="a" * 64, licence=EVIL),
            )
        ],
        sites={"center": {EVIL: 3}},
        settings={"student.method": EVIL},
        commands=dict.fromkeys(facts.commands, EVIL),
        results=results.model_copy(update={"caveats": (EVIL,), "target": target, "levels": {EVIL: 2}}),
    )
    text = make_card(evil)
    head, sections = split_card(text)
    assert "|".join(sections) == SECTIONS and len(re.findall("^# ", text, re.MULTILINE)) == 1
    assert head["license"] == "other" and head["base_model"] == name.partition("@")[0]
    # Of code nothing is rendered.
    body = re.sub("(?m)^    .*$", "", text.split("---\n", 2)[2])
    assert not re.search(r"(?m)<img|\x1b|^(# Result|license: mit)|[^\\]\[click", body)
    assert make_head(evil)["tags"].count("lgd") == 1


def test_centers_are_counted_and_scored_one_by_one(scored):
    config, _, results = scored
    sites = {"center": ["A", "A", "B"] * 20}
    answers = [draw_answers(HER2, name, sites=sites) for name in ("LGD-Net", "H&E-only")]
    taught = Taught(None, {"center": ["A", "A", "C", ""]}, {})
    by_center = measure_results(answers, caveats=[], provenance=results.provenance, resamples=10, seed=0, taught=taught)
    facts = gather_facts(config, ShardSet.open(config.shard_dirs), by_center)
    sections = split_card(make_card(facts))[1]
    of_sites = sections["Results"].partition("By center, by patch:")[2]
    assert "| A | 40 |" in of_sites and "| B | 20 |" in of_sites and of_sites.count("| A |") == 1
    assert "| A | 2 |" in sections["Training data"] and "| unknown | 1 |" in sections["Training data"]
    items = describe_items(facts)
    assert items["6a"].startswith("2 centers in training: A, C.") and {"12d", "16", "23b"} <= items.keys()


def test_code_of_others_is_named(scored):
    config, text, _ = scored
    assert "--code" not in text
    facts = gather_facts(config, ShardSet.open(config.shard_dirs), None)
    encoder = facts.config.morphology.model_copy(update={"name": "python:mine:encoder"})
    outside = dataclasses.replace(facts, config=facts.config.model_copy(update={"morphology": encoder}))
    assert "allowed by --code: python:mine:encoder." in make_card(outside)


@pytest.mark.parametrize(
    ("licences", "head"),
    [
        (["Apache-2.0", "apache-2.0"], {"license": "apache-2.0"}),
        (["CC-BY-NC-ND 4.0"], {"license": "cc-by-nc-nd-4.0"}),
        (["MIT", None], {"license": "other", "license_name": "not-stated-for-all-parts"}),
        ([None], {"license": "other", "license_name": "not-stated-for-all-parts"}),
        (["MIT", "Apache-2.0"], {"license": "other", "license_name": "terms-of-its-parts"}),
        (["CC-BY-NC-ND 4.0; no more"] * 2, {"license": "other", "license_name": "terms-of-its-parts"}),
    ],
)
def test_the_licence_is_stated_where_all_parts_state_it(licences, head):
    assert state_licence([Part("p", "e", licence, False) for licence in licences]) == head


def test_terms_that_nobody_knows_are_named(copied):
    config, _ = copied
    facts = gather_facts(config, ShardSet.open(config.shard_dirs), None)
    licence = split_card(make_card(facts))[1]["Licence"]
    assert licence.count("its weights were random before training") == 3 and "Not known" not in licence
    encoder = facts.config.morphology.model_copy(update={"name": "hf:org/name"})
    unknown = dataclasses.replace(facts, config=facts.config.model_copy(update={"morphology": encoder}))
    head, sections = split_card(make_card(unknown))
    assert "Not known: the terms of the student's encoder." in sections["Licence"]
    assert head["base_model"] == "org/name"
    teacher = facts.teachers[0]
    terms = dataclasses.replace(
        facts, teachers=[teacher._replace(ref=teacher.ref.model_copy(update={"licence": "MIT"}))]
    )
    assert "| the teacher teacher | resnet10 | MIT |" in make_card(terms)


def test_the_checklist_is_whole(scored):
    config, text, results = scored
    assert len(TITLES) == 52 and {int(re.match(r"\d+", number)[0]) for number in TITLES} == {*range(1, 28)}
    facts = gather_facts(config, ShardSet.open(config.shard_dirs), results)
    filled, section = describe_items(facts), split_card(text)[1]["TRIPOD+AI"]
    table, _, left = section.partition("Left to people")
    for number, title in TITLES.items():
        assert (f"| {number} | {title} |" in table) == (number in filled)
        assert (f"{number} ({title})" in left) == (number not in filled)
    assert {"12a", "15", "21", "22", "23a"} <= filled.keys() and not {"1", "17", "18a", "19"} & filled.keys()
    # What was not scored has no performance.
    assert not {"12e", "23a", "24"} & describe_items(dataclasses.replace(facts, results=None)).keys()


def test_a_seal_breaks_by_any_change():
    sealed = seal("# A card\n\ntext\n")
    assert is_untouched(sealed)
    for other in (b"", b"text\n", sealed + b"x", sealed.replace(b"text", b"tex"), sealed[:-1], sealed + sealed):
        assert not is_untouched(other)
