import ast
from pathlib import Path

import pytest
import torch

import lgd
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.config import Config
from lgd.config_sections import Student
from lgd.models.encoder import build_encoder
from lgd.models.export import save_model
from lgd.models.loading import load_student
from lgd.models.losses import Lesson, Negatives
from lgd.models.methods import BASELINE, METHODS, PROPOSED, LgdNet, Method, find_method
from lgd.models.student import Student as Network
from tools.bench.inputs import NOT_TRAINED

ROOT = Path(lgd.__file__).parent


def test_every_method_is_found_by_its_name():
    for name, method in METHODS.items():
        assert find_method(name) is method and issubclass(method, Method)
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert {BASELINE, PROPOSED} <= METHODS.keys()
    assert Student().method == PROPOSED, "the default"


@pytest.mark.parametrize("name", ["magic", "", "LGD", "lgd "])
def test_an_unknown_method_is_refused_with_those_that_there_are(name):
    with pytest.raises(
        ConfigError, match=r"use one of he-only, two-stream, distil, lgd, or python:package.module:name"
    ):
        find_method(name)


def test_a_model_of_an_unknown_method_is_refused(tmp_path):
    sizes = {
        "latents": {},
        "nuclei_grid": 1,
        "membrane_grid": 1,
        "target": find_target("her2"),
        "ordinal": None,
        "staining": None,
    }
    model = Network(morphology=build_encoder("resnet10"), hallucination=None, **sizes)
    facts = NOT_TRAINED | {"method": "magic", "size": 64, "teachers": ()}
    save_model(tmp_path, model.state_dict(), lambda **digests: model.describe(**facts, **digests))
    with pytest.raises(DataError, match="config.json: field method is 'magic', which this version of lgd lacks"):
        load_student(tmp_path)


def test_distillation_of_nothing_is_refused():
    for name, method in METHODS.items():
        config = Config(student=Student(method=name))
        if method.row_fields(config):
            with pytest.raises(ConfigError, match="student.distil_weight is 0: nothing would be distilled"):
                method(config, find_target("her2"))
        else:
            method(config, find_target("her2"))


@pytest.mark.parametrize("stained", ["membrane", "positive"])
def test_a_misaligned_pair_teaches_its_label_and_nuclei_and_nothing_of_its_second_image(stained):
    """A pair of weight 0 is as one whose hallucination losses are left out; one of unknown alignment counts whole."""
    random = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=random)

    channels = {"membrane": 3, "positive": 2}[stained]
    grids = {"nuclei": (4, 2, 2), stained: (4, 2, 2, channels), "pooled": (4, 6), "map": (4, 6, 2, 2)}
    stored = {name: rand(*shape) for name, shape in grids.items()}
    out = {name: rand(*shape).requires_grad_() for name, shape in grids.items()} | {"logits": rand(4, 4)}
    label_B = torch.tensor([0, 1, 2, -1])
    negatives = Negatives(torch.arange(4), label_B, rand(3, 6), torch.tensor([7, 8, 9]), torch.tensor([0, 1, 3]))
    alignment_B = torch.tensor([0.0, 1.0, 5.0, torch.nan])

    def terms_of(full, alignment_B):
        config = Config(student=Student(full_alignment=full, contrast_weight=0.1))
        method = LgdNet(config, find_target("her2"))
        method.soft_labels = lambda pooled_nD: pooled_nD[:, :4]
        return method.losses(out, Lesson(label_B=label_B, stored=stored, negatives=negatives, alignment_B=alignment_B))

    plain, weighed = terms_of(0.0, alignment_B), terms_of(2.0, alignment_B)
    assert all(torch.equal(one, two) for one, two in zip(plain.values(), terms_of(2.0, None).values(), strict=True))
    assert weighed.keys() == plain.keys() == {
        "level", "hallucination", "hallucination_map", "contrast", "nuclei", stained
    }  # fmt: skip
    for name, term in weighed.items():
        share = torch.ones(4) if name in ("level", "nuclei") else torch.tensor([0, 0.5, 1, 1])
        assert term.tolist() == pytest.approx((share * plain[name]).tolist()), name
        assert plain[name][0] > 0, name
    sum(term.sum() for name, term in weighed.items() if name != "nuclei").backward()
    for name in ("pooled", "map", stained):
        assert not out[name].grad[0].any() and out[name].grad[3].any(), name


def test_no_other_module_names_a_method():
    """But for the default of `student.method`, and the package's own name."""
    named = {}
    for path in ROOT.rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        if found := set(METHODS) & {text for text in texts if isinstance(text, str)}:
            named[path.relative_to(ROOT).as_posix()] = found
    assert {"he-only", "two-stream"}.isdisjoint(set().union(*(v for k, v in named.items() if k != "models/methods.py")))
    assert named.pop("models/methods.py") == set(METHODS)
    # Fields are named `distil_weight` and `distil_temperature`.
    assert named.pop("config_sections.py") == {"lgd"}
    # A term of its loss.
    assert named.pop("models/method.py") == {"distil"}
    assert all(found == {"lgd"} for found in named.values())
    compared = [
        f"{path}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in METHODS
    ]
    assert not compared
