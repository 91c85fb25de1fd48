"""Messages of errors without a path of this machine."""

import pytest

from lgd.base.errors import ConfigError, DataError
from lgd.serve.messages import SEE_LOG, explain


@pytest.mark.parametrize(
    "message",
    [
        "/srv/slides/a.tif is damaged",
        "damaged: /srv/x.tif",
        "'/srv/a b/c.tif' is damaged",
        "s3://bucket/key is gone",
        "(/etc/passwd)",
        "at=/tmp/one",
        "/root",
        "C is in results/a/b/parts",
        "file:///x",
        "~/slides/a.tif",
        "../slides/a.tif",
    ],
)
def test_no_path_is_shown(message):
    assert explain(DataError(message), {}) == SEE_LOG


def test_known_paths_are_named_and_what_is_no_path_stays():
    names = {"/srv/slides/a.tif": "slide 1", "/srv/slides": "its folder", "": "nothing"}
    assert explain(DataError("/srv/slides/a.tif is damaged"), names) == "slide 1 is damaged"
    assert explain(DataError("/srv/slides/b.tif is damaged"), names) == "its folder/b.tif is damaged"
    for message in ("H&E and/or IHC", "3 tiles/s", "has 0.25 um/px", "2 / 3 of it", "none: GET /patches lists them"):
        assert explain(DataError(message), names) == message
    assert (
        explain(ConfigError("give --mpp X, or --mpp unknown, or --label"), {}) == "give mpp=X, or mpp=unknown, or label"
    )


def test_only_the_first_line_is_shown_and_it_is_short_and_plain():
    assert explain(DataError("one", "/srv/secret"), {}) == "one"
    shown = explain(DataError("\x1b[31m\n" + "a" * 5000), {})
    assert len(shown) < 1050 and shown.isprintable()
    assert explain(DataError(), {}) == ""
