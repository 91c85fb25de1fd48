import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lgd.base.errors import DataError
from lgd.models.export import compare_shapes, count_numbers, read_shapes, shapes_of


@pytest.fixture
def path(tmp_path):
    save_file(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_head_of_a_file_gives_the_shapes_of_its_network(path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert read_shapes(path) == shapes_of(network)
    compare_shapes(path, read_shapes(path), shapes_of(network))
    assert count_numbers(read_shapes(path)) == 6 + 3 + 4 * 3 + 1


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (nn.Sequential(nn.Linear(2, 4)), r"7 tensors differ, such as '0.bias' \(\[3\], by config.json \[4\]\)"),
        (nn.Sequential(nn.Linear(2, 3)), r"5 tensors differ, such as '1.bias' \(\[3\], by config.json absent\)"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(1, 1)),
            r"2 tensors differ, such as '2.bias' \(absent, by .* \[1\]\)",
        ),
    ],
)
def test_weights_of_another_network_are_told_apart(path, network, problem):
    with pytest.raises(DataError, match=f"model.safetensors does not hold the weights of .* config.json: {problem}"):
        compare_shapes(path, read_shapes(path), shapes_of(network))


def test_what_is_no_whole_file_is_refused(path, tmp_path):
    content = path.read_bytes()
    odd = {
        "empty": b"",
        "short": content[:5],
        "head": content[:40],
        "cut": content[:-1],
        "longer": content + b"x",
        "pickle": b"PK\x03\x04" + bytes(100),
        "bomb": (10**9).to_bytes(8, "little") + b"{",
    }
    for name, some in odd.items():
        (tmp_path / name).write_bytes(some)
        with pytest.raises(DataError, match=f"{name} is no safetensors file.*: copy it again"):
            read_shapes(tmp_path / name)


def test_a_file_that_is_none_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(DataError, match="is missing"):
            read_shapes(tmp_path / name)


def test_quantised_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "q")
    with pytest.raises(DataError, match=r"tensor 'a' is quantised \(I8\): use float weights"):
        read_shapes(tmp_path / "q")
