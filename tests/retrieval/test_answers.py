import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.retrieval.answers import Answer, Hit, Stored
from lgd.retrieval.index_files import IndexDocument
from lgd.retrieval.rows import as_json, as_rows, as_table
from lgd.retrieval.search import NEAR_DUPLICATE, NEAR_WHITENED, choose_near, near_duplicates

HER2 = find_target("her2")


def hit(label, distance=0.5, **changed):
    fields = {"key": "k", "slide": None, "split": "train", "part": 0, "row": 0} | changed
    return Hit(label=label, distance=distance, **fields)


@pytest.mark.parametrize(
    ("levels", "winner", "bits"),
    [
        (["2+", "2+", "3+"], "2+", 0.9183),
        (["3+", "2+", "2+", "3+"], "3+", 1.0),
        (["0", "2+", "2+", "0", None], "0", 1.0),
        (["1+", None, None], "1+", 0.0),
        (["0", "1+", "2+", "3+"], "0", 2.0),
        ([None, None], None, None),
        ([], None, None),
    ],
)
def test_the_vote(levels, winner, bits):
    found = Answer(known=HER2, neighbours=[hit(level) for level in levels]).vote
    known = [level for level in levels if level]
    assert (found.level, found.labelled) == (winner, len(known))
    assert found.entropy_bits == (None if bits is None else pytest.approx(bits, abs=1e-4))
    expected = {name: known.count(name) / len(known) if known else None for name in HER2.classes}
    assert found.shares == expected


def test_near_duplicates_point_to_the_query_or_the_nearest_before_them():
    def turned(angle):
        return [np.cos(angle), np.sin(angle)]

    # A turn by 0.04 is a distance of 0.0008, one by 0.08 of 0.0032.
    vectors = np.array([turned(a) for a in (0.5, 0.54, 0.58, 0.9, 0.51)])
    distance = np.array([0.0005, 0.1, 0.2, 0.3, 0.4])
    assert near_duplicates(list("abcde"), distance, vectors) == ["query", "a", "b", None, "a"]
    naive = [
        next((k for k, v in zip("abcde", vectors[:row], strict=False) if 1 - v @ vectors[row] < 0.001), None)
        for row in range(5)
    ]
    assert naive == [None, "a", "b", None, "a"]
    assert near_duplicates(list("abcde"), distance, vectors, near=0.05) == ["query", "a", "a", None, "a"]


@pytest.mark.parametrize(
    ("whitened", "dim", "near"), [(True, 32, NEAR_WHITENED), (True, 15, NEAR_DUPLICATE), (False, 512, NEAR_DUPLICATE)]
)
def test_what_is_near_goes_by_how_an_index_compares(whitened, dim, near):
    assert choose_near(IndexDocument.model_construct(whitening=whitened or None, dim=dim)) == near


@pytest.fixture
def answers():
    stored = Stored(key="q", slide="s1", split="test", label="3+", part=3, row=4)
    hits = [hit("2+", key="a", slide="s"), hit(None, key="b", duplicate_of="a"), hit("0", key="c")]
    chances = dict.fromkeys(HER2.classes, 0.25)
    return [
        Answer(
            image="x/he.png",
            label="1+",
            probabilities=chances,
            target=HER2,
            known=HER2,
            stored=None,
            neighbours=hits,
            notes=["pale", "small"],
        ),
        Answer(known=HER2, stored=stored, neighbours=hits[:1]),
    ]


def test_the_json_has_the_same_fields_for_images_and_keys(answers):
    image, key = as_json(answers)
    fields = ["image", "level", "probabilities", "stored", "neighbours", "vote", "notes"]
    assert list(image) == list(key) == fields
    assert (image["notes"], key["notes"]) == (["pale", "small"], [])
    assert (image["image"], image["level"], image["stored"]) == ("x/he.png", "1+", None)
    assert (key["image"], key["level"], key["probabilities"]) == (None, None, None)
    assert key["stored"] == {"key": "q", "slide": "s1", "split": "test", "level": "3+"}
    first, second, _ = image["neighbours"]
    assert first == {
        "key": "a",
        "slide": "s",
        "split": "train",
        "level": "2+",
        "distance": 0.5,
        "duplicate_of": None,
    }
    assert second["duplicate_of"] == "a"
    assert image["vote"] == {
        "level": "2+",
        "shares": {"0": 0.5, "1+": 0.0, "2+": 0.5, "3+": 0.0},
        "entropy_bits": 1.0,
        "labelled": 2,
    }


def test_csv_rows_have_the_columns_that_the_docstring_lists(answers):
    from lgd.retrieval import rows as module

    found = as_rows(answers)
    listed = (module.__doc__ or "").split("one row a neighbour (`as_rows`):")[1].split(".")[0]
    assert all([*row] == [name.strip() for name in listed.split(",")] for row in found)
    assert [row["rank"] for row in found] == [1, 2, 3, 1]
    assert [row["query_key"] for row in found] == [None, None, None, "q"]
    assert [row["vote_share"] for row in found] == [0.5, 0.5, 0.5, 1.0]
    assert [row["notes"] for row in found] == ["pale; small"] * 3 + [""]
    assert found[0]["image"] == "x/he.png" and found[3]["image"] is None


def test_the_table_ends_each_query_with_its_vote(answers):
    (*hits, voted) = as_table(answers[:1])
    assert all(list(row) == list(voted) for row in hits)
    assert (voted["rank"], voted["level"], voted["key"]) == ("vote", "2+", "0 0.50, 2+ 0.50 (1.00 bits)")
    assert [row["notes"] for row in (*hits, voted)] == ["", "", "", "pale; small"]
    assert "predicted" in voted and "predicted" not in as_table(answers[1:])[0]
