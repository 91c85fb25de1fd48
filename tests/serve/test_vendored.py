"""The code of others that lies in the repository is what `make vendor` brings, with its licence."""

import hashlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("place", ["lgd/serve/static", "tests/serve"])
def test_files_are_those_of_the_release(place):
    folder = ROOT / place
    named, line = (folder / "VENDORED.txt").read_text().splitlines()
    package, version = named.removeprefix("# ").split("@")
    digest, name = line.split()
    content = (folder / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert version.encode() in content[:200], f"{name} is not {package} {version}"
    assert f"= {package}@{version}\n" in (ROOT / "Makefile").read_text()
    (licence,) = folder.glob(f"{name.partition('.')[0]}-LICENSE.txt")
    assert any(word in licence.read_text() for word in ("Copyright", "Mozilla Public License"))
