"""`loader`: what training's stream reaches of a bare decode loop; `loader-small`: what small H&E images spare it.

A is `Batches` over real shards, end to end: plan, read, crc32, decode, collate. B decodes the same bytes from
memory with the same number of threads, and does nothing else. For `loader-small` A reads shards with `--he-size`, and B
is the same stream over shards of the native images alone.

Where a run falls short, the CPU milliseconds a sample of both sides tell why: more than B's is work, which
`perf record -g` and the list of functions in `profile` find; as many as B's at a lower rate is waiting.
"""

import cProfile
import itertools
import pstats
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lgd.config import Config
from lgd.config_sections import Data, Train
from lgd.shards.archive import Shard
from lgd.shards.image import decode
from lgd.stream.plan import Plan, World
from lgd.stream.reader import Reader
from lgd.train.batch import Batch, Batches
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Settings, alternate, steady, timed

HEAD = 8
"""Batches before the timed ones: more than the stream reads ahead."""
TAIL = 6
"""Batches behind them."""


class Product:
    """The stream as training uses it, H&E only, from position 0."""

    def __init__(self, shards: Sequence[Shard], settings: Settings) -> None:
        self.settings = settings
        self.reader = Reader(shards, ("he",), settings.size)
        self.plan = Plan(self.reader.sizes, seed=0, lanes=Data().lanes)

    def batches(self, steps: int) -> Iterator[Batch]:
        """The first batches of training."""
        data = Data(threads=self.settings.workers, augment="none")
        config = Config(data=data, train=Train(batch=self.settings.batch))
        for step in Batches(config, self.reader, self.plan, World()).draw(0, steps):
            yield step.micro[0]

    def rate(self, count: int) -> Rate:
        """The steady rate over `count` batches."""
        return steady(self.batches(HEAD + count + TAIL), self.settings.batch, HEAD, count)

    def warm(self) -> int:
        """Warm up, and find how many batches a round takes."""
        return count_for(self.rate(16), self.settings)


def count_for(rate: Rate, settings: Settings) -> int:
    """Batches that fill the seconds of a round at a rate."""
    return max(2, round(rate.a_second * settings.seconds / settings.batch))


def bare(contents: Sequence[bytes], size: int, threads: int, samples: int) -> Rate:
    """Decode `samples` images, taking the contents in turn, in `threads` threads, each into one array of its own."""
    # Cheaper than any pool: a thread that is done takes the next number, and nothing is handed over.
    counter = itertools.count()

    def work() -> None:
        out = np.empty((size, size, 3), np.uint8)
        while (number := next(counter)) < samples:
            decode(contents[number % len(contents)], "", size, out)

    def run() -> int:
        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return samples

    return timed(run)


def pixels(content: bytes, size: int) -> np.ndarray:
    """An image as our stream decodes it, into the array where it belongs: without one, `decode` may copy it twice."""
    return decode(content, "", size, np.empty((size, size, 3), np.uint8))


def check_outputs(product: Product, contents: Sequence[bytes]) -> int:
    """Compare every image of one epoch with the bare decode of the same sample; returns how many these are."""
    wanted: dict[bytes, torch.Tensor] = {}
    seen: set[int] = set()
    for batch in product.batches(-(-product.plan.total // product.settings.batch)):
        for number, image in zip(batch.number_B.tolist(), batch.images["he"], strict=True):
            content = contents[number]
            if content not in wanted:
                wanted[content] = torch.from_numpy(pixels(content, product.settings.size)).permute(2, 0, 1)
            assert torch.equal(image, wanted[content]), f"sample {number} has other pixels than the bare decode"
            seen.add(number)
    assert len(seen) == product.plan.total, "an epoch left samples out"
    return len(seen)


def profile(product: Product, most: int = 12) -> list[dict[str, Any]]:
    """The functions of one thread that reads an epoch, by their own time: microseconds a sample.

    A profiler makes small Python functions look several times as slow as they are.
    """
    out = np.empty((product.settings.size, product.settings.size, 3), np.uint8)
    profiler = cProfile.Profile()
    with profiler:
        for number in range(product.plan.total):
            product.reader.read(number, {"he": out})
    # (file, line, function) -> (calls, calls, own seconds, seconds, callers)
    functions = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    longest = sorted(functions, key=lambda found: -found[1][2])[:most]
    return [
        {"function": f"{Path(file).name}:{name}", "us_a_sample": round(1e6 * times[2] / product.plan.total, 1)}
        for (file, _, name), times in longest
    ]


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Samples a second end to end by those of a bare decode loop."""
    product, contents = Product(inputs.shards, settings), inputs.sample_contents()
    compared = check_outputs(product, contents)
    count = product.warm()

    def bare_side() -> Rate:
        return bare(contents, settings.size, settings.workers, count * settings.batch)

    bare_side()
    ratio = alternate(
        "loader",
        "shards to batches / bare decode loop",
        0.95,
        lambda: product.rate(count),
        bare_side,
        settings.rounds,
    )
    facts = {
        "input": inputs.described(),
        "shards": len(inputs.shards),
        "samples": product.plan.total,
        "samples_a_round": count * settings.batch,
        "images_compared": compared,
        "profile": profile(product),
    }
    product.reader.close()
    return Outcome(ratios=[ratio], facts=facts)


def run_small(settings: Settings, inputs: Inputs) -> Outcome:
    """Samples a second from shards that have the H&E at the model's size too by those from native images alone."""
    small, native = Product(inputs.small_shards, settings), Product(inputs.shards, settings)
    contents = {"hes": inputs.sample_contents("hes"), "he": inputs.sample_contents()}
    compared = [check_outputs(product, contents[role]) for product, role in ((small, "hes"), (native, "he"))]
    counts = [product.warm() for product in (small, native)]
    ratio = alternate(
        "loader-small",
        f"shards with --he-size {settings.size} to batches / shards of the native images to batches",
        6,
        lambda: small.rate(counts[0]),
        lambda: native.rate(counts[1]),
        settings.rounds,
    )
    facts = {
        "input": inputs.described(),
        "bytes_of_an_image": {role: sum(map(len, some)) / len(some) for role, some in contents.items()},
        "images_compared": compared,
        "profile": profile(small),
    }
    for product in (small, native):
        product.reader.close()
    return Outcome(ratios=[ratio], facts=facts)
