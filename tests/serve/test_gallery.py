"""The patches of a store by their names in urls, their pictures, and which IHCs are hubs."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from lgd.models.description import StudentConfig
from lgd.serve.gallery import StoreGallery, encode_jpeg, name_patch
from lgd.serve.names import UnknownName
from lgd.serve.neighbours import _describe_hubs
from lgd.serve.network import open_store
from lgd.serve.options import ServeOptions
from lgd.shards.shard_set import ShardSet
from lgd.stream.reader import Reader


@pytest.fixture(scope="module")
def gallery(tissue_run):
    options = ServeOptions(model=tissue_run.student.dir, store=tissue_run.latents.dir)
    return StoreGallery(open_store(options, StudentConfig.read_folder(options.student)))


def test_each_patch_has_its_own_name_and_images(gallery, tissue_config):
    shards = {shard.name: shard for shard in ShardSet.open(tissue_config.shard_dirs).shards}
    patches = gallery.list_patches(0, 500, "", "").patches
    assert len({one["id"] for one in patches}) == gallery.total == len(patches) == sum(gallery.count_labels().values())
    for one in (patches[0], patches[25], patches[-1]):
        stored = gallery.find(one["id"])
        assert name_patch(stored) == one["id"] and (stored.key, stored.split) == (one["key"], one["split"])
        shard = shards[gallery.store.parts[stored.part].name.rpartition("-")[0]]
        sample = Reader([shard], ("he", "ihc"), 128).read(stored.row)
        assert sample.key == one["key"]
        for role in ("he", "ihc"):
            assert one[role] == f"patches/{one['id']}/{role}.jpg"
            assert gallery.draw(stored, role) == encode_jpeg(sample.images[role])


@pytest.mark.parametrize("name", ["", "0", "0-", "-0", "0-0-0", "0-99", "99-0", "a-b", "0 -0", "0-0 ", "\u0660-0"])
def test_a_name_that_means_no_patch(gallery, name):
    with pytest.raises(UnknownName, match="there is no such patch: GET /patches lists them"):
        gallery.find(name)


def test_pages_join_to_the_whole(gallery):
    whole = gallery.list_patches(0, 500, "", "")
    pages = [gallery.list_patches(at, 7, "", "").patches for at in range(0, 60, 7)]
    assert [one for page in pages for one in page] == whole.patches and pages[-1] == []
    parts = [gallery.list_patches(0, 500, split, label) for split in gallery.splits for label in gallery.count_labels()]
    assert sum(part.total for part in parts) == whole.total
    assert sorted(one["id"] for part in parts for one in part.patches) == sorted(one["id"] for one in whole.patches)


def test_a_jpeg_is_what_it_encodes():
    pixels = np.full((40, 60, 3), (200, 100, 180), np.uint8)
    with Image.open(io.BytesIO(encode_jpeg(pixels))) as image:
        assert image.size == (60, 40) and abs(np.asarray(image).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize(("count", "is_hub"), [(60, True), (8, False), (0, False)])
def test_a_hub_is_found_more_often_than_chance_would(count, is_hub):
    """Of 300 rows, each of 200 queries finds 5: one is found 3.3 times by chance."""
    count_m = np.full(300, 3)
    count_m[7] = count
    found = _describe_hubs([(0, row) for row in range(300)], count_m, 200)
    # A row is found so often by chance in less than one of a hundred indexes.
    assert is_hub == (300 * binom.sf(count - 1, 200, 5 / 300) < 0.01)
    said = "hub: among the nearest 5 of 30 % of 200 held-out H&E patches (by chance of 1.7 %)"
    assert found == ({(0, 7): said} if is_hub else {})


def test_few_rows_have_no_hub_though_each_is_found_often():
    assert _describe_hubs([(0, row) for row in range(6)], np.full(6, 167), 200) == {}
