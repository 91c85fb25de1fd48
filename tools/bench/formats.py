"""What a shard set costs by the format it is built in: bytes a pair, and the time to decode its H&E."""

import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lgd.shards.image import decode, encode
from lgd.shards.pairs import PatchPair
from tools.bench.measure import Settings

_TILE = 256


def _webp(pixels: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", **options)
    return stream.getvalue()


# lgd builds the first two; the others are read when they are given.
ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "jpeg:95": lambda pixels: encode(pixels, "jpg", 95),
    "png": lambda pixels: encode(pixels, "png"),
    "webp lossless": lambda pixels: _webp(pixels, lossless=True),
    "webp q90": lambda pixels: _webp(pixels, quality=90),
}


def formats(pairs: Sequence[PatchPair], settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Bytes a pair and H&E decodes a second of each format: whole patches to the input size, and tiles as they are."""
    contents = [(pair.he.read_bytes(), pair.images[1].read_bytes()) for pair in pairs]
    pixels = [(decode(he, ""), decode(ihc, "")) for he, ihc in contents]
    tiles = [
        (he[y : y + _TILE, x : x + _TILE], ihc[y : y + _TILE, x : x + _TILE])
        for he, ihc in pixels
        for y in range(0, he.shape[0] - _TILE + 1, _TILE)
        for x in range(0, he.shape[1] - _TILE + 1, _TILE)
    ]
    # Spread over the patch; all 16 of a patch would take lossless WebP half a minute.
    tiles = tiles[:: max(1, len(tiles) // 8)]
    seconds = settings.seconds / 5
    patches = [_row("as given", contents, settings.size, seconds)]
    patches += [_row(name, _encoded(pixels, encoder), settings.size, seconds) for name, encoder in ENCODERS.items()]
    cut = [_row(name, _encoded(tiles, encoder), None, seconds) for name, encoder in ENCODERS.items()] if tiles else []
    return {f"patches to {settings.size} px": patches, f"tiles of {_TILE} px": cut}


def _encoded(
    images: Sequence[tuple[np.ndarray, np.ndarray]], encoder: Callable[[np.ndarray], bytes]
) -> list[tuple[bytes, bytes]]:
    return [(encoder(he), encoder(ihc)) for he, ihc in images]


def _row(name: str, pairs: Sequence[tuple[bytes, bytes]], size: int | None, seconds: float) -> dict[str, Any]:
    decoded, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or decoded < len(pairs):
        decode(pairs[decoded % len(pairs)][0], name, size)
        decoded += 1
    sizes = [len(he) + len(ihc) for he, ihc in pairs]
    return {"format": name, "bytes_a_pair": round(sum(sizes) / len(sizes)), "he_a_second": round(decoded / spent, 1)}
