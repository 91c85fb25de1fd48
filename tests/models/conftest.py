from pathlib import Path

import pytest
from networks import save_network


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory) -> Path:
    """A DINOv2 of two layers; copy it before it is changed."""
    return save_network(tmp_path_factory.mktemp("dinov2"))
