"""Folders with the names that BCI and MIST publish, of tiny images: what lies in them is noise."""

import itertools

import numpy as np
import simplejpeg

SIDE = 32


def write_published(root, layout, images, levels):
    """Write as many images into each folder of a layout as `images` says, and of each level as `levels` does.

    Where the numbers of levels are not published, the four come in turn.
    """
    dice = np.random.default_rng(0)
    for folder, count in images.items():
        (root / folder).mkdir(parents=True)
        stated = [level for level, many in levels.get(folder, {}).items() for _ in range(many)]
        for number, level in zip(range(count), stated or itertools.cycle(["0", "1+", "2+", "3+"]), strict=False):
            blocks = dice.integers(90, 255, (4, 4, 3), dtype=np.uint8)
            content = simplejpeg.encode_jpeg(np.kron(blocks, np.ones((SIDE // 4, SIDE // 4, 1), np.uint8)), quality=90)
            (root / folder / name_image(layout, folder, number, level)).write_bytes(content)


def name_image(layout, folder, number, level):
    """BCI's names end with the level, and its .png are JPEG; MIST's are a slide, a row and a column."""
    if layout == "bci":
        return f"{number:05d}_{folder.partition('/')[2]}_{level}.png"
    part, place = divmod(number, 2)
    return f"{100 + part}M{folder[:-1]}_{place}_0.jpg"
