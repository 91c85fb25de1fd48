import re

import pytest
import torch

from lgd.base.errors import DataError
from lgd.models.encoder import build_encoder, describe
from lgd.models.known import find_known, look_up, read_table
from lgd.models.pretrained import is_hub
from lgd.models.spec import Facts, check_arguments


def test_every_row_says_how_it_was_checked_and_stands_once():
    rows = read_table()
    assert len(rows) >= 25 and len({row.load.lower() for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d, .*never loaded", row.checked) and row.source
        assert is_hub(row.load) and "@" not in row.load
        assert (row.mean is None) == (row.std is None)
        assert row.instead or row.pool
        check_arguments({"architecture": "vit_base_patch16_224", "num_classes": 0, **row.arguments})
        if not row.load.startswith("timm:"):
            assert not row.arguments


def test_the_hub_knows_no_case_and_a_revision_is_no_part_of_a_row():
    uni = look_up("timm:hf-hub:MahmoodLab/uni")
    assert uni == look_up("timm:hf-hub:mahmoodlab/UNI@0123abc") and uni.pool == "cls" and "commercial" in uni.licence
    assert find_known("timm:hf-hub:MahmoodLab/uni3") is None and look_up("resnet10") == Facts()


def test_what_is_stated_goes_before_the_table():
    table = look_up("timm:hf-hub:MahmoodLab/UNI2-h")
    mine = Facts(pool="mean", mpp=0.25, arguments={"reg_tokens": 4}).over(table)
    assert (mine.pool, mine.mpp, mine.mean, mine.licence) == ("mean", 0.25, table.mean, table.licence)
    assert mine.arguments == table.arguments | {"reg_tokens": 4}


def test_an_encoder_that_needs_code_of_its_own_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"LGD cannot load CONCH: .* python:package.module:factory .* or import"):
        describe("hf:MahmoodLab/CONCH")


def test_the_arguments_of_uni2_make_its_network():
    pytest.importorskip("timm", reason="timm is not installed: make test-encoders")
    import json

    from lgd.models.export import count_numbers
    from lgd.models.timm_backbone import choose_settings, draft_timm

    table = look_up("timm:hf-hub:MahmoodLab/UNI2-h")
    traits, shapes = draft_timm(json.dumps(choose_settings("vit_giant_patch14_224", table.arguments)))
    # 681 million, as published.
    assert 680e6 < count_numbers(shapes) < 682e6 and traits[:3] == (1536, 14, True)


def test_presets_are_not_in_it():
    encoder = build_encoder("resnet10")
    assert encoder.spec.licence is None and torch.is_tensor(next(encoder.parameters()))
