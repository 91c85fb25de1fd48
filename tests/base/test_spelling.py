"""Spellings of one slide's name."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lgd.base.spelling import canonical_group


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


@given(st.text(max_size=12))
@example("\u200b")
@example("\u0345\u1fb3 \u03d3\u0301")
def test_the_canonical_form_is_its_own(name):
    form = canonical_group(name)
    assert canonical_group(form) == form and (form or not name)


@given(
    st.text("ab-_.07 \u00e9\u0130", min_size=1, max_size=10), st.sampled_from([" ", "\t", "\u00a0", "\u3000", "\ufeff"])
)
def test_blanks_around_case_and_composition_do_not_count(name, blank):
    for other in (f"{blank}{name}", f"{name}{blank}", unicodedata.normalize("NFD", name), name.lower()):
        assert canonical_group(other) == canonical_group(name) or not name.strip(), other


plain = st.lists(
    st.one_of(st.integers(0, 200).map(str), st.text("abcdxyz", min_size=1, max_size=3)), min_size=1, max_size=5
)


@given(plain, st.sampled_from(["_", "-", "/"]))
def test_a_plain_name_is_its_own_canonical_form(parts, separator):
    """So no two of them are ever taken for one."""
    assert canonical_group(separator.join(parts)) == separator.join(parts)


@given(plain, st.integers(0, 3), st.sampled_from(["_", "-", " "]))
def test_zeros_before_numbers_do_not_count(parts, zeros, separator):
    padded = ["0" * zeros + part if part.isdigit() else part for part in parts]
    assert canonical_group(separator.join(padded)) == canonical_group(separator.join(parts))
    numbers = [canonical_group(str(one)) for one in range(50)]
    assert len(set(numbers)) == 50
