"""Splits in which a group never lies on two sides: leakage lives or dies here.

A group (the slide, else the source patch) goes to a side by a hash of its name alone. It stays there whatever
else the data set gains or loses.
"""

import decimal
import hashlib
import math
import re
import unicodedata
from typing import NamedTuple

from lgd.base.errors import ConfigError

SPLITS = ("train", "val", "test")


class SplitRule(NamedTuple):
    """A parsed `--split`."""

    keep: bool
    """The published split stays; the shares then only divide its `train`."""
    shares: dict[str, float]
    """Share of each split, adding up to 1; empty where nothing is to be drawn."""


def parse_split(text: str) -> SplitRule:
    """Parse `keep`, `keep:VAL` (a share of train, by group) or `group:TRAIN,VAL,TEST`.

    Raises `ConfigError` that names `--split`.
    """
    kind, colon, numbers = text.partition(":")
    usage = f"--split {text}: use keep, keep:0.1 (validation share of train) or group:0.8,0.1,0.1"
    if kind not in ("keep", "group") or (kind == "group") > bool(colon):
        raise ConfigError(usage)
    if not colon:
        return SplitRule(True, {})
    try:
        shares = [float(number) for number in numbers.split(",")]
    except ValueError as error:
        raise ConfigError(usage) from error
    if not all(math.isfinite(share) and 0 <= share <= 1 for share in shares):
        raise ConfigError(f"{usage}; a share lies between 0 and 1")
    if kind == "keep":
        if len(shares) != 1 or not 0 < shares[0] < 1:
            raise ConfigError(f"{usage}; keep takes one share between 0 and 1")
        return SplitRule(True, {"train": 1 - shares[0], "val": shares[0]})
    if len(shares) != len(SPLITS):
        raise ConfigError(f"{usage}; group takes three shares: train, val, test")
    if not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise ConfigError(f"{usage}; the shares add up to {sum(shares):g}, not to 1")
    return SplitRule(False, dict(zip(SPLITS, shares, strict=True)))


def assign(group: str, shares: dict[str, float], salt: str = "") -> str:
    """The split of a group: a point in [0, 1) from the SHA-256 of salt and name, against the summed shares.

    A split of share 0 gets nothing. Another `salt` draws another split.
    """
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    digest = hashlib.sha256(f"{len(salt)}:{salt}{group}".encode()).digest()
    # 53 bits, so that the quotient is exact and stays below 1.
    point = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    drawn = [(name, share) for name, share in shares.items() if share > 0]
    above = 0.0
    for name, share in drawn:
        above += share
        if point < above:
            return name
    # Only rounding of the sum leads here.
    return drawn[-1][0]


def split_of(rule: SplitRule, group: str, published: str | None, salt: str = "") -> str | None:
    """The split of a sample under a rule; None where the rule keeps a split that was never published."""
    if rule.keep and (published != "train" or not rule.shares):
        return published
    return assign(group, rule.shares, salt)


def canonical_group(name: str) -> str:
    """The form in which all spellings of one slide's name are equal; never empty.

    They may differ in case, in blanks and characters that are not seen, in Unicode's composition and width of letters,
    in zeros before a number (S-7, S-07), and where the whole name is a number also in its form, as spreadsheets change
    it (7, 007, 7.0, 7,0, 1.2E+07). Other letters and other numbers stay different: 1 and 10, 7.1 and 7.10.
    """
    text = _respell(name)
    # Folding can make letters that fold once more.
    while (again := _respell(text)) != text:
        text = again
    return text or name


def _respell(text: str) -> str:
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
        text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    # Between two numbers a blank separates them.
    text = re.sub(r"(?<!\d) | (?!\d)", "", " ".join(text.split()))
    if number := re.fullmatch(r"(\d+)[.,]0*", text):
        text = number[1]
    elif re.fullmatch(r"\d([.,]\d+)?e\+\d\d", text):
        value = decimal.Decimal(text.replace(",", "."))
        text = f"{value:f}" if value == value.to_integral_value() else text
    return re.sub(r"\d+(?:[.,]\d+)*", _without_zeros, text)


def _without_zeros(number: re.Match[str]) -> str:
    """A number without the zeros before it; what follows a single point is a fraction, in which zeros count."""
    parts = re.split("[.,]", number[0])
    count = 1 if len(parts) == 2 else len(parts)
    return ".".join([part.lstrip("0") or "0" for part in parts[:count]] + parts[count:])
