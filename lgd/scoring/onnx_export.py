"""`lgd export-onnx`: a student as one ONNX file, which programs without LGD and PyTorch run.

    image          (B, size, size, 3) uint8, RGB; B is free
    probabilities  (B, K) float32, of the classes, as `lgd predict` prints them; or
    value          (B, 1) float32, in the target's unit
    latents        (B, D) float32, as queries compare them with those of a store; of further teachers `latents@NAME`

What a network lacks is left out: its answer where no label taught it, and latents where it hallucinates none. The
file's metadata say what it predicts, at which scale, and of which weights it was made. It is published only when ONNX
Runtime gives what the student gives.
"""

import importlib.util
import json
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import lgd
from lgd.base.errors import DataError, require
from lgd.config_files import find_in_run
from lgd.io.files import write_bytes
from lgd.io.location import Location, as_output_location
from lgd.models.description import StudentConfig
from lgd.models.export import count_numbers, shapes_of
from lgd.models.heads import compute_answers, scale_of
from lgd.models.loading import load_student
from lgd.models.methods import find_method
from lgd.models.pretrained import shorten
from lgd.models.student import Outputs, Student
from lgd.scoring.predict import Scorer, choose_latents

TOLERANCE = 1e-4
"""Largest difference from the student: of probabilities as they are, of values in standard deviations of the training
values, of latents in their root mean square."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = 2_000_000_000
"""Of weights: an ONNX file is one message of Protocol Buffers, which ends at 2 GiB."""
_RANGES = ((0, 256), (120, 256), (236, 256))
"""Of the pixels of the images that are compared, from dark noise to nearly white."""


class Exported(NamedTuple):
    """What was written."""

    size: int
    """Side of the input, in pixels."""
    shapes: dict[str, int]
    """Numbers of each output for an image, by its name."""
    difference: float
    """The largest from the student, as `TOLERANCE` counts it."""


class Graph(nn.Module):
    """A student from pixels as files have them to what a user reads."""

    def __init__(self, student: Student, config: StudentConfig) -> None:
        """Raises `DataError` for a student that gives neither an answer nor latents."""
        super().__init__()
        self.student, self.config = student, config
        hallucinates = find_method(config.method).retrieves_by == "latents"
        self.suffixes = [f"@{name}" if number else "" for number, name in enumerate(config.latents) if hallucinates]
        training = config.training
        answer = ["value" if training.target.is_number else "probabilities"] if training.labelled else []
        self.names = [*answer, *(f"latents{of}" for of in self.suffixes)]
        """Of the outputs, in their order."""
        if not self.names:
            raise DataError("no label taught the student, and it hallucinates no latents: there is nothing to export")

    def forward(self, image_BHW3: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 (B, H, W, 3) -> the outputs, float32."""
        out: Outputs = self.student(image_BHW3.permute(0, 3, 1, 2))
        training, answers = self.config.training, []
        if training.labelled:
            logits_BK = out["logits"].float()
            answers.append(compute_answers(logits_BK, training.target, training.values, self.config.temperature))
        return *answers, *(out.get(f"query{of}", out[f"pooled{of}"]).float() for of in self.suffixes)


def export_onnx(model: str | Location, out: str | Location, code: Collection[str] = ()) -> Exported:
    """Write a student as an ONNX file.

    Args:
        model: The student's folder, or its run's.
        out: The file, or its url; its name ends with .onnx.
        code: Code outside LGD that the network may run, as `python:package.module:name`.

    Raises:
        ConfigError: For another name of the file.
        DataError: For a folder without a student, one that is too large or cannot be exported, packages that are not
            installed, and a graph that does not give what the student gives; then nothing is written.
    """
    path = as_output_location(out, "--out")
    require(path.suffix == ".onnx", f"--out is {path}: name a file that ends with .onnx")
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise DataError(f"{missing[0]}, which export-onnx needs, is not installed: pip install 'lgd[onnx]'")
    folder = find_in_run(model, "student")
    student, config = load_student(folder, code)
    if 4 * count_numbers(shapes_of(student)) > _MOST_BYTES:
        raise DataError(f"{folder} has more than 2 GB of weights, which no ONNX file holds: pass the folder on instead")
    scorer = Scorer(model=student, config=config, device="cpu", role="he", folder=str(folder))
    graph = Graph(student, config).eval()
    content = _trace(graph, str(folder))
    shapes, difference = _compare(content, graph, scorer)
    if not difference <= TOLERANCE:
        raise DataError(
            f"ONNX Runtime gives other answers than the student {folder} (by {difference:.2g}, {TOLERANCE:g} at most): "
            f"{path} was not written; pass the folder on instead"
        )
    write_bytes(path, content)
    return Exported(config.size, shapes, difference)


def _trace(graph: Graph, name: str) -> bytes:
    """The graph as a file's content; `name` is the student's, for the error where PyTorch cannot export it."""
    side = graph.config.size
    image_BHW3 = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            graph,
            (image_BHW3,),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["image"],
            output_names=graph.names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    # The network may be of any library, or anybody's.
    except Exception as error:
        raise DataError(
            f"PyTorch {torch.__version__} cannot export the student {name} to ONNX ({shorten(error)}): pass the folder "
            "on instead, as docs/handing-on.md says"
        ) from error
    assert program is not None, "it is None for the exporter of before only"
    program.model.metadata_props.update(describe_graph(graph.config))
    content: bytes = program.model_proto.SerializeToString()
    return content


def describe_graph(config: StudentConfig) -> dict[str, str]:
    """The metadata of the file: what is read from the outputs, of which images, and where it is from."""
    training, target = config.training, config.training.target
    shape = next((one for one in training.shapes if one.mpp), None)
    scale = shape.width * shape.mpp / config.size if shape and shape.mpp else None
    return {
        "lgd": lgd.__version__,
        "weights_sha256": config.weights_sha256,
        "target": target.name,
        "kind": target.kind,
        "classes": json.dumps(target.classes),
        "unit": target.unit or "",
        "size": str(config.size),
        "mpp": f"{scale:.6g}" if scale else "unknown",
        "teachers": json.dumps({one.name: one.weights_sha256 for one in config.teachers}),
        "virtual": json.dumps(training.virtual),
        "use": "research only, not for diagnosis",
    }


def _compare(content: bytes, graph: Graph, scorer: Scorer) -> tuple[dict[str, int], float]:
    """The numbers of each output, and the largest difference from the student, one image at a time and together."""
    import onnxruntime

    config, random = graph.config, np.random.default_rng(0)
    training, side = config.training, config.size
    image_BHW3 = np.stack([random.integers(*ends, (side, side, 3), dtype=np.uint8) for ends in _RANGES])
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    values = scorer.score(image_BHW3)
    expected = [values["output"]] if training.labelled else []
    expected += [choose_latents(values, of) for of in graph.suffixes]
    together = session.run(graph.names, {"image": image_BHW3})
    alone = [session.run(graph.names, {"image": image_BHW3[row : row + 1]}) for row in range(len(image_BHW3))]
    worst = 0.0
    for number, (name, right_BK) in enumerate(zip(graph.names, expected, strict=True)):
        scale = 1.0 if name == "probabilities" else float(np.sqrt(np.mean(right_BK**2))) or 1.0
        if name == "value" and training.values is not None:
            scale = scale_of(training.values)
        for found_BK in (together[number], np.concatenate([one[number] for one in alone])):
            difference = float(abs(found_BK - right_BK).max() / scale)
            # NaN is no difference that could be compared.
            worst = max(worst, difference if difference == difference else np.inf)
    return {name: one.shape[1] for name, one in zip(graph.names, expected, strict=True)}, worst
