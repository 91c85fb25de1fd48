"""Slides for tests: an H&E and an IHC of neighbouring sections, which share glands and little else."""

import csv

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter

from lgd.tissue.pyramid import write_pyramid

MPP = 0.46
# Optical density of red, green and blue.
_STAINS = {"he": ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11)), "ihc": ((0.65, 0.70, 0.29), (0.27, 0.57, 0.78))}


def draw_section(stain, seed, height=512, width=512, shift=(0, 0), matrix=None, frame=None):
    """uint8 (height, width, 3). A round of tissue on glass; `shift` moves the tissue by rows and columns.

    `matrix`: 2 x 3, which place of a section of `frame` x `frame` pixels lies at each (x, y).
    """
    margin = 128
    rng = np.random.default_rng(seed)
    size = (frame or height) + 2 * margin, (frame or width) + 2 * margin
    glands = gaussian_filter(rng.normal(size=size).astype(np.float32), 7)
    glands = np.clip(glands / glands.std(), -1, 1.5) + 1
    nuclei = np.random.default_rng((seed, stain == "he")).normal(size=size).astype(np.float32)
    nuclei = np.maximum(gaussian_filter(nuclei, 3) / 0.09 - 0.8, 0)
    y, x = np.mgrid[: size[0], : size[1]]
    radius = np.hypot((y - size[0] / 2) / (frame or height), (x - size[1] / 2) / (frame or width))
    tissue = gaussian_filter((radius < 0.46).astype(np.float32), 2)
    fields = np.stack([tissue * (0.05 + 0.12 * nuclei), tissue * (0.06 + 0.16 * glands)])
    if matrix is not None:
        (a, b, c), (d, e, f) = matrix
        turn = np.array([[e, d], [b, a]])
        offset = np.array([f, c]) + margin
        shape = (height, width)
        fields = np.stack([affine_transform(field, turn, offset, shape, order=1) for field in fields])
    else:
        top, left = (margin - by for by in shift)
        fields = fields[:, top : top + height, left : left + width]
    od = np.tensordot(fields, np.array(_STAINS[stain], np.float32), (0, 0))
    noise = np.random.default_rng((seed, 7)).normal(0, 1.5, od.shape)
    return np.clip(245 * 10**-od + noise, 0, 255).astype(np.uint8)


def write_sections(folder, name, seed, mpp=MPP, shift=(0, 0), **drawn):
    """Write NAME-he.tif and NAME-ihc.tif, of which the IHC may be moved; give the row of a CSV."""
    folder.mkdir(exist_ok=True)
    write_pyramid(folder / f"{name}-he.tif", draw_section("he", seed, **drawn), mpp)
    write_pyramid(folder / f"{name}-ihc.tif", draw_section("ihc", seed, shift=shift, **drawn), mpp)
    return {"he": f"{name}-he.tif", "ihc": f"{name}-ihc.tif", "slide": name}


def write_rows(path, rows):
    """Write a CSV of slides."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
