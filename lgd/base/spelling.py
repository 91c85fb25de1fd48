"""Spellings of one name that people and spreadsheets mix up."""

import decimal
import re
import unicodedata


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
