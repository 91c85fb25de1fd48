import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lgd.base.errors import ConfigError
from lgd.shards.split import SPLITS, assign, canonical_group, parse_split, split_of


def test_the_three_forms():
    assert parse_split("keep") == (True, {})
    assert parse_split("keep:0.1") == (True, {"train": 0.9, "val": 0.1})
    assert parse_split("group:0.8,0.1,0.1") == (False, {"train": 0.8, "val": 0.1, "test": 0.1})


@pytest.mark.parametrize(
    "text",
    [
        *("", "group", "keep:", "keep:0", "keep:1", "keep:0.1,0.1", "group:0.8,0.2", "group:0.8,0.1,0.2"),
        *("group:1.2,-0.1,-0.1", "group:nan,0.5,0.5", "group:a,b,c", "slide:0.8,0.1,0.1", "keep:inf"),
    ],
)
def test_every_other_form_is_refused(text):
    with pytest.raises(ConfigError, match="--split"):
        parse_split(text)


shares = st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(sum)


@given(shares, st.lists(st.text(max_size=8), unique=True, max_size=30), st.text(max_size=3))
def test_a_group_stays_on_its_side_whatever_else_is_there(weights, groups, salt):
    fractions = {name: weight / sum(weights) for name, weight in zip(SPLITS, weights, strict=True)}
    sides = {group: assign(group, fractions, salt) for group in groups}
    assert all(fractions[side] > 0 for side in sides.values())
    for group in reversed(groups[::2]):
        assert assign(group, fractions, salt) == sides[group]


@given(st.text(max_size=8), st.floats(0.05, 0.9), st.floats(0.0, 0.05))
def test_more_training_share_never_takes_a_group_out_of_training(group, share, more):
    def side(train):
        return assign(group, {"train": train, "val": (1 - train) / 2, "test": (1 - train) / 2})

    if side(share) == "train":
        assert side(share + more) == "train"


def test_shares_are_met_and_salt_draws_anew():
    groups = [f"slide{number}" for number in range(4000)]
    fractions = parse_split("group:0.8,0.15,0.05").shares
    drawn = [assign(group, fractions) for group in groups]
    for name, share in fractions.items():
        # Four standard deviations of a binomial draw.
        assert abs(drawn.count(name) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert drawn != [assign(group, fractions, "other") for group in groups]


def test_the_assignment_never_changes_between_releases():
    # A user who adds slides to a set next year must find the old ones where they were.
    fractions = parse_split("group:0.8,0.1,0.1").shares
    assert "".join(assign(f"slide{number}", fractions)[:2] for number in range(12)) == "trtetrtrtrtrtrtrtrvatrtr"


def test_keep_carves_validation_off_train_only():
    rule = parse_split("keep:0.5")
    groups = [f"g{number}" for number in range(50)]
    assert {split_of(rule, group, "test") for group in groups} == {"test"}
    assert {split_of(rule, group, "train") for group in groups} == {"train", "val"}
    assert split_of(parse_split("keep"), "g", "train") == "train"
    assert split_of(parse_split("keep"), "g", None) is None
    assert split_of(parse_split("group:0,0,1"), "g", "train") == "test"


@pytest.mark.parametrize(
    "spellings",
    [
        ["7", "007", "7.0", "7.00", "7,0", " 7 ", "\u00a07", "7\u200b", "\uff17", "\u0667", "7."],
        ["12000000", "1.2E+07", "1,2e+07", "012000000.0"],
        ["0", "000", "0.0"],
        ["S-07", "s-7", "S -7", "S- 007", "\uff33-07", "\u017f-7"],
        ["Slide 1", "slide1", "SLIDE  1", "slide\t01"],
        ["M\u00fcller 3", "Mu\u0308ller 3", "M\u00dcLLER  03"],
        ["Stra\u00dfe", "STRASSE"],
        ["2019.05.07 a", "2019.5.7 A"],
        ["A", "a", "\u00ada"],
    ],
)
def test_spellings_of_one_slide_are_one(spellings):
    assert len({canonical_group(name) for name in spellings}) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["slide_1", "slide_10", "slide_100", "slide_01_1", "slide_1_2", "slide1_1"],
        ["1", "10", "100", "1.1", "1.10", "1.01", "1 1", "11", "-1", "1e1", "1e5", "100000", "1-1", "1/1"],
        ["P1 12", "P11 2", "P112", "P1-12", "P1_12"],
        ["A0.5", "A0.05", "A5", "A05.1"],
        ["S7", "S7.0", "S70", "S-7", "S_7", "S 7 0"],
        ["TCGA-A1-A0SB-01Z-00-DX1", "TCGA-A1-A0SB-01Z-00-DX2", "TCGA-A1-A0SB-01A-00-DX1", "TCGA-A1-A0SC-01Z-00-DX1"],
        ["1.234E+05 ", "123401", "1.2345E+02", "123"],
    ],
)
def test_different_slides_stay_different(names):
    assert len({canonical_group(name) for name in names}) == len(names)


@settings(deadline=None)
@given(st.text(max_size=12))
@example("\u200b")
@example("\u0345\u1fb3 \u03d3\u0301")
def test_the_canonical_form_is_its_own(name):
    form = canonical_group(name)
    assert canonical_group(form) == form and (form or not name)


@settings(deadline=None)
@given(
    st.text("ab-_.07 \u00e9\u0130", min_size=1, max_size=10), st.sampled_from([" ", "\t", "\u00a0", "\u3000", "\ufeff"])
)
def test_blanks_around_case_and_composition_do_not_count(name, blank):
    for other in (f"{blank}{name}", f"{name}{blank}", unicodedata.normalize("NFD", name), name.lower()):
        assert canonical_group(other) == canonical_group(name) or not name.strip(), other


plain = st.lists(
    st.one_of(st.integers(0, 200).map(str), st.text("abcdxyz", min_size=1, max_size=3)), min_size=1, max_size=5
)


@settings(deadline=None)
@given(plain, st.sampled_from(["_", "-", "/"]))
def test_a_plain_name_is_its_own_canonical_form(parts, separator):
    """So no two of them are ever taken for one."""
    assert canonical_group(separator.join(parts)) == separator.join(parts)


@settings(deadline=None)
@given(plain, st.integers(0, 3), st.sampled_from(["_", "-", " "]))
def test_zeros_before_numbers_do_not_count(parts, zeros, separator):
    padded = ["0" * zeros + part if part.isdigit() else part for part in parts]
    assert canonical_group(separator.join(padded)) == canonical_group(separator.join(parts))
    numbers = [canonical_group(str(one)) for one in range(50)]
    assert len(set(numbers)) == 50
