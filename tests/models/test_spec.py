import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import refused

from lgd.base.records import load_json
from lgd.models.encoder import PRESETS, describe
from lgd.models.spec import ARCHITECTURES, EncoderSpec, check_sizes, refuse_code

GOOD = {
    "name": "hf:org/name",
    "backbone": {"model_type": "dinov2", "hidden_size": 32, "out_indices": [-1]},
    "batchnorm": "frozen",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 1],
    "pool": "mean",
    "size": None,
    "mpp": None,
    "licence": None,
}


def spec_from(backbone) -> EncoderSpec:
    return EncoderSpec.from_json(GOOD | {"backbone": {"model_type": "dinov2", **backbone}})


def spec_of(**backbone) -> EncoderSpec:
    return spec_from(backbone)


@pytest.mark.parametrize("fields", [GOOD, GOOD | {"size": 224, "mpp": 0.5, "licence": "Apache-2.0"}])
def test_a_specification_is_plain_json_and_reads_back(fields):
    spec = EncoderSpec.from_json(fields)
    assert spec.as_json() == fields
    assert EncoderSpec.from_json(load_json(json.dumps(spec.as_json()))) == spec


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_one(name):
    spec = describe(name)
    assert EncoderSpec.from_json(spec.as_json()) == spec and spec.backbone == PRESETS[name]


WRONG = {
    "name": [None, 3, "a\nb"],
    "backbone": [None, [], "resnet", {}, {"model_type": "clip"}, {"model_type": ["resnet"]}, {"model_type": "evil"}],
    "batchnorm": ["batch", None, 1],
    "mean": [
        None,
        0.5,
        [0.5],
        [0.5] * 4,
        [124, 116, 104],
        [0.5, 0.5, float("nan")],
        ["0.5"] * 3,
        [True] * 3,
        [-0.1] * 3,
    ],
    "std": [[0, 0, 0], [0.2, -0.2, 0.2], [1e-30] * 3, [float("inf")] * 3, [58, 57, 57], [0.5, None, 0.5]],
    "pool": ["max", None, 1],
    "size": [0, -1, 224.5, "224", 10**9],
    "mpp": [0, -0.5, "0.5", float("nan"), 1e9],
    "licence": [3, "a\x1b[31m"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"field '{field}"):
        EncoderSpec.from_json(GOOD | {field: value})


@pytest.mark.parametrize("field", GOOD)
def test_every_field_is_there_and_no_other(field):
    with pytest.raises(ValueError, match=f"field '{field}'"):
        EncoderSpec.from_json({name: value for name, value in GOOD.items() if name != field})
    with pytest.raises(ValueError, match="field 'dtype'"):
        EncoderSpec.from_json(GOOD | {"dtype": "float16"})


BOMBS = [
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 101},
    {"num_hidden_layers": 1e300},
    {"depths": [1, 1, 1, 3_000_000]},
    {"depths": [30, 30, 30, 30]},
    {"hidden_size": 10**9},
    {"hidden_size": 10**4000},
    {"hidden_size": -1},
    {"hidden_sizes": [60_000] * 4},
    {"mlp_ratio": 1e18},
    {"mlp_ratio": float("nan")},
    {"patch_size": 4096},
    {"hidden_sizes": [16] * 100_000},
    {"hidden_sizes": [[16] * 1000] * 1000},
    {"out_features": ["stage1"] * 100_000},
    {"out_features": ["x" * 1_000_000]},
    {"depths": [[[[[[1]]]]]]},
    {"layers": {"a": {"b": [1]}}},
    {"num_channels": 4},
    {"num_channels": 30_000},
]


@pytest.mark.parametrize("fields", BOMBS, ids=lambda fields: str(fields)[:40])
def test_absurd_networks_are_refused_by_the_name_of_the_field_at_once(alone, fields):
    told, seconds, peak = alone(refused, spec_from, fields, {})
    assert re.search(f"field 'backbone': .*'{next(iter(fields))}'", told)
    assert seconds < 1 and peak < 10_000_000 and len(told) < 400


def test_the_largest_encoders_of_today_are_accepted():
    giant = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
    assert spec_from(giant | {"image_size": 518}).backbone == {"model_type": "dinov2", **giant, "image_size": 518}
    seven_billion = {"hidden_size": 4096, "num_hidden_layers": 40, "intermediate_size": 8192, "rope_theta": 100.0}
    for backbone in ({"model_type": "dinov3_vit", **seven_billion}, {"model_type": "resnet", "depths": [3, 8, 36, 3]}):
        assert spec_from(backbone).backbone == backbone


CODE = [
    {"auto_map": {"AutoConfig": "evil.Config"}},
    {"auto_map": {"AutoBackbone": "org/repo--evil.Model"}},
    {"vision_config": {"auto_map": {"AutoModel": "evil.Model"}}},
    {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
    {"trust_remote_code": True},
    {"attn_implementation": "org/kernel"},
    {"_attn_implementation": "org/kernel:evil"},
]


@pytest.mark.parametrize("fields", CODE, ids=str)
def test_code_is_refused_wherever_it_is_named(fields):
    with pytest.raises(ValueError, match="names code .* never run: .*take the field out"):
        refuse_code(fields)
    with pytest.raises(ValueError, match="names code .* never run"):
        refuse_code([[{"list": [fields]}]])
    with pytest.raises(ValueError, match="field 'backbone': .*names code .* never run"):
        spec_of(**fields)


def test_names_that_only_look_like_code_are_none():
    fields = {"auto_map": {}, "trust_remote_code": False, "attn_implementation": "sdpa", "custom_pipelines": None}
    assert refuse_code(fields) is None


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "gelu", "org/kernel"])
values = (
    plain | st.lists(plain, max_size=4) | st.lists(st.lists(plain, max_size=2), max_size=2) | st.just({"auto_map": "x"})
)
names = st.sampled_from(["depths", "hidden_size", "patch_size", "out_indices", "auto_map", "hidden_act", "", "\ud800"])


@settings(max_examples=100)
@given(st.sampled_from(ARCHITECTURES), st.dictionaries(names, values, max_size=4))
def test_any_settings_pass_or_are_refused_and_what_passes_is_small(kind, fields):
    try:
        backbone = EncoderSpec.from_json(GOOD | {"backbone": fields | {"model_type": kind}}).backbone
    except ValueError:
        return
    check_sizes(backbone)
    flat = json.dumps(backbone)
    assert len(flat) < 10_000 and "{" not in flat[1:].replace('"{', "")
    assert all(abs(number) <= 32_768 for value in backbone.values() for number in numbers_of(value))


def numbers_of(value):
    if isinstance(value, list):
        return [number for one in value for number in numbers_of(one)]
    return [value] if isinstance(value, int | float) else []
