"""Pages of the documentation site that are made from the code; a hook of mkdocs, which `make docs` runs.

It adds the options of each verb (from the program's own parser), the Python API (from `lgd.__all__`), the diagram of
the package (from its imports), and the documents that lie outside `docs/`. Links to files that are no page become their
paths.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import docstring_parser

import lgd
from lgd.base.arguments import Parser
from lgd.base.markup import escape_markdown
from lgd.cli import VERBS
from lgd.config_files import add_config_arguments
from lgd.shards.options import ShardOptions

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "shards/README.md": "shards-format.md",
    "cluster/README.md": "cluster-files.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
"""Documents outside docs/ -> their pages; the README is the home of the repository, as index.md is that of the site."""
MEMBERS = {
    "Config": ("as_yaml",),
    "ShardSet": ("open", "target", "of_split", "count_labels", "count_groups", "summarise_values"),
    "Store": ("target", "teacher", "rows", "find", "verify"),
}
"""Of an exported class the attributes that a caller needs; all others serve the package itself."""
RETURNED = {
    "lgd.scoring.predict.Scorer": ("config", "device", "folder"),
    "lgd.scoring.predict.Prediction": None,
    "lgd.scoring.slide_answer.SlideScore": (
        "target",
        "virtual",
        "answer",
        "tissue",
        "tiles",
        "failed",
        "blank",
        "notes",
    ),
    "lgd.scoring.slide_answer.SlideAnswer": None,
    "lgd.retrieval.answers.Answer": None,
    "lgd.retrieval.answers.Hit": None,
    "lgd.retrieval.answers.Vote": None,
}
"""What the functions of the API return, and is not exported itself; None for all attributes."""
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile("`[^`]+`")
_HEAD = ("| option | what |", "| --- | --- |")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made = {"options.md": write_options(), "api.md": write_api()}
    made |= {
        page: rewrite_links((ROOT / document).read_text(), document)
        for document, page in OUTSIDE.items()
        if page != "index.md"
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """A page of docs/ with links that work on the site; that of the architecture begins with the diagram."""
    name = page.file.src_uri
    if page.file.generated_by is None:
        markdown = rewrite_links(markdown, f"docs/{name}")
    # GitHub wants a bar in the code of a table escaped, and Python-Markdown shows the backslash.
    markdown = re.sub(r"(?m)^\|.*", lambda row: _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    if name == "development.md":
        title, rest = markdown.split("\n", 1)
        markdown = f"{title}\n\n{draw_imports(read_imports())}\n{_CAPTION}\n{rest}"
    return markdown


def rewrite_links(text: str, document: str) -> str:
    """The Markdown of a document of the repository, with its links as they are on the site."""

    def rewrite(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
        if path in OUTSIDE or path.startswith("docs/"):
            return f"[{words}]({OUTSIDE.get(path, path.removeprefix('docs/'))}{anchor})"
        return f"`{path}`" if words.strip("`") in (path, target) else f"{words} (`{path}`)"

    return _LINK.sub(rewrite, text)


def write_options() -> str:
    """The page of the options of each verb."""
    run = Parser()
    add_config_arguments(run)
    fields = {group.title for group in run._action_groups} - {group.title for group in Parser()._action_groups}
    lines = [
        "# Options of each verb",
        "",
        "This page is made from the program's own parser. `lgd VERB --help` prints the same.",
        "",
    ]
    for name, verb in VERBS.items():
        parser = Parser(f"lgd {name}", verb.summary)
        verb.add(parser)
        groups = {group.title: group for group in parser._action_groups}
        own = [row for title, group in groups.items() if title not in fields for row in _list_options(group)]
        lines += [f"## lgd {name}", "", f"{verb.summary[:1].upper()}{verb.summary[1:]}.", ""]
        lines += ["```text", parser._describe_usage().replace("%%", "%"), "```", ""]
        lines += [*_HEAD, *own, ""]
        if "--config" in parser._option_string_actions:
            lines += ["It also takes every [field of a run](#fields-of-a-run).", ""]
    lines += [
        "## Fields of a run",
        "",
        "In the run's YAML, or as `--section.field VALUE`, of all verbs with `--config`.",
        "",
    ]
    for group in run._action_groups:
        if group.title in fields:
            lines += [f"### {group.title}", "", f"{group.description}", ""]
            lines += [*_HEAD, *_list_options(group), ""]
    return "\n".join(lines)


def _list_options(group: argparse._ArgumentGroup) -> list[str]:
    """The rows of a group's table."""
    rows = []
    for action in group._group_actions:
        if action.dest != "help" and action.help not in (argparse.SUPPRESS, None):
            name = ", ".join(action.option_strings) or str(action.metavar)
            value = f" {action.metavar}" if action.option_strings and action.nargs != 0 and action.metavar else ""
            help_ = escape_markdown(str(action.help).replace("%%", "%"))
            rows.append(f"| `{name}{value}` | {help_} |")
    return rows


def write_api() -> str:
    """The page of the Python API, in the directives of mkdocstrings."""
    names = sorted(lgd._MODULES, key=str.lower)
    exported = [
        _write_build_shards()
        if name == "build_shards"
        else _direct(f"{lgd._MODULES[name]}.{name}", 2, MEMBERS.get(name))
        for name in names
    ]
    intro = "What `import lgd` gives, each as `lgd.NAME`; [From Python](python.md) has examples."
    results = "## What these return\n\nNobody needs to import these classes: the functions above return them."
    returned = [_direct(name, 3, members) for name, members in RETURNED.items()]
    return "\n\n".join(["# Python API", intro, *exported, results, *returned])


def _direct(name: str, level: int, members: Sequence[str] | None) -> str:
    """The directive that stands for the documentation of a name."""
    lines = [f"::: {name}", "    options:", f"      heading_level: {level}"]
    if members:
        lines.append(f"      members: [{', '.join(members)}]")
    return "\n".join(lines)


def _write_build_shards() -> str:
    """`build_shards` is made from the fields of its options, which no reader of the source alone can see."""
    text = docstring_parser.parse(inspect.getdoc(lgd.build_shards) or "", docstring_parser.DocstringStyle.GOOGLE)
    lines = ["## build_shards", "", text.short_description or "", "", text.long_description or "", ""]
    if text.returns:
        lines += [f"Returns: {text.returns.description}", ""]
    lines += ["Raises:", "", *(f"- `{one.type_name}`: {one.description}" for one in text.raises), ""]
    fields = [field.name for field in dataclasses.fields(ShardOptions)]
    return "\n".join([*lines, _direct("lgd.shards.options.ShardOptions", 3, fields)])


class Imports(NamedTuple):
    """Which folders of the package import which."""

    levels: tuple[tuple[str, ...], ...]
    """The folders, by the longest chain of imports below them; those of one level do not import each other."""
    counts: Mapping[tuple[str, str], int]
    """(importing, imported) -> how many modules of the first import the second."""


def read_imports() -> Imports:
    """The imports between the folders of lgd/; the modules of the root count as `config`, `metrics` and `pipeline`."""
    package = Path(lgd.__file__).parent
    counts = Counter[tuple[str, str]]()
    for path in sorted(package.rglob("*.py")):
        folder = _name_folder(path.relative_to(package).with_suffix("").parts)
        targets = {_name_folder(parts) for parts in _list_imported(ast.parse(path.read_text()))}
        counts.update((folder, target) for target in targets - {folder, ""} if folder)

    @functools.cache
    def find_level(folder: str) -> int:
        return max((find_level(target) + 1 for importer, target in counts if importer == folder), default=0)

    folders = {folder for pair in counts for folder in pair}
    highest = max(map(find_level, folders))
    levels = (tuple(sorted(one for one in folders if find_level(one) == level)) for level in range(highest + 1))
    return Imports(levels=tuple(levels), counts=counts)


def _name_folder(parts: tuple[str, ...]) -> str:
    """The box of a module; none of the package's own `__init__`, which imports when it is asked."""
    if parts[0] in ("config_sections", "config", "config_files"):
        return "config"
    return {"comparisons": "pipeline", "__init__": "", "__main__": "", "configs": ""}.get(parts[0], parts[0])


def _list_imported(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{one.name}" for one in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "lgd" and parts and parts[0] != "__version__":
                yield tuple(parts)


_CAPTION = """*Drawn from the imports of the code. A dot: modules of the folder at the left import the folder above; the
larger the dot, the more modules. All dots lie left of the diagonal, and folders between two lines do not import each
other.*
"""
_CELL, _LEFT, _TOP = 30, 110, 96


def draw_imports(imports: Imports) -> str:
    """The imports as an SVG in one line of HTML: a row imports the columns that have a dot in it."""
    folders = [folder for level in imports.levels for folder in level]
    size = _CELL * len(folders)
    drawn = []
    for number, folder in enumerate(folders):
        middle = number * _CELL + _CELL // 2
        x, y = _LEFT + middle, _TOP + middle
        drawn.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{folder}</text>')
        drawn.append(f'<text transform="translate({x + 4} {_TOP - 10}) rotate(-60)">{folder}</text>')
        drawn.append(f'<rect class="self" x="{x - 15}" y="{y - 15}" width="{_CELL}" height="{_CELL}"/>')
        for other, target in enumerate(folders):
            if count := imports.counts.get((folder, target)):
                word = "module" if count == 1 else "modules"
                title = f"<title>{count} {word} of {folder} import {target}</title>"
                x = _LEFT + other * _CELL + _CELL // 2
                drawn.append(f'<circle cx="{x}" cy="{y}" r="{3 + min(count, 16) ** 0.5 * 2:.1f}">{title}</circle>')
    edge = 0
    for level in ((), *imports.levels):
        edge += _CELL * len(level)
        drawn.append(f'<path class="level" d="M{_LEFT - 100} {_TOP + edge}H{_LEFT + size}"/>')
    label = "Which folders of the package import which"
    box = f"0 0 {_LEFT + size + 60} {_TOP + size + 4}"
    return f'<svg class="imports" role="img" aria-label="{label}" viewBox="{box}">{"".join(drawn)}</svg>\n'
