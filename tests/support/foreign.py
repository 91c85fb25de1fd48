"""Files of features as other tools write them, by what their sources say; none was seen."""

import h5py
import numpy as np


def write_trident(path, features, coords, side=512, encoder="uni_v2", overlap=0):
    """SLIDE.h5 as TRIDENT 0.3.1 writes it: chunks of a row, attributes on both datasets, None as a text."""
    with h5py.File(path, "w") as file:
        for name, array in (("features", features), ("coords", np.asarray(coords, np.int64))):
            chunks = (1, *array.shape[1:]) if len(array) else None
            file.create_dataset(
                name, data=array, maxshape=(None, *array.shape[1:]) if len(array) else None, chunks=chunks
            )
        file["features"].attrs.update({"name": path.stem, "savetodir": str(path.parent), "encoder": encoder})
        file["coords"].attrs.update(
            {
                "patch_size": side // 2,
                "patch_size_level0": side,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": overlap,
                "name": path.stem,
                "savetodir": str(path.parent),
                "level0_width": "None",
            }
        )


def write_clam(path, features, coords, patches, size=256, level=1, downsample=2.0):
    """h5_files/SLIDE.h5 as CLAM writes it, and patches/SLIDE.h5, which alone says how large a tile is."""
    for folder in (path.parent, patches):
        folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features.astype(np.float32), chunks=(1, features.shape[1]))
        file.create_dataset("coords", data=np.asarray(coords, np.int32))
    with h5py.File(patches / path.name, "w") as file:
        file["coords"] = np.asarray(coords, np.int32)
        file["coords"].attrs.update(
            {"patch_size": size, "patch_level": level, "downsample": (downsample, downsample), "name": path.stem}
        )


def write_stamp(path, features, coords_um, side_um=256.0, **attributes):
    """SLIDE.h5 as STAMP 2.5.0 writes it: float16 vectors, float32 places in micrometres."""
    with h5py.File(path, "w") as file:
        file["coords"] = np.asarray(coords_um, np.float32)
        file["feats"] = features.astype(np.float16)
        stated = {
            "stamp_version": "2.5.0",
            "extractor": "uni2",
            "unit": "um",
            "tile_size_um": side_um,
            "tile_size_px": 224,
            "code_hash": "0123abcd",
            "feat_type": "tile",
        }
        file.attrs.update({name: value for name, value in (stated | attributes).items() if value is not None})
