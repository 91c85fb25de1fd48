"""The documentation: what the site lists, where its links lead, and whether its commands and code can be read."""

import dataclasses
import functools
import importlib
import itertools
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml

import lgd
from lgd.base.arguments import Parser
from lgd.cli import VERBS
from lgd.config_files import config_of
from tests.test_layers import imported, modules, own
from tools import site_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = sorted({*site_pages.OUTSIDE, *(f"docs/{name}" for name in PAGES)})
MAKE = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)


@functools.cache
def read_prose(document: str) -> str:
    """A document without its blocks of code, and without the code in its lines."""
    text = re.sub(r"(?ms)^```.*?^```", "", (ROOT / document).read_text())
    return re.sub(r"(?m)^    .*$", "", re.sub(r"`[^`\n]*`", lambda code: code[0].strip("`").replace("[", "("), text))


def list_anchors(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and mkdocs make them."""
    seen = Counter[str]()
    anchors = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", read_prose(document)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def list_blocks(language: str) -> list[tuple[str, str]]:
    """Document and text of each block of code in a language."""
    return [
        (document, block)
        for document in DOCUMENTS
        for block in re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / document).read_text())
    ]


def list_lines() -> list[tuple[str, list[str]]]:
    """Document and words of each line of a shell block."""
    lines = [
        (document, shlex.split(line, comments=True))
        for document, block in list_blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(document, words) for document, words in lines if words]


def find_verb(words: list[str]) -> list[str]:
    """The verb of lgd and its arguments in a line, which may set variables or give the command to another program."""
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        if word == "lgd" and (not before or before in ("-m", "do", "&&") or re.match(r"[A-Z_]+=", before)):
            return words[number + 1 :]
    return []


COMMANDS = [(document, verb) for document, words in list_lines() if (verb := find_verb(words))]


def test_the_navigation_lists_every_page_once():
    def flatten(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in flatten(inner)]

    listed = flatten(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted({*PAGES, *site_pages.OUTSIDE.values(), "options.md", "api.md"})


def test_the_site_loads_nothing_from_other_hosts():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert not {"extra_javascript", "extra", "repo_url"} & {*settings} and settings["extra_css"] == ["site.css"]
    assert "url(" not in (ROOT / "docs" / "site.css").read_text()


def test_the_readme_is_short_and_the_index_lists_every_page():
    assert len((ROOT / "README.md").read_text().split()) <= 1500
    index = (ROOT / "docs" / "index.md").read_text()
    assert [name for name in PAGES if name != "index.md" and f"]({name})" not in index] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_anchors_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / document).parent / name).resolve() if name else ROOT / document
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in list_anchors(str(path.relative_to(ROOT))), target


def test_there_are_commands():
    assert len(COMMANDS) > 80 and {verb for _, (verb, *_) in COMMANDS} == {*VERBS}


@pytest.mark.parametrize("document", sorted({document for document, _ in COMMANDS}))
def test_every_command_is_one_that_the_program_takes(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, (verb, *args) in COMMANDS:
        if name != document:
            continue
        parser = Parser(f"lgd {verb}")
        VERBS[verb].add(parser)
        namespace = parser.parse(args)
        if (files := vars(namespace).get("config")) and all(Path(file).is_file() for file in files):
            config_of(namespace)


def test_what_else_is_run_is_in_the_repository():
    for document, words in list_lines():
        if words[0] == "make":
            assert [word for word in words[1:] if "=" not in word and word not in MAKE] == [], (document, words)
        for before, word in itertools.pairwise(words):
            # Another commit has other files.
            if before == "python" and word.endswith(".py") and words[:2] != ["git", "checkout"]:
                assert (ROOT / word).is_file(), (document, words)


def test_every_block_of_python_is_python():
    blocks = list_blocks("python")
    assert blocks
    for document, block in blocks:
        compile(block, document, "exec")


def test_the_page_of_options_has_all_that_the_help_has():
    page = site_pages.write_options()
    sections = dict(re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", page))
    assert {*sections} == {*(f"lgd {verb}" for verb in VERBS), "Fields of a run"}
    fields = {*re.findall(r"--[a-z_]+\.[a-z_]+|--deepspeed", sections.pop("Fields of a run"))}
    for name, text in sections.items():
        parser = Parser(name)
        VERBS[name.removeprefix("lgd ")].add(parser)
        shown = {*re.findall(r"(?m)^  (?:-\w, )?(--[\w.-]+)", parser.format_help())} - {"--help"}
        assert shown <= {*re.findall(r"--[\w.-]+", text)} | fields, name
        assert not re.search(r"\| `.* \|  \|$", text, re.MULTILINE), f"{name}: an option without words"


def test_the_page_of_the_api_has_all_public_names():
    named = dict(re.findall(r"(?m)^::: (\S+)\n    options:\n      heading_level: \d\n?(.*)", site_pages.write_api()))
    exported = {f"{module}.{name}" for name, module in lgd._MODULES.items()}
    assert exported - {*named} == {"lgd.shards.builder.build_shards"} and "lgd.shards.options.ShardOptions" in named
    for path, members in named.items():
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        known = {*dir(value), *getattr(value, "model_fields", {})}
        known |= {one.name for one in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        assert {*re.findall(r"\w+", members.partition(":")[2])} <= known, path


def test_the_diagram_shows_the_imports():
    """Compared with those that tests/test_layers.py finds."""
    roots = {"config_sections": "config", "config_files": "config", "comparisons": "pipeline"}

    def folder(module):
        first = module.partition(".")[0]
        return roots.get(first, first)

    pairs = {(folder(name), folder(to)) for name, tree in modules().items() for to in map(own, imported(tree)) if to}
    expected = {(one, other) for one, other in pairs if one != other}
    imports = site_pages.read_imports()
    assert {*imports.counts} == expected
    level = {name: number for number, names in enumerate(imports.levels) for name in names}
    assert {*level} == set(map(folder, modules())) and all(level[one] > level[other] for one, other in expected)
    drawn = site_pages.draw_imports(imports)
    assert drawn.count("<circle") == len(expected) and "\n" not in drawn.rstrip("\n")


@pytest.mark.parametrize("name", ["bug.yml", "question.yml"])
def test_an_issue_form_names_each_field_once(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    fields = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert {"name", "description", "body"} <= {*form} and len(fields) == len({*fields}) > 2


def test_links_out_of_the_pages_become_paths():
    text = "[a](store.md#x), [b](../shards/README.md#urls), [the study](../tools/studies/real.py), [c](https://e.org)"
    assert site_pages.rewrite_links(text, "docs/slides.md") == (
        "[a](store.md#x), [b](shards-format.md#urls), the study (`tools/studies/real.py`), [c](https://e.org)"
    )
    assert site_pages.rewrite_links("[head.sh](head.sh)", "cluster/README.md") == "`cluster/head.sh`"
