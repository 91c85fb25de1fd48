"""Students with random weights, as `lgd train` leaves them."""

import torch

from lgd.base.target import find_target
from lgd.models.description import LatentSizes, TeacherRef, Training
from lgd.models.encoder import build_encoder
from lgd.models.export import save_model
from lgd.models.methods import find_method
from lgd.models.query_map import QueryMap
from lgd.shards.manifest import Shape, Values

HER2 = find_target("her2")
SIZE = 32
VALUES = Values(mean=30.0, std=20.0, least=0.0, most=95.0)
"""Of the training labels, where these are values."""


def save_student(folder, method="he-only", target=HER2, teachers=(), labelled=True, ordinal=None, temperature=0.7):
    """Write the folder of one, which is given back."""
    torch.manual_seed(1)
    network = find_method(method).network
    student = network(
        morphology=build_encoder("resnet10"),
        hallucination=None,
        target=target,
        ordinal=ordinal,
        latents={name: LatentSizes(dim=8 + number, map=3) for number, name in enumerate(teachers)},
        nuclei_grid=4,
        membrane_grid=3,
        staining=None,
    )
    # Weights of a fresh head are so small that all answers would be alike.
    torch.nn.init.normal_(student.head.weight, std=0.1)
    if method == "lgd":
        student.query_map = QueryMap(student.streams, sum(student.dims))
        torch.nn.init.normal_(student.query_map.weight)
    labels = dict.fromkeys(target.counted, 3 if labelled else 0) | {"unknown": 0 if labelled else 9}
    save_model(
        folder,
        student.state_dict(),
        lambda **facts: student.describe(
            method=method,
            size=SIZE,
            teachers=tuple(TeacherRef(name=name, weights_sha256="a" * 64, licence=None) for name in teachers),
            untaught=None,
            temperature=temperature,
            conformal=None,
            validation={},
            inputs="b" * 64,
            steps=1,
            epochs=1.0,
            skipped=0,
            engine="torch",
            workers=1,
            versions={},
            training=Training(
                target=target,
                marker=None,
                labels=labels,
                shapes=(Shape(width=64, height=64, mpp=0.5, samples=9),),
                virtual=True,
                shards=(),
                values=VALUES if target.is_number and labelled else None,
            ),
            **facts,
        ),
    )
    return folder
