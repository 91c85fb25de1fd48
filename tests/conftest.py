"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Small tensors: more threads only fight each other when the machine runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real patches: LGD_REAL_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("LGD_REAL_DATA")
    folder = Path(named) if named else _DEFAULT
    if (folder / "bci-native").is_dir():
        return folder
    if named:
        pytest.fail(f"LGD_REAL_DATA is {named}, but {folder / 'bci-native'} is not there")
    pytest.skip(f"no real patches: set LGD_REAL_DATA to their folder ({folder} is not there)")
