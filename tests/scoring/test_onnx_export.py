"""A student as an ONNX file gives what it gives in LGD."""

import json

import numpy as np
import pytest
from drawn_answers import GRADE, KI67
from small_students import SIZE, VALUES, save_student

from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.scoring import onnx_export
from lgd.scoring.onnx_export import export_onnx
from lgd.scoring.predict import load_scorer

onnxruntime = pytest.importorskip("onnxruntime")


def run_file(path, image_BHW3):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image_BHW3}), strict=True)), session


STUDENTS = {
    "classes": ({}, ["probabilities"]),
    "corn": ({"target": GRADE, "ordinal": "corn"}, ["probabilities"]),
    "number": ({"target": KI67}, ["value"]),
    "LGD-Net": ({"method": "lgd", "teachers": ["teacher", "genes"]}, ["probabilities", "latents", "latents@genes"]),
    "without labels": ({"method": "lgd", "teachers": ["teacher"], "labelled": False}, ["latents"]),
}


@pytest.mark.parametrize(("built", "names"), STUDENTS.values(), ids=STUDENTS)
def test_the_file_gives_what_the_student_gives(tmp_path, built, names):
    folder = save_student(tmp_path / "student", **built)
    made = export_onnx(folder, tmp_path / "s.onnx")
    image_BHW3 = np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    # Of one colour, and so unlike all others.
    image_BHW3[1:3] = [[[[255]]], [[[0]]]]
    found, session = run_file(tmp_path / "s.onnx", image_BHW3)
    assert list(found) == list(made.shapes) == names
    expected = load_scorer(folder).score(image_BHW3)
    for name, output in found.items():
        kind, _, of = name.partition("@")
        right = expected[{"latents": f"query{of and '@'}{of}"}.get(kind, "output")]
        assert output.dtype == np.float32 and output.shape == right.shape == (5, made.shapes[name])
        scale = {"probabilities": 1.0, "value": VALUES.std}.get(kind) or np.sqrt((right**2).mean())
        assert abs(output - right).max() <= 1e-4 * scale
        # Else anything would be equal.
        assert abs(output - output[:1]).max() > 0.01 * scale
    assert made.difference <= 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    config = load_scorer(folder).config
    assert metadata["weights_sha256"] == config.weights_sha256 and metadata["target"] == config.training.target.name
    assert json.loads(metadata["classes"]) == [*config.training.target.classes]
    # 64 px of 0.5 um, shown at 32 px.
    assert (metadata["size"], metadata["mpp"]) == (str(SIZE), "1")


def test_the_verb_writes_it_and_says_what_it_holds(tmp_path, capfd):
    folder = save_student(tmp_path / "student")
    assert main(["export-onnx", "--model", str(folder), "--out", str(tmp_path / "new" / "s.onnx")]) == 0
    out, err = capfd.readouterr()
    assert f"wrote {tmp_path}/new/s.onnx: image (n, 32, 32, 3), uint8 -> probabilities (n, 4); checked" in out
    assert err == ""
    assert main(["export-onnx", "--model", str(folder), "--out", str(folder / "model.safetensors")]) == 2
    assert "name a file that ends with .onnx" in capfd.readouterr().err
    assert main(["export-onnx", "--model", str(tmp_path), "--out", str(tmp_path / "s.onnx")]) == 1
    assert "config.json is missing" in capfd.readouterr().err


def test_a_graph_that_gives_other_answers_is_not_written(tmp_path, monkeypatch):
    folder = save_student(tmp_path / "student")
    whole = onnx_export._trace

    def trace_another(graph, name):
        graph.config = graph.config.model_copy(update={"temperature": 0.8})
        return whole(graph, name)

    monkeypatch.setattr(onnx_export, "_trace", trace_another)
    with pytest.raises(DataError, match=r"gives other answers than the student .* was not written"):
        export_onnx(folder, tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()


def test_what_cannot_be_exported_is_refused_in_a_line(tmp_path, monkeypatch):
    folder = save_student(tmp_path / "two", method="two-stream", teachers=["teacher"], labelled=False)
    with pytest.raises(DataError, match="there is nothing to export"):
        export_onnx(folder, tmp_path / "s.onnx")
    with pytest.raises(ConfigError, match="ends with .onnx"):
        export_onnx(folder, tmp_path / "s.pt")
    folder = save_student(tmp_path / "student")
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 1000)
    with pytest.raises(DataError, match="more than 2 GB of weights"):
        export_onnx(folder, tmp_path / "s.onnx")
    monkeypatch.setattr(onnx_export, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(DataError, match=r"no_such_package, which export-onnx needs, .* pip install 'lgd\[onnx\]'"):
        export_onnx(folder, tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()
