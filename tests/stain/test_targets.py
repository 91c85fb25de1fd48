"""Nuclei and membranes of drawn cells, whose truth is known."""

import json

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from PIL import Image
from scipy import spatial

from lgd.base.errors import DataError
from lgd.shards.image import decode
from lgd.stain.deconvolve import H_DAB, H_E
from lgd.stain.targets import TARGET_SETTINGS, detect_nuclei, estimate_white, membrane_grid, nuclei_grid
from lgd.stream.plan import d4
from tools.bench import first_targets

MPP = 0.46
SIZE = 256
# Stained share of each outline, OD of the DAB, width of the membrane in um (FIELD's widths).
LEVELS = {"0": (0.0, 0.0, 0.64), "1+": (0.4, 0.25, 0.64), "2+": (1.0, 0.4, 1.0), "3+": (1.0, 1.0, 2.14)}


def lattice(size: int = SIZE, pitch: float = 30.0, seed: int = 0) -> np.ndarray:
    """Cell centres (N, 2) in pixels on a jittered lattice, well inside the image."""
    rng = np.random.default_rng(seed)
    steps = np.arange(pitch / 2, size - pitch / 3, pitch)
    points = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    return points + rng.uniform(-2, 2, points.shape)


def distances(centres: np.ndarray, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Distance in um (H, W) and angle of every pixel to its nearest centre."""
    pixel = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1) + 0.5
    _, nearest = spatial.KDTree(centres).query(pixel)
    y, x = np.moveaxis(pixel - centres[nearest], -1, 0)
    return np.hypot(y, x) * MPP, np.arctan2(y, x)


def edge(inside_um: np.ndarray) -> np.ndarray:
    """Share of a pixel that lies inside an outline, from its signed distance in um."""
    return np.clip(inside_um / MPP + 0.5, 0, 1)


def render(amounts: list[np.ndarray], stains: torch.Tensor, white: float = 245.0) -> torch.Tensor:
    """uint8 (1, 3, H, W) of the stain amounts, with a little sensor noise."""
    od = mix(torch.from_numpy(np.stack(amounts))[None].float(), stains)
    noise = torch.randn(od.shape, generator=torch.Generator().manual_seed(1))
    return (od_to_rgb(od, white) + noise).round().clamp(0, 255).to(torch.uint8)


def draw_he(centres: np.ndarray, white: float = 245.0, darkness: float = 0.6) -> torch.Tensor:
    """Nuclei of 3.4 um radius on eosin, with a strip of bare background."""
    distance, _ = distances(centres) if len(centres) else (np.full((SIZE, SIZE), 99.0), None)
    tissue = np.ones((SIZE, SIZE))
    tissue[:12] = 0
    hematoxylin = (0.08 + darkness * edge(3.4 - distance)) * tissue
    return render([hematoxylin, 0.25 * tissue, 0 * tissue], H_E, white)


def draw_ihc(level: str, white: float = 245.0, haze: float = 0.03) -> torch.Tensor:
    """Pale nuclei, each in an outline of 5.5 um radius that is stained over its level's share of angles."""
    share, darkness, width = LEVELS[level]
    distance, angle = distances(lattice())
    outline = edge(width / 2 - np.abs(distance - 5.5)) * ((angle + np.pi) < share * 2 * np.pi)
    tissue = np.ones((SIZE, SIZE))
    tissue[:12] = 0
    hematoxylin = 0.15 * edge(3.4 - distance) * tissue
    return render([hematoxylin, (haze + darkness * outline) * tissue, 0 * tissue], H_DAB, white)


def measured(ihc: torch.Tensor) -> list[float]:
    """Focal OD, stained fraction and completeness of a whole image."""
    return membrane_grid(ihc, 4, MPP).mean((0, 1, 2)).tolist()


def count(grid: torch.Tensor) -> float:
    """Nuclei in the whole image."""
    return grid.mean().item() * (SIZE * MPP) ** 2 / 1000


@pytest.mark.parametrize("white", [245.0, 170.0])
@pytest.mark.parametrize("darkness", [0.2, 0.7])
def test_every_drawn_nucleus_is_counted_in_its_cell(white: float, darkness: float) -> None:
    centres = lattice()
    grid = nuclei_grid(draw_he(centres, white, darkness), 4, MPP)
    assert grid.shape == (1, 4, 4) and grid.dtype == torch.float32
    truth, _, _ = np.histogram2d(centres[:, 0], centres[:, 1], bins=4, range=[[0, SIZE]] * 2)
    found = grid[0].numpy() * (SIZE * MPP / 4) ** 2 / 1000
    np.testing.assert_allclose(found, truth, atol=1.001)
    assert abs(found.sum() - truth.sum()) <= 2


def test_more_nuclei_give_more_density() -> None:
    found = [count(nuclei_grid(draw_he(lattice(pitch=pitch)), 8, None)) for pitch in (80, 40, 25)]
    truth = [len(lattice(pitch=pitch)) for pitch in (80, 40, 25)]
    np.testing.assert_allclose(found, truth, rtol=0.1)


def test_tissue_without_nuclei_and_bare_glass_have_none() -> None:
    bare = torch.full((1, 3, SIZE, SIZE), 180, dtype=torch.uint8)
    for image in (draw_he(np.empty((0, 2))), bare):
        assert count(nuclei_grid(image, 4, MPP)) <= 1
    assert membrane_grid(bare, 4, MPP).abs().max() == 0


def test_density_does_not_depend_on_the_resolution() -> None:
    image = draw_he(lattice())
    finer = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    coarse, fine = nuclei_grid(image, 4, MPP), nuclei_grid(finer, 4, MPP / 2)
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1.5 / ((SIZE * MPP / 4) ** 2 / 1000))


def test_membrane_measures_rise_with_the_level() -> None:
    grids = torch.cat([membrane_grid(draw_ihc(level), 4, MPP) for level in LEVELS])
    assert grids.shape == (4, 4, 4, 3) and grids.dtype == torch.float32
    focal, fraction, complete = grids.mean((1, 2)).T.tolist()
    assert fraction[0] == 0 and focal[0] == 0 and complete[0] == 0
    assert 0 < fraction[1] < fraction[2] < fraction[3]
    assert 0.15 < focal[1] < focal[2] < focal[3] < 1.0
    # The drawn share of the outline is what completeness measures.
    assert complete[1] == pytest.approx(0.4, abs=0.12)
    assert complete[2] > 0.9 and complete[3] > 0.9


@pytest.mark.parametrize("level", LEVELS)
def test_a_grey_background_changes_little(level: str) -> None:
    white, grey = (measured(draw_ihc(level, w)) for w in (250.0, 170.0))
    assert grey == pytest.approx(white, rel=0.1, abs=0.02)


def test_brown_cytoplasm_is_stained_but_has_no_outline() -> None:
    distance, _ = distances(lattice())
    brown = 0.5 * (distance < 6.0)
    nuclei = 0.15 * edge(3.4 - distance)
    focal, fraction, complete = measured(render([nuclei, brown, 0 * brown], H_DAB))
    assert focal == pytest.approx(0.5, abs=0.03)
    assert fraction == pytest.approx((distance < 6.0).mean(), abs=0.01)
    assert complete < 0.15
    # The same cells are seen once their membranes are darker than they are.
    outlined = brown + 0.5 * edge(0.5 - np.abs(distance - 5.5))
    assert measured(render([nuclei, outlined, 0 * brown], H_DAB))[2] > 0.85


def test_a_patch_full_of_stain_keeps_it() -> None:
    everywhere = np.full((SIZE, SIZE), 0.4)
    image = render([0 * everywhere, everywhere, 0 * everywhere], H_DAB)
    focal, fraction, _ = measured(image)
    # Some is lost: without glass there is no telling how bright it is.
    assert fraction == 1.0 and 0.2 < focal < 0.4


def test_the_white_is_the_background() -> None:
    white = estimate_white(torch.cat([draw_ihc("2+", 245.0), draw_ihc("2+", 170.0)]))
    torch.testing.assert_close(white.flatten(1), torch.tensor([[245.0] * 3, [170.0] * 3]), rtol=0, atol=3)


def compare_membranes(image: torch.Tensor, mpp: float) -> None:
    """To the bit on an AMD EPYC; on an Intel Xeon by up to 1.2e-7, so that the last bit of a sum is the processor's."""
    ours, first = membrane_grid(image, 4, mpp), first_targets.membrane_grid(image, 4, mpp)
    torch.testing.assert_close(ours, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mpp", [0.23, MPP, 0.92, 1.5, 2.8])
@pytest.mark.parametrize("height, width", [(SIZE, SIZE), (201, 255), (67, 130)])
def test_the_numbers_are_those_of_the_first_edition(mpp: float, height: int, width: int) -> None:
    for he, ihc in ((draw_he(lattice()), draw_ihc("1+")), (draw_he(lattice(pitch=30)), draw_ihc("3+", 170.0))):
        he, ihc = he[..., :height, :width], ihc[..., :height, :width]
        assert torch.equal(nuclei_grid(he, 8, mpp), first_targets.nuclei_grid(he, 8, mpp))
        compare_membranes(ihc, mpp)


def test_the_numbers_of_real_patches_are_those_of_the_first_edition(real_data) -> None:
    for path in sorted((real_data / "bci-native").glob("*/test/*")):
        image = torch.from_numpy(decode(path.read_bytes(), path.name, None))[None].permute(0, 3, 1, 2)
        assert torch.equal(nuclei_grid(image, 8, MPP), first_targets.nuclei_grid(image, 8, MPP))
        compare_membranes(image, MPP)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_no_number_depends_on_the_batch_or_on_the_threads(batch: int, threads: int) -> None:
    he = torch.cat([draw_he(lattice(pitch=pitch)) for pitch in (30, 50)])[..., :160, :160]
    ihc = torch.cat([draw_ihc("1+"), draw_ihc("3+", 170.0)])[..., :160, :160]
    alone = [(nuclei_grid(he[i : i + 1], 8, MPP), membrane_grid(ihc[i : i + 1], 4, MPP)) for i in (0, 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = torch.arange(batch) % 2
        nuclei, membrane = nuclei_grid(he[rows], 8, MPP), membrane_grid(ihc[rows], 4, MPP)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(nuclei, torch.cat([alone[i][0] for i in rows]))
    assert torch.equal(membrane, torch.cat([alone[i][1] for i in rows]))


@pytest.mark.parametrize("k", range(8))
def test_targets_turn_with_the_image(k: int) -> None:
    element = torch.tensor([k])
    he, ihc = draw_he(lattice()), draw_ihc("1+")
    # A nucleus on the line between two cells may be counted on either side.
    one = 1 / ((SIZE * MPP / 4) ** 2 / 1000)
    turned = d4(nuclei_grid(he, 4, MPP), element, (1, 2))
    torch.testing.assert_close(nuclei_grid(d4(he, element), 4, MPP), turned, rtol=0, atol=1.01 * one)
    turned = d4(membrane_grid(ihc, 4, MPP), element, (1, 2))
    torch.testing.assert_close(membrane_grid(d4(ihc, element), 4, MPP), turned, rtol=0.05, atol=0.08)


def test_odd_sizes_and_layouts_are_taken() -> None:
    he, ihc = draw_he(lattice())[..., :201, :255], draw_ihc("3+")[..., :201, :255]
    last = he.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(nuclei_grid(last, 3, MPP), nuclei_grid(he.contiguous(), 3, MPP))
    assert torch.isfinite(membrane_grid(ihc, 3, 2.8)).all()
    assert (membrane_grid(ihc, 3, MPP)[..., 2] > 0.7).all()


def test_a_nucleus_is_found_at_its_centre() -> None:
    y, x = np.mgrid[:64, :64]
    stain = torch.from_numpy(0.5 * (np.hypot(y - 20, x - 41) * 0.92 < 3.2))[None].float()
    assert detect_nuclei(stain, 0.92, 0.04).nonzero().tolist() == [[0, 20, 41]]


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_scale_is_refused(mpp: float) -> None:
    with pytest.raises(DataError, match="mpp is .*micrometres per pixel"):
        nuclei_grid(draw_he(lattice()), 4, mpp)


def test_settings_survive_the_recipe() -> None:
    assert json.loads(json.dumps(TARGET_SETTINGS)) == TARGET_SETTINGS


def test_real_patches_have_a_sensible_number_of_nuclei(real_data) -> None:
    for path in sorted((real_data / "bci-native" / "HE" / "test").iterdir()):
        with Image.open(path) as image:
            he = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        density = nuclei_grid(he, 8, MPP)
        # Breast tissue has some 2 to 12 nuclei in 1000 um2; both patches are rich in cells.
        assert 2 < density.mean() < 12
        assert density.max() < 20
