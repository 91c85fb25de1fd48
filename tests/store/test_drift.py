"""A teacher that gives other latents than it gave, with the same weights."""

from pathlib import Path

import numpy as np
import pytest
from filling import contents_of

from lgd.base.errors import DataError
from lgd.models.encoder import Encoded, Encoder
from lgd.models.teacher import load_teacher
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.store.drift import fixed_images, make_fixed_vectors
from lgd.store.store import Store


def test_the_images_are_fixed_and_unlike_each_other():
    images = fixed_images(64)
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    assert images[0, 1, 2].tolist() == [13, 73, 133] and images[1, 3, 5].tolist() == [15, 100, 185]
    assert len(np.unique(images)) == 256


def test_what_a_teacher_makes_of_them_is_kept(small_parts):
    layer = Store(small_parts.latents.dir).document.teachers["teacher"]
    teacher, config = load_teacher(small_parts.teacher.dir)
    assert layer.probe == make_fixed_vectors(teacher, config.size)
    assert np.shape(layer.probe) == (2, teacher.dim) and layer.probe[0] != layer.probe[1]
    assert layer.versions["torch"]


@pytest.mark.parametrize(("factor", "refused"), [(1.0001, False), (1.01, True)])
def test_rows_of_other_libraries_are_not_added(small_parts, change, tmp_path, monkeypatch, factor, refused):
    config, shards = change(small_parts, latents={"dir": str(tmp_path)}), ShardSet.open(small_parts.shard_dirs).shards
    few = cache_latents(config, shards[:3], workers=0).store
    before, forward = contents_of(tmp_path), Encoder.forward

    def drifted(self, images):
        map_BCHW, pooled_BD = forward(self, images)
        return Encoded(map_BCHW, factor * pooled_BD + (factor - 1) * pooled_BD.abs().mean())

    monkeypatch.setattr(Encoder, "forward", drifted)
    if refused:
        with pytest.raises(DataError, match=r"the teacher teacher gives other latents .*\(torch .*, now .*install the"):
            cache_latents(config, shards, workers=0)
        assert contents_of(tmp_path) == before and Store(Path(tmp_path)).document == few.document
    else:
        assert cache_latents(config, shards, workers=0).store.document.teachers["teacher"].probe is not None
