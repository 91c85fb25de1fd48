"""Positive nuclei, of drawn cells and of virtual tissue, whose truth is known."""

import json
import math

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from scipy import ndimage, spatial

from lgd.base.errors import DataError
from lgd.shards.image import decode
from lgd.stain.deconvolve import H_DAB, rgb_to_od, unmix
from lgd.stain.nuclear import POSITIVE_SETTINGS, find_stained_nuclei, positive_grid
from lgd.stain.targets import TARGET_SETTINGS, estimate_white
from lgd.stream.plan import d4
from lgd.tissue.centers import Center
from lgd.tissue.drawing import MPP
from lgd.tissue.sections import Scene, draw_pair, list_nuclei

SIZE = 256
NUCLEI = Scene("nuclei")


def image(rgb: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].contiguous()


def centres(pitch: float = 30.0) -> np.ndarray:
    """Middles (N, 2) of cells in pixels, on a jittered lattice."""
    steps = np.arange(pitch / 2, SIZE - pitch / 3, pitch)
    points = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    return points + np.random.default_rng(0).uniform(-2, 2, points.shape)


def discs(points: np.ndarray, radius_um: float) -> np.ndarray:
    """How much of each pixel lies in discs around points (H, W)."""
    pixel = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), -1) + 0.5
    distance, _ = spatial.KDTree(points).query(pixel)
    return np.clip((radius_um - distance * MPP) / MPP + 0.5, 0, 1)


def render(blue: np.ndarray | float, brown: np.ndarray | float, white: float = 245.0) -> torch.Tensor:
    """uint8 (1, 3, H, W) of amounts, with a strip of bare glass and a little noise."""
    amounts = np.stack([np.broadcast_to(amount, (SIZE, SIZE)) for amount in (blue, brown, 0.0)]).copy()
    amounts[:, :12] = 0
    od = mix(torch.from_numpy(amounts)[None].float(), H_DAB)
    noise = torch.randn(od.shape, generator=torch.Generator().manual_seed(1))
    return (od_to_rgb(od, white) + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("white", [245.0, 170.0])
@pytest.mark.parametrize("density", [0.3, 0.9, 1.6])
def test_brown_nuclei_without_blue_are_counted_beside_blue_ones(white: float, density: float) -> None:
    points = centres()
    positive = np.arange(len(points)) % 3 == 0
    blue, brown = 0.3 * discs(points[~positive], 3.4), density * discs(points[positive], 3.4)
    found = find_stained_nuclei(render(blue, brown, white), MPP)
    assert abs(int(found.positive_Bhw.sum()) - positive.sum()) <= 1
    assert abs(int(found.nuclei_Bhw.sum()) - len(points)) <= 2
    share, intensity = positive_grid(render(blue, brown, white), 1, MPP)[0, 0, 0].tolist()
    assert share == pytest.approx(positive.mean(), abs=0.02) and intensity == pytest.approx(density, rel=0.1)


def test_each_cell_of_the_grid_has_its_own() -> None:
    points = centres()
    below, right = points[:, 0] > SIZE / 2, points[:, 1] > SIZE / 2
    positive = below & ~right
    grid = positive_grid(render(0.3 * discs(points[~positive], 3.4), 0.8 * discs(points[positive], 3.4)), 2, None)
    assert grid.shape == (1, 2, 2, 2) and grid.dtype == torch.float32
    share, intensity = grid[0].permute(2, 0, 1).tolist()
    assert share[0] == [0, 0] and share[1][1] == 0 and share[1][0] > 0.9
    assert intensity[0] == [0, 0] and intensity[1] == [pytest.approx(0.8, rel=0.1), 0]


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("nuclei", [0.0, 0.25])
def test_evenly_brown_tissue_and_its_rims_are_no_nuclei(amount: float, nuclei: float) -> None:
    """Brown everywhere, in a round nest, in a square: with blue nuclei and without."""
    square = np.zeros((SIZE, SIZE))
    square[60:200, 60:200] = 1
    blue = nuclei * discs(centres(), 3.4)
    for brown in (1.0, discs(np.array([[128.0, 128.0]]), 36.0), square):
        assert find_stained_nuclei(render(blue, amount * brown), MPP).positive_Bhw.sum() <= 4


@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_brown_cytoplasm_around_a_blue_nucleus_is_hardly_taken_for_one(amount: float) -> None:
    points = centres()
    found = find_stained_nuclei(render(0.25 * discs(points, 3.4), amount * discs(points, 6.2)), MPP)
    assert found.positive_Bhw.sum() < 0.25 * len(points)


def test_glass_and_tissue_without_brown_have_none() -> None:
    for picture in (torch.full((1, 3, SIZE, SIZE), 180, dtype=torch.uint8), render(0.3 * discs(centres(), 3.4), 0.0)):
        assert positive_grid(picture, 4, MPP).abs().max() == 0


def test_share_and_intensity_follow_the_truth_of_virtual_tissue() -> None:
    """One patch of each of 24 slides."""
    rows = []
    for slide in range(24):
        _, ihc, truth = draw_pair(21, slide, 0, 128, scene=NUCLEI)
        share, intensity = positive_grid(image(ihc), 1, MPP)[0, 0, 0].tolist()
        drawn = truth["ihc_positive_nuclei"] / max(1, truth["ihc_nuclei"])
        rows.append((share, drawn, intensity, truth["positive_od"], truth["ihc_positive_nuclei"]))
    share, drawn, intensity, density, positive = np.array(rows).T
    assert np.corrcoef(share, drawn)[0, 1] > 0.95 and np.abs(share - drawn).mean() < 0.04
    some = positive > 2
    assert np.corrcoef(intensity[some], density[some])[0, 1] > 0.9


@pytest.mark.parametrize("haze", [0.1, 0.3])
def test_even_haze_moves_no_share(haze: float) -> None:
    points = centres()
    positive = np.arange(len(points)) % 3 == 0
    blue, brown = 0.25 * discs(points[~positive], 3.4), haze + 0.6 * discs(points[positive], 3.4)
    share = positive_grid(render(blue, brown), 1, MPP)[0, 0, 0, 0].item()
    assert share == pytest.approx(positive.mean(), abs=0.03)


def test_a_nucleus_is_positive_where_it_was_drawn_so() -> None:
    right = seen = total = 0
    for slide in range(6):
        _, ihc, _ = draw_pair(22, slide, 0, 160, scene=NUCLEI)
        nuclei, found = list_nuclei(22, slide, 0, 160), find_stained_nuclei(image(ihc), MPP)
        middle = (found.nuclei_Bhw[0].nonzero().numpy() + 0.5) * found.step
        positive = found.positive_Bhw[found.nuclei_Bhw].numpy()
        distance, nearest = spatial.KDTree(middle).query(nuclei.yx)
        near = distance * MPP < 3
        right += int((positive[nearest[near]] == nuclei.positive[near]).sum())
        seen, total = seen + int(near.sum()), total + len(near)
    assert seen > 0.8 * total and right > 0.97 * seen


def test_pale_nuclei_are_counted() -> None:
    """Of a center whose counterstain is faint: those missed would make the share too high."""
    center, drawn, counted = Center(2, 3), 0, 0
    for slide in (3, 4, 6):
        _, ihc, truth = draw_pair(9406, slide, 0, 160, scene=Scene("nuclei", center=center))
        drawn += truth["ihc_nuclei"]
        counted += int(find_stained_nuclei(image(ihc), MPP).nuclei_Bhw.sum())
    assert counted > 0.75 * drawn


def test_membranes_are_no_nuclei() -> None:
    """Of the stain of HER2 little is taken for nuclei, at no level."""
    shares = {level: [] for level in range(4)}
    for slide in range(16):
        _, ihc, truth = draw_pair(23, slide, 0, 128)
        shares[truth["patch_level"]].append(positive_grid(image(ihc), 1, MPP)[0, 0, 0, 0].item())
    assert max(np.mean(shares[level]) for level in (0, 1, 2)) < 0.08
    assert np.mean(shares[3]) < 0.25


def naive_nuclei(rgb: torch.Tensor, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """The middles of nuclei, and of positive ones, of one image, by scipy, one nucleus after the other."""
    s, t = POSITIVE_SETTINGS, TARGET_SETTINGS
    step = max(1, round(t["detection_mpp"] / mpp))
    low = mpp * step
    height, width = (-(-side // step) for side in rgb.shape[2:])
    light = np.array(
        [
            [
                [plane[y * step : (y + 1) * step, x * step : (x + 1) * step].mean() for x in range(width)]
                for y in range(height)
            ]
            for plane in rgb[0].numpy().astype(np.float64)
        ]
    )
    stains = unmix(rgb_to_od(torch.from_numpy(light)[None], estimate_white(rgb)), H_DAB)[0].numpy()
    blue, dab = stains[:2]
    over = dab - max(0.0, np.sort(dab.ravel())[math.ceil(s["haze_share"] * dab.size) - 1])
    brown = over - s["brown_of_blue"] * np.maximum(blue, 0)

    def respond(stain: np.ndarray, radius: float) -> np.ndarray:
        sigma = radius / math.sqrt(2) / low
        first, second = (
            ndimage.gaussian_filter(stain, part * sigma, mode="nearest", radius=max(1, int(3 * part * sigma + 0.5)))
            for part in (0.9, 1.44)
        )
        return first - second

    def mean(stain: np.ndarray, y: int, x: int) -> float:
        return stain[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean()

    def rays(y: int, x: int) -> np.ndarray:
        radii = np.arange(s["membrane_from_um"], s["membrane_to_um"] + 1e-6, s["membrane_step_um"]) / low
        angles = (np.arange(s["membrane_sectors"]) + 0.5) * 2 * np.pi / s["membrane_sectors"]
        rows = np.clip(np.rint(y + radii[:, None] * np.sin(angles)), 0, height - 1).astype(int)
        return brown[rows, np.clip(np.rint(x + radii[:, None] * np.cos(angles)), 0, width - 1).astype(int)]

    by_blue = respond(blue - t["ihc_brown_weight"] * np.maximum(dab, 0), t["nucleus_radius_um"])
    strong = np.sort(by_blue.ravel())[max(1, math.ceil(0.99 * by_blue.size)) - 1]
    by_blue = by_blue / max(t["nucleus_contrast_share"] * strong, s["blue_contrast"])
    reach = 2 * int(s["line_um"] / low) + 1
    opened = ndimage.maximum_filter(ndimage.minimum_filter(brown, reach, mode="nearest"), reach, mode="nearest")
    by_brown = respond(opened, s["brown_radius_um"])
    negative, positive = [], []
    is_blue = (by_blue > 1) & (blue > t["ihc_least_hematoxylin"]) & (blue > s["blue_over_brown"] * over)
    is_blue &= np.array([[mean(brown, y, x) < s["brown_most"] for x in range(width)] for y in range(height)])
    response = np.maximum(np.where(is_blue, by_blue, 0), by_brown / s["brown_contrast"])
    near = max(1, int(t["nucleus_distance_um"] / low))
    for y, x in np.argwhere(response > 1):
        if response[y, x] < response[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1].max():
            continue
        core = mean(brown, y, x)
        if core > s["brown_least"] and by_brown[y, x] > s["brown_contrast_share"] * core:
            if (rays(y, x).min(0) < s["end_share"] * core).sum() >= s["end_sectors"]:
                positive.append((y, x))
        elif is_blue[y, x]:
            negative.append((y, x))
    reach = max(1, int(s["ringed_um"] / low))
    for y, x in negative:
        ringed = rays(y, x).max(0) > max(s["membrane_contrast"] * mean(brown, y, x), s["brown_least"])
        if ringed.sum() >= s["ringed_sectors"]:
            positive = [one for one in positive if max(abs(one[0] - y), abs(one[1] - x)) > reach]
    return np.array(sorted(negative + positive)), np.array(sorted(positive))


@pytest.mark.parametrize("mpp, scene", [(MPP, NUCLEI), (MPP, Scene()), (0.92, NUCLEI), (0.3, NUCLEI)])
def test_the_nuclei_are_those_of_a_naive_twin(mpp: float, scene: Scene) -> None:
    for slide in (1, 3):
        picture = image(draw_pair(24, slide, 0, 128, scene=scene)[1])[..., :120, :125].contiguous()
        found = find_stained_nuclei(picture, mpp)
        nuclei, positive = naive_nuclei(picture, mpp)
        for mask, expected in ((found.nuclei_Bhw, nuclei), (found.positive_Bhw, positive)):
            ours = {tuple(place) for place in mask[0].nonzero().tolist()}
            # A bound that a value meets to the last digit may fall on either side.
            assert len(ours ^ {tuple(place) for place in expected.tolist()}) <= 1


@pytest.mark.parametrize("batch", [1, 7])
def test_no_number_depends_on_the_batch_or_on_the_threads(batch: int) -> None:
    pictures = torch.cat([image(draw_pair(25, slide, 0, 128, scene=NUCLEI)[1]) for slide in (0, 1)])
    alone = [positive_grid(pictures[i : i + 1], 8, MPP) for i in (0, 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = torch.arange(batch) % 2
        together = positive_grid(pictures[rows], 8, MPP)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat([alone[i] for i in rows]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    pictures = torch.cat([image(draw_pair(25, slide, 0, 128, scene=NUCLEI)[1]) for slide in range(4)])
    on_cpu, on_gpu = positive_grid(pictures, 8, MPP), positive_grid(pictures.cuda(), 8, MPP).cpu()
    assert ((on_cpu - on_gpu).abs() > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("k", [1, 4, 6])
def test_the_target_turns_with_the_image(k: int) -> None:
    element = torch.tensor([k])
    picture = image(draw_pair(27, 1, 0, 128, scene=NUCLEI)[1])
    turned = d4(positive_grid(picture, 4, MPP), element, (1, 2))
    # A nucleus on the line between two cells may be counted on either side.
    near = ((positive_grid(d4(picture, element), 4, MPP) - turned).abs() < 0.02).float().mean()
    assert near > 0.9


@pytest.mark.parametrize("mpp", [0.25, 1.0, 2.8])
def test_odd_sizes_and_scales_are_taken(mpp: float) -> None:
    picture = image(draw_pair(26, 0, 0, 128, scene=NUCLEI)[1])[..., :101, :67]
    grid = positive_grid(picture, 3, mpp)
    assert torch.isfinite(grid).all() and ((grid[..., 0] >= 0) & (grid[..., 0] <= 1)).all()


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_scale_is_refused(mpp: float) -> None:
    with pytest.raises(DataError, match="mpp is .*micrometres per pixel"):
        positive_grid(render(0.3, 0.0), 4, mpp)


def test_settings_survive_the_recipe() -> None:
    assert json.loads(json.dumps(POSITIVE_SETTINGS)) == POSITIVE_SETTINGS


def test_real_nuclear_markers_have_positive_nuclei_and_a_negative_her2_has_none(real_data) -> None:
    """Bounds around what was looked at on overlays: about 70 positive nuclei are seen in Ki67, more in PR."""
    found = {}
    for marker in ("Ki67", "ER", "PR", "HER2"):
        path = real_data / "mist-multistain" / "IHC" / f"{marker}.png"
        nuclei = find_stained_nuclei(image(decode(path.read_bytes(), path.name, None)), 0.4661)
        found[marker] = (int(nuclei.positive_Bhw.sum()), int(nuclei.nuclei_Bhw.sum()))
    assert 50 < found["Ki67"][0] < 90 and 0.12 < found["Ki67"][0] / found["Ki67"][1] < 0.3
    assert 60 < found["ER"][0] < 120 and 150 < found["PR"][0] < 260
    assert found["HER2"][0] <= 2 and found["HER2"][1] > 100
