"""Which patches are nearly blank or no H&E, on colours mixed by hand, on virtual tissue and on real patches."""

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from PIL import Image

from lgd.shards.image import decode
from lgd.stain.checks import NEARLY_BLANK, NO_HE, find_notes, measure_colours
from lgd.stain.deconvolve import H_DAB, H_E, rgb_to_od, unmix
from lgd.stain.targets import TARGET_SETTINGS, estimate_white
from lgd.tissue.sections import Scene, draw_pair

WHITE = (244, 242, 245)


def stained(stains_33, first, second, size=64, share=0.7, glass=WHITE):
    """Tissue of two stains on the upper `share` of a patch; below it glass."""
    rng = np.random.default_rng(0)
    amounts_13HW = torch.zeros(1, 3, size, size, dtype=torch.float64)
    rows = round(size * share)
    for channel, amount in enumerate((first, second)):
        amounts_13HW[0, channel, :rows] = torch.from_numpy(amount * rng.uniform(0.2, 1.8, (rows, size)))
    white = torch.tensor(glass, dtype=torch.float64).view(1, 3, 1, 1)
    rgb_HW3 = od_to_rgb(mix(amounts_13HW, stains_33), white)[0].permute(1, 2, 0).numpy()
    return np.clip(rgb_HW3 + rng.normal(0, 1.5, rgb_HW3.shape), 0, 255).astype(np.uint8)


def resized(patch, size):
    return np.array(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR))


def tiles(patch, size):
    height, width = patch.shape[:2]
    corners = [(y, x) for y in range(0, height - size + 1, size) for x in range(0, width - size + 1, size)]
    return [patch[y : y + size, x : x + size] for y, x in corners]


@pytest.mark.parametrize("glass", [WHITE, (255, 255, 255), (175, 172, 178), (246, 240, 228)])
@pytest.mark.parametrize("size", [32, 100, 256])
def test_hematoxylin_and_eosin_are_h_and_e(glass, size):
    for hematoxylin, eosin in ((0.3, 0.3), (0.6, 0.05), (0.05, 0.3), (0.1, 0.07)):
        for share in (0.2, 0.7, 1.0):
            assert find_notes(stained(H_E, hematoxylin, eosin, size, share, glass)) == []


@pytest.mark.parametrize("glass", [WHITE, (175, 172, 178)])
@pytest.mark.parametrize("size", [32, 100, 256])
def test_dab_is_not(glass, size):
    for hematoxylin, dab in ((0.1, 0.3), (0.2, 0.2), (0.05, 0.15)):
        assert find_notes(stained(H_DAB, hematoxylin, dab, size, glass=glass)) == [NO_HE]


def test_a_little_dab_on_a_counterstain_is_told():
    patch = stained(H_DAB, 0.25, 0.0)
    patch[:6] = stained(H_DAB, 0.1, 0.5)[:6]
    assert measure_colours(patch).green_over_blue > 0.065
    assert find_notes(patch) == [NO_HE]


def test_pictures_of_something_else_are_no_h_and_e():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (96, 96, 3), np.uint8)
    grey_he = np.repeat(stained(H_E, 0.3, 0.3).mean(-1, keepdims=True).astype(np.uint8), 3, axis=2)
    leaves = (np.array([60, 120, 40]) * rng.uniform(0.5, 1.5, (96, 96, 1))).astype(np.uint8)
    sky = (np.array([90, 150, 230]) * rng.uniform(0.8, 1.1, (96, 96, 1))).astype(np.uint8)
    skin = (np.array([220, 170, 140]) * rng.uniform(0.5, 1.1, (96, 96, 1))).astype(np.uint8)
    for patch in (noise, grey_he, leaves, sky, skin, np.zeros((40, 40, 3), np.uint8), 255 - stained(H_E, 0.3, 0.3)):
        assert find_notes(patch) == [NO_HE]


@pytest.mark.parametrize("level", [255, 246, 200, 175, 150])
def test_glass_is_nearly_blank_and_pale_tissue_is_not(level):
    glass = (level, level - 3, level - 1)
    assert find_notes(stained(H_E, 0, 0, glass=glass)) == [NEARLY_BLANK]
    assert find_notes(stained(H_E, 0.4, 0.3, share=0.03, glass=glass)) == [NEARLY_BLANK]
    assert find_notes(np.full((64, 64, 3), glass, np.uint8)) == [NEARLY_BLANK]
    assert find_notes(stained(H_E, 0.05, 0.05, share=0.5, glass=glass)) == []
    assert find_notes(stained(H_E, 0.4, 0.3, share=0.1, glass=glass)) == []


@pytest.mark.parametrize("shape", [(32, 32), (64, 100), (128, 90)])
def test_colours_are_those_of_the_formula(shape):
    patch = stained(H_E, 0.3, 0.3, 128)[: shape[0], : shape[1]]
    patch[:3] = stained(H_DAB, 0.1, 0.4, 128)[:3, : shape[1]]
    pixels = patch.reshape(-1, 3).astype(float)
    darkest = np.sort(pixels.min(1))
    glass = np.median(pixels[pixels.min(1) >= darkest[-max(1, int(0.02 * len(pixels)))]], axis=0)
    od = -np.log10(np.maximum(pixels, 1) / np.maximum(glass, 0.9 * glass.max()))
    tissue = od[(od > 0.05).any(1)]
    red, green, blue = tissue.mean(0)
    brown = (tissue[:, 2] > tissue[:, 1]) & (tissue[:, 2] > 0.1)
    brown &= tissue[:, 2] - tissue[:, 0] > 0.05 * tissue.sum(1)
    expected = (len(tissue) / len(pixels), (green - blue) / (red + green + blue), (red - green) / (red + green + blue))
    assert measure_colours(patch) == pytest.approx((*expected, brown.mean()), abs=2e-3)


def test_virtual_tissue_is_told_apart():
    he, strong = [], []
    for slide in range(32):
        # Every strength of stain and every glass that `lgd synth --shortcut` gives, or the slide's own.
        scene = Scene(strength=slide % 4, glass=slide // 4 % 4) if slide < 16 else Scene()
        patch, ihc, truth = draw_pair(5, slide, 0, 64, scene=scene)
        he.append(find_notes(patch))
        if truth["patch_level"] >= 2:
            strong.append(find_notes(ihc))
    assert all(notes == [] for notes in he)
    assert len(strong) > 8 and np.mean([notes == [NO_HE] for notes in strong]) >= 0.9


@pytest.fixture(scope="module")
def real_patches(real_data):
    """Real H&E and IHC by source, RGB; C4 stands for her2st."""

    def read(pattern):
        return [decode(path.read_bytes(), str(path)) for path in sorted(real_data.glob(pattern))]

    he = {name: read(f"{name}/HE/**/*.png") for name in ("bci-native", "bci-thumbs", "mist-multistain")}
    ihc = {name: read(f"{name}/IHC/**/*.png") for name in he}
    he["birl"], ihc["birl"] = read("birl-unregistered/*_HE.jpg"), read("birl-unregistered/*_[!H]*.jpg")
    with Image.open(real_data / "wsi/cmu_small_region.svs") as slide:
        he["wsi"] = tiles(np.array(slide.convert("RGB")), 512)
    spots = np.load(real_data / "her2st/expression.npz", allow_pickle=False)
    (section,) = read("her2st/C4.jpg")
    he["her2st"] = [
        section[y - 128 : y + 128, x - 128 : x + 128] for x, y in spots["xy"][spots["section"] == "C4"][::3]
    ]
    return he, ihc


def has_dab(patch):
    """Whether 1 % of the pixels have as much DAB as a stained membrane."""
    rgb_13HW = torch.from_numpy(np.ascontiguousarray(patch)).permute(2, 0, 1)[None]
    dab_HW = unmix(rgb_to_od(rgb_13HW, estimate_white(rgb_13HW)), H_DAB)[0, 1]
    return (dab_HW > TARGET_SETTINGS["dab_stained"]).float().mean() >= 0.01


VIEWS = {
    "whole": lambda patch: [patch],
    "256": lambda patch: [resized(patch, 256)],
    "96": lambda patch: [resized(patch, 96)],
    "32": lambda patch: [resized(patch, 32)],
    "tiles of 256": lambda patch: tiles(patch, 256),
    "tiles of 96": lambda patch: tiles(patch, 96)[::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_real_patches_are_told_apart(real_patches, view):
    """The promise: a note on 80 % of the real IHC with DAB at least, and on 5 % of the real H&E at most."""
    he, ihc = ([[one for p in some for one in VIEWS[view](p)] for some in part.values()] for part in real_patches)
    assert np.mean([NO_HE in find_notes(one) for some in he for one in some]) <= 0.02
    # One of BCI's 16 thumbs shows the walls of fat cells, and its tile next to nothing else.
    most = 1 / 16 if view == "tiles of 96" else 0.05
    assert max(np.mean([NO_HE in find_notes(one) for one in some] or [0]) for some in he) <= most
    brown = [one for some in ihc for one in some if has_dab(one)]
    assert len(brown) >= 8 and np.mean([NO_HE in find_notes(one) for one in brown]) >= 0.8


def test_real_tissue_is_not_called_blank_and_real_glass_is(real_patches):
    he, _ = real_patches
    slide_tiles = he["wsi"]
    tissue = [patch for name, patches in he.items() for patch in patches if name != "wsi"]
    assert not [patch.shape for patch in tissue if NEARLY_BLANK in find_notes(patch)]
    blank = [NEARLY_BLANK in find_notes(tile) for tile in slide_tiles]
    darkest = [np.percentile(tile.min(-1), 10) for tile in slide_tiles]
    assert 3 <= sum(blank) <= 8 and all(level > 230 for level, told in zip(darkest, blank, strict=True) if told)
