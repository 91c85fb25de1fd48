"""What `efficiency` counts, against numbers known by hand, and one tiny run. No timing is asserted."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tools.bench import efficiency, staining
from tools.bench.inputs import Inputs
from tools.bench.measure import Settings, pinned


@pytest.fixture(scope="module")
def tiny() -> Settings:
    return Settings(size=32, side=64, threads=1, seconds=0.01, rounds=2, pairs=1)


@pytest.fixture(scope="module")
def facts(tiny, tmp_path_factory):
    with pinned():
        outcome = efficiency.run(tiny, Inputs(tiny, tmp_path_factory.mktemp("bench")))
        assert torch.get_num_threads() == 1
    assert [ratio.name for ratio in outcome.ratios] == ["efficiency"]
    return json.loads(json.dumps(outcome.facts, allow_nan=False))


def test_the_generator_is_the_published_one():
    # What pytorch-CycleGAN-and-pix2pix prints for resnet_9blocks: 11.378 M.
    assert efficiency.parameters(staining.generator()) == 11_378_179
    small = staining.generator(width=4, blocks=2).eval()
    with torch.inference_mode():
        out = small(2 * torch.rand(1, 3, 24, 32) - 1)
    assert out.shape == (1, 3, 24, 32) and out.abs().max() <= 1
    normed = [layer for layer in small.modules() if isinstance(layer, nn.InstanceNorm2d)]
    assert len(normed) == 5 + 2 * 2 and not any(layer.affine for layer in normed)


def test_a_multiply_add_is_two_flops():
    convolution = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    assert efficiency.flops(convolution, 16, 24) == 2 * (8 * 12) * 8 * (3 * 5 * 5)
    # The generator by hand, at 64 px: multiply-adds an output pixel of each size.
    outer, down, block = 2 * 64 * 3 * 49, 64 * 128 * 9, 256 * 256 * 9
    # Both steps down, and both steps up, have the same number: half the width in, four times the pixels.
    multiply_adds = outer * 64**2 + 2 * down * 32**2 + 2 * (4 * down) * 16**2 + 18 * block * 16**2
    assert efficiency.flops(staining.generator(), 64, 64) == 2 * multiply_adds


def test_counting_computes_nothing_and_counts_the_same(tiny):
    student, _ = efficiency.networks(tiny)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = student(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() == efficiency.flops(student, 64, 64)
    assert next(student.parameters()).device.type == "cpu"
    assert {"map", "nuclei", "membrane", "gate"} <= out.keys(), "it is the full LGD-Net"


def test_both_memory_formats_paint_the_same(tiny):
    torch.manual_seed(0)
    rival = staining.VirtualStaining(efficiency.networks(tiny)[1], tiny.size, "cpu")
    he_HW3 = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    painted = []
    for memory_format in staining.FORMATS.values():
        rival.lay_out(memory_format)
        painted.append(rival.paint(he_HW3))
        assert painted[-1].shape == (1, 3, 32, 32)
    assert torch.allclose(*painted, atol=0.05)
    assert painted[0].min() >= 0 and painted[0].max() <= 255 and painted[0].std() > 0
    probability = rival.classify(painted[0])
    assert probability.shape == (1, 4) and probability.sum() == pytest.approx(1)


def test_the_facts_name_every_part(facts, tiny):
    ours, theirs, full = (facts[name] for name in ("lgd_net", "virtual_staining", "lgd_net_at_the_generators_size"))
    assert ours["parts"].keys() == {"decode", "network"}
    assert theirs["parts"].keys() == {"decode", "generator", "classifier"}
    for side in (ours, theirs):
        assert side["latency_ms"] > 0
        assert all(part["ms"] > 0 and "peak_mb" in part for part in side["parts"].values())
    generator, classifier = theirs["parts"]["generator"], theirs["parts"]["classifier"]
    assert theirs["parameters"] == 11_378_179 + classifier["parameters"]
    assert theirs["gflops"] == pytest.approx(generator["gflops"] + classifier["gflops"])
    # Twice the side, four times the convolutions.
    assert 3.5 < full["gflops"] / ours["gflops"] <= 4
    assert facts["times_as_much"]["gflops"] == pytest.approx(theirs["gflops"] / ours["gflops"])
    assert theirs["generator_by_memory_format"]["taken"] in staining.FORMATS
    assert facts["input"]["pixels"] == ["64x64"] and facts["input"]["side"] == 32
    assert facts["threads"] == {"computing": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only a GPU's memory is measured")
def test_the_peak_is_of_the_call_and_not_of_what_was_held_or_freed_before():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held, freed = (torch.ones(count, device=device) for count in (5_000_000, 10_000_000))
    del freed
    for mb in (40, 20):
        found = efficiency.peak_mb(lambda mb=mb: torch.ones(mb * 250_000, device=device).sum())
        assert found == pytest.approx(mb, abs=2.5)
    assert held.sum() == 5_000_000
