import importlib.util
import json

import pytest

from lgd.base.errors import DataError
from lgd.models.encoder import build_encoder


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "folder"])
def test_without_timm_its_encoders_say_what_to_install(name, tmp_path):
    if name == "folder":
        name = str(tmp_path)
        content = {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match=r"needs timm, which is not installed: .*pip install 'lgd\[encoders\]'"):
        build_encoder(name)
