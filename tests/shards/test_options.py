import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import ConfigError
from lgd.shards.candidate import SPLITS, SplitRule, assign, split_of


def test_the_three_forms():
    assert SplitRule.parse("keep") == (True, {})
    assert SplitRule.parse("keep:0.1") == (True, {"train": 0.9, "val": 0.1})
    assert SplitRule.parse("group:0.8,0.1,0.1") == (False, {"train": 0.8, "val": 0.1, "test": 0.1})


@pytest.mark.parametrize(
    "text",
    [
        *("", "group", "keep:", "keep:0", "keep:1", "keep:0.1,0.1", "group:0.8,0.2", "group:0.8,0.1,0.2"),
        *("group:1.2,-0.1,-0.1", "group:nan,0.5,0.5", "group:a,b,c", "slide:0.8,0.1,0.1", "keep:inf"),
    ],
)
def test_every_other_form_is_refused(text):
    with pytest.raises(ConfigError, match="--split"):
        SplitRule.parse(text)


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
    fractions = SplitRule.parse("group:0.8,0.15,0.05").shares
    drawn = [assign(group, fractions) for group in groups]
    for name, share in fractions.items():
        # Four standard deviations of a binomial draw.
        assert abs(drawn.count(name) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert drawn != [assign(group, fractions, "other") for group in groups]


def test_the_assignment_never_changes_between_releases():
    # A user who adds slides to a set next year must find the old ones where they were.
    fractions = SplitRule.parse("group:0.8,0.1,0.1").shares
    assert "".join(assign(f"slide{number}", fractions)[:2] for number in range(12)) == "trtetrtrtrtrtrtrtrvatrtr"


def test_keep_carves_validation_off_train_only():
    rule = SplitRule.parse("keep:0.5")
    groups = [f"g{number}" for number in range(50)]
    assert {split_of(rule, group, "test") for group in groups} == {"test"}
    assert {split_of(rule, group, "train") for group in groups} == {"train", "val"}
    assert split_of(SplitRule.parse("keep"), "g", "train") == "train"
    assert split_of(SplitRule.parse("keep"), "g", None) is None
    assert split_of(SplitRule.parse("group:0,0,1"), "g", "train") == "test"
