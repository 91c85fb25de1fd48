"""`loader-peers`: the same stream against what others would use on the same images.

A is `tools.bench.loader`'s. B is one of three, with as many worker processes as A has threads, warm: webdataset under a
DataLoader and LitData, both given our decoder, and the customary recipe of Pillow over plain files. Each gives uint8
batches (B, 3, H, W) and levels, as A does. LitData is optional: it requires torchvision, which it does not use here.
"""

import abc
import hashlib
import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tools.bench.inputs import HER2, Inputs
from tools.bench.loader import Product, count_for, pixels
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate, steady

logger = logging.getLogger(f"lgd.{__name__}")

PREFETCH = 4
"""Batches that each worker process reads ahead."""
SHUFFLE = 100
"""Encoded samples in webdataset's shuffle buffer."""
INSTALL = "litdata is not installed: pip install 'lgd[bench]' && pip install --no-deps litdata"


class Peer(abc.ABC):
    """A loader of others."""

    exact = True
    """Whether its pixels are those of our decoder."""

    def __init__(self, settings: Settings, inputs: Inputs) -> None:
        self.settings, self.inputs = settings, inputs

    @abc.abstractmethod
    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """`count` batches, uint8 (B, 3, H, W)."""

    def rate(self, count: int) -> Rate:
        """The steady rate over `count` batches, without the start of the workers and the filling of their queues."""
        queued = (PREFETCH + 1) * self.settings.workers
        return steady(self.batches(queued + count + queued), self.settings.batch, queued, count)

    def loaded(self, kind: Any, dataset: Any, **more: Any) -> Any:
        """A DataLoader of this peer."""
        workers = self.settings.workers
        return kind(
            dataset,
            batch_size=self.settings.batch,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            # Quicker to start, and no thread of ours runs between the rounds that a fork could interrupt.
            multiprocessing_context="fork",
            **more,
        )

    def epochs(self, count: int) -> int:
        """Times that the samples are gone through for `count` batches, with a margin for workers that are ahead."""
        return -(-count * self.settings.batch // self.settings.pairs) + 2


class WebDataset(Peer):
    """webdataset's documented pipeline: shards, then encoded samples, are shuffled, decoded and collated."""

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        import webdataset

        shards, size = self.inputs.shards, self.settings.size
        he = f"he.{shards[0].extensions['he']}"

        def sample(found: dict[str, Any]) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(pixels(found[he], size)), json.loads(found["json"])["label"]

        dataset = webdataset.WebDataset(
            # Each worker takes its own share of the shards.
            [str(shard.path) for shard in shards] * self.epochs(count),
            resampled=False,
            shardshuffle=100,
            select_files=lambda name: ".ihc." not in name,
            seed=0,
        )
        loader = self.loaded(DataLoader, dataset.shuffle(SHUFFLE).map(sample))
        for image_BHW3, _ in itertools.islice(loader, count):
            yield image_BHW3.permute(0, 3, 1, 2)


class LitData(Peer):
    """LitData: the encoded bytes in its own chunks, uncompressed; our decoder as its transform."""

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        import litdata

        size = self.settings.size

        def sample(found: tuple[bytes, int]) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(pixels(found[0], size)), found[1]

        folder = self._chunks(self.epochs(count))
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=sample)
        for image_BHW3, _ in itertools.islice(self.loaded(litdata.StreamingDataLoader, dataset), count):
            yield image_BHW3.permute(0, 3, 1, 2)

    def _chunks(self, times: int) -> Path:
        """The samples `times` over, since its workers rest between epochs: the same chunks under further names."""
        import litdata

        base = self.inputs.folder / "litdata"
        if not base.is_dir():
            litdata.optimize(
                fn=_record,
                inputs=_files(self.inputs),
                output_dir=str(base),
                # Its documentation advises 64 MB; but every worker must have as many chunks as the others.
                chunk_size=-(-self.settings.pairs // max(4, self.settings.workers)),
                num_workers=1,
                # It sets the method for all that this process starts later.
                start_method="fork",
                verbose=False,
            )
        folder = self.inputs.folder / f"litdata-{times}"
        if not folder.is_dir():
            folder.mkdir()
            index = json.loads((base / "index.json").read_text())
            chunks, index["chunks"] = index["chunks"], []
            for time, chunk in itertools.product(range(times), chunks):
                name = f"{time}-{chunk['filename']}"
                os.link(base / chunk["filename"], folder / name)
                index["chunks"].append({**chunk, "filename": name})
            (folder / "index.json").write_text(json.dumps(index))
        return folder


def _files(inputs: Inputs) -> list[Path]:
    return sorted((inputs.files / "HE" / "train").iterdir())


def _level(path: Path) -> int:
    return HER2.classes.index(path.stem.rpartition("_")[2])


def _record(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), _level(path)


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """Plain files, decoded fully by Pillow and resized."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path = self.files[number]
        with Image.open(path) as image:
            small = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)), _level(path)


class Customary(Peer):
    """The customary recipe: a map-style data set over plain files, Pillow's full decode and antialiased resize."""

    exact = False

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        dataset = _Files(_files(self.inputs) * self.epochs(count), self.settings.size)
        for image_BHW3, _ in itertools.islice(self.loaded(DataLoader, dataset, shuffle=True), count):
            yield image_BHW3.permute(0, 3, 1, 2)


PEERS: tuple[tuple[str, str, float, type[Peer]], ...] = (
    ("webdataset", "shards to batches / webdataset + DataLoader, our decoder", 1.15, WebDataset),
    ("litdata", "shards to batches / LitData, our decoder", 1.04, LitData),
    ("pillow", "shards to batches / plain files, Pillow's full decode + resize, DataLoader", 4.5, Customary),
)


def check_outputs(peer: Peer) -> int:
    """Compare the images of some batches of a peer with the bare decode of the same files; returns how many."""
    size = peer.settings.size
    wanted = {hashlib.sha256(pixels(content, size).tobytes()).digest() for content in peer.inputs.contents}
    seen = 0
    for image_B3HW in peer.batches(4):
        assert image_B3HW.dtype == torch.uint8 and image_B3HW.shape[1:] == (3, size, size), image_B3HW.shape
        seen += len(image_B3HW)
        if peer.exact:
            images_BHW3 = image_B3HW.permute(0, 2, 3, 1).contiguous().numpy()
            got = {hashlib.sha256(image.tobytes()).digest() for image in images_BHW3}
            assert got <= wanted, f"{type(peer).__name__} has other pixels than the bare decode of any file"
    return seen


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Samples a second end to end by those of webdataset, of LitData, and of Pillow over plain files."""
    product = Product(inputs.shards, settings)
    ours = product.warm()
    ratios: list[Ratio] = []
    compared: dict[str, int] = {}
    for package, text, mark, kind in PEERS:
        name = f"loader-peers: {package}"
        if package == "litdata" and importlib.util.find_spec("litdata") is None:
            logger.info(f"[bench] {name}: {INSTALL}")
            ratios.append(Ratio(name=name, compared=text, value=None, mark=mark, missing=INSTALL))
            continue
        peer = kind(settings, inputs)
        compared[package] = check_outputs(peer)
        theirs = count_for(peer.rate(8), settings)
        ratios.append(_ratio(name, text, mark, product, ours, peer, theirs))
    product.reader.close()
    facts = {
        "input": inputs.described(),
        "shards": len(inputs.shards),
        "prefetch_factor": PREFETCH,
        "images_compared": compared,
        "outputs": "webdataset and LitData give the pixels of the bare decode; Pillow's resize is another",
    }
    return Outcome(ratios=ratios, facts=facts)


def _ratio(
    name: str,
    text: str,
    mark: float,
    product: Product,
    ours: int,
    peer: Peer,
    theirs: int,
) -> Ratio:
    rounds = product.settings.rounds
    return alternate(name, text, mark, lambda: product.rate(ours), lambda: peer.rate(theirs), rounds)
