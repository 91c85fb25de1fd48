"""`serve`: what `lgd serve` adds to the network behind it, one client at a time and for sixteen at once.

`serve: overhead`: the median time of POST /predict by one client, less that of decoding an image and running the same
network in this process, with as many threads; both take turns by the call. `serve: throughput`: A is images a second
of sixteen clients, B a bare loop that decodes sixteen images and runs the network on them in one batch. The clients are
one thread with keep-alive connections, on the cores that the service has.

The student is untrained; its input is enlarged until a batch takes `serve_ms`. Images are sent as they lie on disk.
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lgd.base.environment import count_cpus
from lgd.base.errors import DataError
from lgd.models.export import save_model
from lgd.scoring.images import MemoryImage, read_fitted
from lgd.scoring.predict import Scorer, load_scorer
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate, cpu_seconds, timed
from tools.bench.slide import build_student

logger = logging.getLogger(f"lgd.{__name__}")

OVERHEAD_MS, THROUGHPUT = 20.0, 0.8
CLIENTS = 16
_ROOT = Path(__file__).resolve().parents[2]
_LARGEST = 2048
"""Side of an input, in pixels."""


class Bare:
    """The network in this process."""

    def __init__(self, scorer: Scorer, contents: Sequence[bytes]) -> None:
        self.scorer = scorer
        self._contents = itertools.cycle(contents)

    def score(self, images: int) -> np.ndarray:
        """Decode the next images and score them in one batch; probabilities, (images, K)."""
        config = self.scorer.config
        some = [MemoryImage("image", content) for content in itertools.islice(self._contents, images)]
        fitted = [read_fitted(image, config.training, config.size, "unknown") for image in some]
        return self.scorer.score(np.stack([one.pixels for one in fitted]))["output"]

    def time_calls(self, images: int, seconds: float) -> list[float]:
        """Seconds of each call, for so long."""
        taken, ends = list[float](), time.perf_counter() + seconds
        while not taken or time.perf_counter() < ends:
            began = time.perf_counter()
            self.score(images)
            taken.append(time.perf_counter() - began)
        return taken


def make_student(settings: Settings, folder: Path, contents: Sequence[bytes]) -> Bare:
    """A student's folder, and the student, so large that a batch of it takes `serve_ms`."""
    size = settings.size
    while True:
        torch.manual_seed(0)
        model, describe = build_student(settings.model, size)
        save_model(folder, dict(model.state_dict()), describe)
        bare = Bare(load_scorer(str(folder)), contents)
        bare.score(CLIENTS)
        # The quickest: others may have the cores.
        if 1e3 * min(bare.time_calls(CLIENTS, 2.0)) >= settings.serve_ms or size >= _LARGEST:
            return bare
        size *= 2


@contextlib.contextmanager
def start_service(student: Path, threads: int) -> Iterator[str]:
    """`lgd serve` as a command; its address."""
    # A cluster that runs already has its processes.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "lgd", "serve", "--model", str(student), "--port", "0", "--cpus", str(threads)]
    with tempfile.TemporaryFile("w+") as errors:
        service = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert service.stdout is not None
        try:
            line = service.stdout.readline()
            if not line:
                errors.seek(0)
                raise DataError("lgd serve did not start", *errors.read().splitlines()[-5:])
            yield next(word for word in line.split() if word.startswith("http"))
        finally:
            service.terminate()
            service.communicate()


async def _ask(url: str, contents: Sequence[bytes], clients: int, seconds: float) -> list[tuple[float, float]]:
    """When each answer was there, and how long it took; clients go on for so long, and make two requests at least."""
    import aiohttp

    answers, following = list[tuple[float, float]](), itertools.cycle(contents)
    ends = time.perf_counter() + seconds

    async def ask_on(session: aiohttp.ClientSession) -> None:
        for number in itertools.count():
            if number > 1 and time.perf_counter() > ends:
                return
            began = time.perf_counter()
            async with session.post(f"{url}predict?mpp=unknown", data=next(following)) as response:
                await response.read()
                response.raise_for_status()
            answers.append((time.perf_counter(), time.perf_counter() - began))

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, headers={"Content-Type": "image/jpeg"}) as session:
        await asyncio.gather(*[ask_on(session) for _ in range(clients)])
    return answers


def count_answers(url: str, contents: Sequence[bytes], seconds: float) -> Rate:
    """Answers a second of all clients, from the first answer on, while all ask."""
    cpu = cpu_seconds()
    answers = asyncio.run(_ask(url, contents, CLIENTS, seconds))
    cpu = cpu_seconds() - cpu
    # Each client's last request is answered when others ask no more.
    times = [at for at, _ in answers][: -CLIENTS + 1]
    return Rate(len(times) - 1, times[-1] - times[0], cpu)


class OneClient:
    """A client with one connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"))

    def predict(self, content: bytes) -> list[float]:
        """The probabilities of an image."""
        self._connection.request("POST", "/predict?mpp=unknown", content, {"Content-Type": "image/jpeg"})
        answer = json.load(self._connection.getresponse())
        return [*answer["probabilities"].values()]


def compare_answers(bare: Bare, client: OneClient, content: bytes) -> float:
    """The largest difference of a probability between the service's answer and the network's."""
    differ = float(np.abs(Bare(bare.scorer, [content]).score(1)[0] - client.predict(content)).max())
    assert differ < 1e-4, f"the service gives other probabilities, by {differ}"
    return differ


def measure_overhead(bare: Bare, client: OneClient, contents: Sequence[bytes], settings: Settings) -> Ratio:
    """How many milliseconds longer a request takes than a call in this process, each by the median of a round."""
    rounds, following = [], itertools.cycle(contents)
    for number in range(settings.rounds):
        taken = list[tuple[float, float]]()
        ends = time.perf_counter() + 2 * settings.seconds
        while not taken or time.perf_counter() < ends:
            began = time.perf_counter()
            client.predict(next(following))
            answered = time.perf_counter()
            bare.score(1)
            taken.append((answered - began, time.perf_counter() - answered))
        asked, called = (1e3 * statistics.median(side) for side in zip(*taken, strict=True))
        shown = f"{asked:.1f} - {called:.1f} ms = {asked - called:.1f}"
        logger.info(f"[bench] serve: overhead, round {number + 1} of {settings.rounds}: {shown}")
        rounds.append((asked, called))
    added = [asked - called for asked, called in rounds]
    return Ratio(
        name="serve: overhead",
        compared="POST /predict of one client, p50 - decode and forward pass of one image in process, p50",
        value=statistics.median(added),
        mark=OVERHEAD_MS,
        at_most=True,
        unit="ms",
        detail={"rounds_ms": rounds, "spread": [min(added), max(added)]},
    )


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """The overhead in milliseconds, and the ratio of rates."""
    threads, student, contents = min(settings.workers, count_cpus()), inputs.folder / "student", inputs.contents
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bare = make_student(settings, student, contents)
        began = time.perf_counter()
        with start_service(student, threads) as url:
            start_s = time.perf_counter() - began
            client = OneClient(url)
            differ = compare_answers(bare, client, contents[0])
            # Warm, with batches of all sizes.
            count_answers(url, contents, 0)
            overhead = measure_overhead(bare, client, contents, settings)
            throughput = alternate(
                "serve: throughput",
                f"images of {CLIENTS} clients / decode and forward pass in batches of {CLIENTS}, as many threads",
                THROUGHPUT,
                lambda: count_answers(url, contents, 2 * settings.seconds),
                lambda: timed(lambda: CLIENTS * len(bare.time_calls(CLIENTS, 2 * settings.seconds))),
                settings.rounds,
            )
    finally:
        torch.set_num_threads(before)
    facts = {
        "input": inputs.described(),
        "encoder": settings.model,
        "pixels": bare.scorer.config.size,
        "ms_a_batch": 1e3 * CLIENTS / throughput.detail["median_b"],
        "threads": threads,
        "start_s": start_s,
        "largest_difference": differ,
    }
    return Outcome(ratios=[overhead, throughput], facts=facts)
