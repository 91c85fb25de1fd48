"""Queries by key, filters and searches, on stores of known vectors."""

import csv
import io
import json

import numpy as np
import pytest

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.retrieval.answers import collect_notes, count_neighbours
from lgd.retrieval.queries import query
from lgd.retrieval.rows import as_json
from lgd.retrieval.search import NEAR_DUPLICATE, Searcher
from lgd.store.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_store):
    """90 rows of train and val, of 6 slides and one unknown, and 10 of test, which the index does not hold.

    `twin` all but repeats `a-000`; `both` is in two parts.
    """
    random = np.random.default_rng(0)

    def rows(letter, count):
        return [
            (f"{letter}-{row:03d}", f"s{row % 7}" if row % 7 else "", row % 5 - 1, random.standard_normal(8))
            for row in range(count)
        ]

    first, second, val, test = rows("a", 40), rows("b", 40), rows("c", 10), rows("d", 10)
    first.append(("both", "s1", 0, random.standard_normal(8)))
    second += [
        ("both", "s2", 3, random.standard_normal(8)),
        ("twin", "s5", 3, first[0][3] + 0.01 * random.standard_normal(8)),
    ]
    parts = [("train", first), ("train", second), ("val", val), ("test", test)]
    return write_store(tmp_path_factory.mktemp("keys") / "s", parts, ("train", "val"))


def brute_force(store, key_part, row, k, keep=lambda entry: True):
    """(part, row) of the nearest by cosine in double precision, without the row itself."""
    vector = np.asarray(store.parts[key_part].array("pooled")[row, 0], np.float64)
    found = []
    for number, part in enumerate(store.parts):
        if part.split == "test":
            continue
        for other in range(part.rows):
            there = np.asarray(part.array("pooled")[other, 0], np.float64)
            label, slide = (part.array(name)[other] for name in ("label", "slide"))
            entry = (part.split, int(np.nan_to_num(label, nan=-1)), bytes(slide).decode())
            if (number, other) != (key_part, row) and keep(entry):
                cosine = there @ vector / np.linalg.norm(there) / np.linalg.norm(vector)
                found.append((1 - cosine, number, other))
    return [address for _, *address in sorted(found)[:k]]


def addresses(answer):
    return [[hit.part, hit.row] for hit in answer.neighbours]


@pytest.mark.parametrize("key", ["a-007", "b-011", "c-003", "d-004"])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_a_stored_latent_finds_what_brute_force_finds_but_itself(store, key, k):
    ((part, row),) = store.find(key)
    (answer,) = query(None, store, keys=[key], k=k)
    assert addresses(answer) == brute_force(store, part, row, k)
    assert (answer.stored.key, answer.stored.part, answer.stored.row) == (key, part, row)
    assert (answer.image, answer.level, answer.probabilities) == (None, None, None)


def test_filters_leave_what_they_name(store):
    ((part, row),) = store.find("a-007")
    for splits in (None, ["val"], ["val", "train"]):
        for levels in (None, ["0"], ["1+", "3+"]):
            numbers = range(-1, 4) if levels is None else [store.target.classes.index(level) for level in levels]
            (answer,) = query(None, store, keys=["a-007"], k=9, splits=splits, levels=levels)

            def keep(entry, splits=splits, numbers=numbers):
                return entry[0] in (splits or ["train", "val"]) and entry[1] in numbers

            assert addresses(answer) == brute_force(store, part, row, 9, keep)


def test_the_same_slide_and_unknown_ones_are_left_out(store):
    keys = ["a-001", "a-002", "b-001", "b-006", "d-003"]
    answers = query(None, store, keys=keys, k=6, splits=["train"], exclude_same_slide=True)
    for key, answer in zip(keys, answers, strict=True):
        ((part, row),) = store.find(key)
        own = answer.stored.slide

        def keep(entry, own=own):
            return entry[0] == "train" and entry[2] not in ("", own)

        assert own and addresses(answer) == brute_force(store, part, row, 6, keep)


def test_searches_are_one_or_one_a_slide(store, monkeypatch):
    """The speed of a batch: what FAISS is asked is counted, and it answers as always."""
    asked = []
    search = Searcher.search

    def counted(self, vectors_nD, *options):
        asked.append(len(vectors_nD))
        return search(self, vectors_nD, *options)

    monkeypatch.setattr(Searcher, "search", counted)
    keys = ["a-001", "a-008", "b-001", "b-006"]
    query(None, store, keys=keys, k=3, levels=["0"])
    assert asked == [4]
    asked.clear()
    query(None, store, keys=keys, k=3, exclude_same_slide=True)
    assert sorted(asked) == [1, 3]


def test_a_twin_is_marked_and_counted(store):
    (answer,) = query(None, store, keys=["a-000"], k=3)
    assert [hit.key for hit in answer.neighbours if hit.duplicate_of == "query"] == ["twin"]
    (other,) = query(None, store, keys=["a-001"], k=100)
    marked = {hit.key: hit.duplicate_of for hit in other.neighbours if hit.duplicate_of}
    assert marked in ({"twin": "a-000"}, {"a-000": "twin"})
    line = count_neighbours([answer, other], NEAR_DUPLICATE)
    assert line.endswith("near-duplicates (closer than 0.001 to the query or to a nearer neighbour): 2")


def test_a_key_of_several_parts_is_told_and_answered_for_each(store):
    answers = query(None, store, keys=["both", "a-001", "both"], k=2)
    assert [(answer.stored.key, answer.stored.part) for answer in answers] == [("both", 0), ("both", 1), ("a-001", 0)]
    names = [store.parts[number].name for number in (0, 1)]
    (note,) = collect_notes(store, answers)
    assert note == f"key both is in 2 parts ({', '.join(names)}): one answer each, in this order"
    for answer in answers[:2]:
        assert addresses(answer) == brute_force(store, answer.stored.part, answer.stored.row, 2)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("a-0071", "close to it are a-007, .*"),
        ("a-0_7", "close to it are .*a-0.*"),
        ("zebra", "none of its keys is close"),
        ("he/a-001.png", "images are named before --key"),
    ],
)
def test_an_unknown_key_names_close_ones(store, key, told):
    with pytest.raises(DataError, match=f"has no patch '{key}'; .*{told}"):
        query(None, store, keys=["a-001", key])


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"k": 0}, ConfigError, "-k is 0: ask for at least 1"),
        ({"images": ["x.png"]}, ConfigError, "give images or --key, not both"),
        ({"keys": []}, ConfigError, "nothing is asked: give H&E images, or --key KEY"),
        ({"splits": ["val", "dev"]}, ConfigError, "--split dev: there are train, val .those of the index"),
        ({"splits": ["test"]}, ConfigError, "--split test: there are train, val .*latents.gallery"),
        ({"levels": ["4+", "0"]}, ConfigError, "--label 4.: there are 0, 1., 2., 3."),
        ({"slides": "slides.csv"}, ConfigError, "--slides is used by --exclude-same-slide only"),
        ({"keys": ["a-000"], "exclude_same_slide": True}, DataError, "slide of 1 of 1 queries is unknown, .* a-000"),
    ],
)
def test_what_cannot_be_asked(store, options, error, told):
    with pytest.raises(error, match=told):
        query(None, store, **({"keys": ["a-001"]} | options))


def test_filters_that_leave_nothing(tmp_path, write_store):
    rows = [("a", "s1", 0, [1, 0]), ("b", "s1", 1, [0, 1]), ("c", "", -1, [1, 1])]
    store = write_store(tmp_path / "s", [("train", rows)])
    with pytest.raises(DataError, match="holds no latent of split train and level 3.: widen the filters"):
        query(None, store, keys=["a"], splits=["train"], levels=["3+"])
    with pytest.raises(DataError, match="nothing is left to find for a once its own row is left out: query with fewer"):
        query(None, store, keys=["b", "a"], levels=["0"])
    with pytest.raises(DataError, match="for a once its own row is left out, and the rows of its slide and of unknown"):
        query(None, store, keys=["a"], exclude_same_slide=True)
    (answer,) = query(None, store, keys=["a"])
    assert [hit.level for hit in answer.neighbours] == [None, "1+"] and answer.vote.labelled == 1


def test_an_index_of_another_state_is_told(tmp_path, write_store):
    write_store(tmp_path / "s", [("train", [("a", "s1", 0, [1, 0]), ("b", "s1", 1, [0, 1])])])
    index = tmp_path / "s" / "index" / "teacher"
    kept = {path.name: path.read_bytes() for path in index.iterdir()}
    store = write_store(tmp_path / "s", [("train", [("a", "s1", 0, [1, 0]), ("b", "s1", 1, [1, 1])])])
    for name, content in kept.items():
        (index / name).write_bytes(content)
    with pytest.raises(DataError, match="was built from another state of the store: run lgd build-index"):
        query(None, store, keys=["a"])


def test_the_outputs_agree(store, capsys):
    command = ["query", "--store", str(store.folder), "-k", "3", "--split", "train,val", "--level", "0,1+,2+"]
    keys = ["--key", "a-001", "d-002"]
    assert main([*command, *keys, "--json"]) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    answers = query(None, Store(store.folder), keys=keys[1:], k=3, splits=["train", "val"], levels=["0", "1+", "2+"])
    assert document == json.loads(json.dumps(as_json(answers)))
    assert told.err.splitlines() == [count_neighbours(answers, NEAR_DUPLICATE), *collect_notes(store, answers)]
    assert main([*command, *keys, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    flat = [hit for answer in document for hit in answer["neighbours"]]
    assert [(row["key"], float(row["distance"])) for row in rows] == [(hit["key"], hit["distance"]) for hit in flat]
    assert [row["vote"] for row in rows] == [answer["vote"]["level"] for answer in document for _ in range(3)]
    assert main([*command, *keys]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * 4 and [line.split()[1] for line in table[1:]] == ["1", "2", "3", "vote"] * 2


def test_a_sheet_of_shards_that_are_gone_is_told(store, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["query", "--store", str(store.folder), "--key", "a-001", "--sheet", str(sheet)]) == 1
    assert "which is gone: put them back, or query without --sheet" in capsys.readouterr().err
    assert not sheet.exists()
