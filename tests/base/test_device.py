import pytest
import torch

from lgd.base.device import find_device
from lgd.base.errors import DataError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", None])
def test_a_process_that_no_gpu_was_given_to_computes_on_the_cpu(visible, monkeypatch):
    if visible is None and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device() == "cpu"


@needs_no_gpu
@pytest.mark.parametrize("visible", ["0", "1,2", "GPU-1234"])
@pytest.mark.parametrize("number", [None, 0, 1])
def test_a_gpu_that_was_given_and_cannot_be_used_is_no_cpu(visible, number, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reason = "Found no NVIDIA driver" if torch.version.cuda else "a build for CPUs; install one for CUDA"
    with pytest.raises(DataError, match=f"^CUDA_VISIBLE_DEVICES is {visible} on .*: .*{reason}.* .empty.;"):
        find_device(number)
