"""Every benchmark at a tiny setting: what it writes down, and that it notices other pixels. No timing is asserted."""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lgd.base.errors import ConfigError, DataError
from lgd.retrieval.index_files import IndexDocument
from lgd.shards.shard_set import ShardSet
from tools.bench import cached, decode, engine, loader, memory, peers, query, training
from tools.bench.command import main
from tools.bench.inputs import Inputs
from tools.bench.measure import Rate, Ratio, Settings, alternate, cpu_seconds, pinned, steady, taking_turns
from tools.bench.suite import BENCHMARKS, bench, rows, summary

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny(tissue) -> Settings:
    return Settings(
        images=str(tissue),
        size=32,
        side=128,
        batch=4,
        threads=1,
        seconds=0.02,
        rounds=3,
        pairs=16,
        patches=8,
        lessons=24,
        epochs=1,
        stream=0.5,
        plan_shards=200,
        opened=8,
        stored=1500,
        part_mb=1.0,
        cached=8,
        rows=500,
        train_batch=4,
        slide=600,
        serve_ms=1.0,
    )


EXPECTED = {
    "loader": {"loader": 0.95},
    "loader-small": {"loader-small": 6},
    "loader-peers": {"loader-peers: webdataset": 1.15, "loader-peers: litdata": 1.04, "loader-peers: pillow": 4.5},
    "decode": {"decode": 1.6, "decode: cosine": 0.999, "decode: predictions": 0.99},
    "store-plan": {"store-plan": 0.97},
    "store-random": {"store-random": 0.9},
    "store-first-row": {"store-first-row": 1.1},
    "store-write": {"store-write": 0.85},
    "targets": {"targets": 0.35},
    "cache": {"cache": 0.95, "cache: tiles": 0.95},
    "memory": {"memory": 50.0, "memory: rows opened": 50.0},
    "query": {"query": 1.05, "query: recall": 0.99},
    "engine": {"engine: torch": 0.98, "engine: deepspeed": 0.98},
    "cached-step": {"cached-step": 0.95},
    "cached-vs-recompute": {"cached-vs-recompute": 0.95, "cached-vs-recompute: targets": 0.95},
    "slide": {"slide": 0.9},
    "start": {"start": 1.2},
    "serve": {"serve: overhead": 20.0, "serve: throughput": 0.8},
    "scale": {"scale": 0.95},
    "efficiency": {"efficiency": 1.0},
}
MISSING = {"query": "no index is 20 times as fast", "engine": "install", "scale": "one GPU"}
AT_MOST = {"store-first-row", "targets", "memory", "memory: rows opened", "query", "start", "serve: overhead"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_document_is_complete_and_consistent(name, tiny, capfd):
    if name == "start":
        # A round starts two clusters.
        tiny = replace(tiny, rounds=1)
    # JSON has no NaN.
    document = json.loads(json.dumps(bench([name], tiny), allow_nan=False))
    # Results alone may go to standard output, whatever the peers' processes print.
    assert capfd.readouterr().out == ""
    assert {"cpu", "cores", "memory_gib"} <= document["machine"].keys()
    assert document["versions"].keys() >= {"python", "torch", "simplejpeg", "pillow", "webdataset", "litdata"}
    assert document["settings"]["threads"] == 1
    (benchmark,) = document["benchmarks"]
    assert benchmark["facts"]
    assert {ratio["name"]: ratio["mark"] for ratio in benchmark["ratios"]} == EXPECTED[name]
    for ratio in benchmark["ratios"]:
        if ratio["missing"]:
            assert ratio["value"] is None and MISSING.get(name, "pip install") in ratio["missing"]
            continue
        below = ratio["value"] <= ratio["mark"]
        assert ratio["reached"] == (below if ratio["name"] in AT_MOST else ratio["value"] >= ratio["mark"])
        for one in ratio.get("rounds", ()):
            assert one["ratio"] == pytest.approx(one["a"] / one["b"])
        if "rounds" in ratio:
            assert len(ratio["rounds"]) == tiny.rounds
            assert ratio["value"] == statistics.median(one["ratio"] for one in ratio["rounds"])
    table = rows(document)
    assert [row["name"] for row in table] == list(EXPECTED[name])
    assert all(row["reached"] in ("yes", "MISSED", "not measured") for row in table)
    assert all(row["name"] in summary(document) for row in table if row["reached"] != "yes")


def test_the_facts_of_decode_tell_formats_and_cosines(tiny, tmp_path):
    settings = replace(tiny, images="", pairs=2, patches=3)
    with pinned():
        outcome = decode.run(settings, Inputs(settings, tmp_path))
    facts = outcome.facts
    assert facts["latents"]["patches"] == 3
    for found in facts["latents"]["against"].values():
        for cosine in found["cosine"].values():
            assert -1 <= cosine["least"] <= cosine["percentile_1"] <= cosine["median"] <= 1 + 1e-6
    (patches,) = (rows for name, rows in facts["formats"].items() if name.startswith("patches"))
    assert [row["format"] for row in patches] == ["as given", "jpeg:95", "png", "webp lossless", "webp q90"]
    size = {row["format"]: row["bytes_a_pair"] for row in patches}
    assert size["png"] > size["jpeg:95"] > size["webp q90"]
    # The teacher learnt at the magnification at which it is asked.
    assert "shrunk to 64" in facts["teacher"]["trained_on"]


def test_the_loaders_of_all_sides_are_held_to_the_same_pixels(tiny, tmp_path):
    inputs = Inputs(tiny, tmp_path)
    product, contents = loader.Product(inputs.shards, tiny), inputs.sample_contents()
    assert loader.check_outputs(product, contents) == tiny.pairs
    small = loader.Product(inputs.small_shards, tiny)
    assert loader.check_outputs(small, inputs.sample_contents("hes")) == tiny.pairs
    with pytest.raises(AssertionError, match="other pixels"):
        loader.check_outputs(small, contents)
    with pytest.raises(AssertionError, match="other pixels"):
        loader.check_outputs(product, contents[::-1])
    peer = peers.WebDataset(tiny, inputs)
    assert peers.check_outputs(peer) == 4 * tiny.batch

    class Wrong(peers.WebDataset):
        def batches(self, count):
            return (image ^ 1 for image in super().batches(count))

    with pytest.raises(AssertionError, match="Wrong has other pixels"):
        peers.check_outputs(Wrong(tiny, inputs))


def test_each_resize_gives_the_patch_in_small():
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((256, 256)))
    content = simplejpeg.encode_jpeg(np.ascontiguousarray(smooth), quality=95)
    wanted = smooth.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    for name, resize in (decode.RESIZES | decode.MEANS).items():
        small = resize(content, 64)
        assert small.dtype == np.uint8 and small.shape == (64, 64, 3), name
        assert np.abs(small - wanted).mean() < 2, name
    scaled = loader.pixels(content, 64)
    assert np.abs(scaled - wanted).mean() < 2


def test_decode_refuses_what_is_no_jpeg(tiny, tmp_path):
    for role in ("HE", "IHC"):
        (tmp_path / "png" / role / "train").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "png" / role / "train" / "00000_train_1+.png")
    settings = replace(tiny, images=str(tmp_path / "png"))
    with pytest.raises(DataError, match="--images a folder of JPEG"):
        decode.run(settings, Inputs(settings, tmp_path))


def test_sides_are_measured_in_turn():
    calls = []

    def side(name: str, samples: int):
        def run() -> Rate:
            calls.append(name)
            return Rate(samples, 2.0, 1.0)

        return run

    ratio = alternate("x", "a / b", 0.5, side("a", 30), side("b", 40), 3)
    assert calls == ["a", "b"] * 3
    assert ratio.value == 0.75 and ratio.reached
    assert ratio.detail["median_a"] == 15 and ratio.detail["rounds"][0]["cpu_ms_a_sample"] == [
        pytest.approx(100 / 3),
        25,
    ]
    assert not replace(ratio, mark=0.8).reached
    assert not replace(ratio, at_most=True).reached
    assert Ratio(name="x", compared="", value=None, mark=1, missing="why").reached is None


def test_sides_that_take_turns_are_timed_apart():
    calls = []

    def side(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    one, other = taking_turns(side("a", 0.01), side("b", 0.03), samples=5, turns=4)
    assert calls == ["a", "b"] * 4
    assert one.samples == other.samples == 20
    assert one.seconds >= 0.04 and other.seconds >= 0.12 and one.cpu < one.seconds


def test_the_steady_rate_leaves_out_both_ends_and_takes_every_batch():
    left = iter(range(20))
    rate = steady(left, 8, head=5, count=10)
    assert rate.samples == 80 and rate.seconds > 0
    assert next(left, None) is None
    with pytest.raises(AssertionError, match="do not reach beyond"):
        steady(iter(range(15)), 8, head=5, count=10)


def test_cpu_time_counts_living_children():
    before = cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        used = cpu_seconds() - before
        child.communicate(b"\n")
    assert used >= 0.25


def test_the_drawn_latents_are_clustered_and_their_store_is_whole(tmp_path):
    store, _ = query.make_store(tmp_path, 450)
    assert store.verify() == [] and {part.split: part.rows for part in store.parts} == {"train": 450, "val": 1000}
    pooled = store.parts[0].array("pooled")[:, 0].astype(np.float64)
    assert [len(np.unique(store.parts[number].array("slide"))) for number in (0, 1)] == [3, 5]
    away = np.linalg.norm(pooled[:200] - pooled[:200].mean(0), axis=1).mean()
    assert away < np.linalg.norm(pooled[:200].mean(0) - pooled[200:400].mean(0)), "slides lie apart"
    spread = pooled[:200].std(0)
    assert spread[:8].mean() > 5 * spread[-64:].mean(), "the spectrum decays"


def test_the_recall_is_the_best_at_the_speed():
    found = [{"times_exact": speed, "recall_at_10": recall} for speed, recall in ((90, 0.5), (21, 0.8), (19, 0.999))]
    ratio = query.at_speed(found, 10.0, 1000)
    assert (ratio.value, ratio.reached) == (0.8, False)
    assert query.at_speed(found[2:], 10.0, 1000).reached is None


def test_the_extrapolation_follows_its_rules():
    document = {"rows": 10**6, "factory": "IVF4000,SQfp16", "seconds": {"train": 100.0, "add": 50.0}}
    rows = query.extrapolation(IndexDocument.model_construct(**document), 60)["rows"]
    assert [row["rows"] for row in rows] == [10**power for power in range(3, 10)]
    assert rows[3]["factory"] == "Flat", "whitened to 32 numbers, a million are searched exactly"
    more, cells = rows[4], 12649
    assert more["factory"] == f"IVF{cells},SQfp16"
    assert more["build_hours"] == pytest.approx((100 * (cells / 4000) ** 2 + 50 * 10 * cells / 4000) / 3600)
    assert more["index_bytes"] == 10**7 * (64 + 8) + cells * 32 * 4
    assert rows[0]["index_bytes"] == 1000 * 128 and rows[0]["build_hours"] == 0


def test_a_bare_loop_is_held_to_our_loss_curve(tissue_run, change, tmp_path):
    config = change(tissue_run, student={"dir": str(tmp_path)}, data={"augment": "none"})
    with engine.join_world() as world:
        kept, streamed = compare_loops(
            config, change, training.StudentTask(config, ShardSet.open(config.shard_dirs)), world
        )
    assert streamed == kept


def compare_loops(config, change, task, world):
    """The keys of the steps that are kept, and of those that are streamed again."""
    streamed = training.Streamed(config, task, world)
    kept, model = streamed.kept(), task.build()
    assert engine.Pair("torch", config, task, world, model, kept).check() < 1e-5
    pair = engine.Pair("torch", config, task, world, model, kept)
    pair.bare.config = change(config, student={"membrane_weight": 0.11})
    with pytest.raises(AssertionError, match="the loss curves differ"):
        pair.check()
    # What is streamed is what was kept, and what the teacher gives is what the store has.
    again = list(streamed.steps(len(kept)))
    for one, other in zip(kept, cached.TaughtWithTargets(config, task, world).steps(len(kept)), strict=True):
        assert one.position == other.position
        for mine, taught in zip(one.micro, other.micro, strict=True):
            assert mine.keys == taught.keys
            for name, stored in mine.stored.items():
                np.testing.assert_allclose(stored, taught.stored[name], rtol=2e-3, atol=2e-3, err_msg=name)
    return [[step.micro[0].keys for step in steps] for steps in (kept, again)]


def test_the_rate_of_steps_leaves_out_the_head_and_takes_the_tail():
    left = iter(range(20))
    rate = training.rate_of(left, 8, count=10)
    assert rate.samples == 80 and rate.seconds > 0
    assert next(left, None) is None
    with pytest.raises(AssertionError, match="do not reach"):
        training.rate_of(range(9), 8, count=10)


def test_private_memory_and_its_slope():
    before = memory.private_bytes()
    # So large that it is never taken from what was freed before.
    kept = np.ones(80_000_000, np.uint8)
    assert 79e6 < memory.private_bytes() - before < 90e6
    del kept
    # 60 bytes a sample on top of a sawtooth: 60 MB a million.
    samples = np.arange(0, 1_000_000, 5000)
    sawtooth = 2e5 * (np.arange(len(samples)) % 3)
    value, error = memory.slope(np.stack([samples, 3e8 + 60 * samples + sawtooth], axis=1).astype(float))
    assert value == pytest.approx(60, abs=1) and error < 1


def test_the_plans_memory_does_not_grow_with_the_samples():
    few, many = (memory.run_alone(memory.plan_at_scale, 200, samples)["rank 0 of 1"] for samples in (1000, 4000))
    # Of 64 lanes one shard each is known by its rows, and those are 4 bytes a row.
    assert many["bytes"] - few["bytes"] < 2 * 64 * 3000 * 8


BESIDE_THREADS = """
import os, sys, threading, zlib
from tools.bench import memory

def compress():
    while True:
        zlib.decompress(zlib.compress(noise, 1))

noise = os.urandom(20_000)
for _ in range(3):
    threading.Thread(target=compress, daemon=True).start()
memory._begun = lambda *_: {}
sys.setswitchinterval(1e-5)
for _ in range(100_000):
    try:
        memory.plan_at_scale(1, 1)
    except AssertionError:
        sys.exit(3)
"""


def test_memory_is_not_traced_beside_threads():
    """Tracing while others allocate without the GIL ended this process with a segmentation fault within seconds."""
    done = subprocess.run([sys.executable, "-c", BESIDE_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stderr[-2000:]


def test_the_command_prints_a_table(tissue, capsys):
    options = ["--images", str(tissue), "--size", "32", "--seconds", "0.05", "--rounds", "2", "--threads", "1"]
    assert main(["loader", *options]) == 0
    out, err = capsys.readouterr()
    head, row, end = out.splitlines()
    assert head.split()[:3] == ["name", "ratio", "spread"]
    assert row.startswith("loader ") and "at least 0.95" in row
    assert "of 1 marks reached" in end
    assert "[bench] loader, round 2 of 2" in err
    assert main(["loader", "--json", *options]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["benchmarks"][0]["name"] == "loader"


def test_several_give_one_document_after_a_forecast(tiny, monkeypatch, caplog):
    for name, minutes in (("store-random", 2), ("store-plan", 0.5)):
        monkeypatch.setitem(BENCHMARKS, name, BENCHMARKS[name]._replace(minutes=minutes))
    with caplog.at_level(logging.INFO, "lgd"):
        document = bench(["store-random", "store-plan", "store-random"], tiny)
    assert [one["name"] for one in document["benchmarks"]] == ["store-random", "store-plan"]
    assert all(one["seconds"] > 0 for one in document["benchmarks"])
    assert [row["name"] for row in rows(document)] == ["store-random", "store-plan"]
    first, *_, last = told = caplog.messages
    assert first.startswith("[bench] about 2.5 min (store-random 2, store-plan 0.5), ")
    assert any(line.endswith(" min; left: 0.5 min (store-plan 0.5)") for line in told)
    assert last.startswith("[bench] store-plan took ") and last.endswith("left: nothing")


def test_it_runs_from_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "tools" / "bench"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in BENCHMARKS)
    done = subprocess.run([*command[:2], "nonsense"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench: there is no benchmark nonsense; there are loader, ")


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (
            ["loader", "nonsense"],
            2,
            "there are loader, loader-small, loader-peers, decode, store-plan, store-random, store-first-row",
        ),
        (["loader", "--shards", "2"], 2, "bench: python tools/bench has no option --shards"),
        (["loader", "--rounds", "0"], 2, "--rounds 0: use at least 1"),
        (["loader", "--seconds", "0"], 2, "--seconds"),
        (["loader", "--images", "nowhere-at-all"], 1, "nowhere-at-all does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_message(args, status, told, capsys):
    assert main(args) == status
    out, err = capsys.readouterr()
    assert out == "" and told in err and "Traceback" not in err


def test_an_unknown_name_starts_nothing(tiny):
    with pytest.raises(ConfigError, match="no benchmark x, y; there are loader, "):
        bench(["loader", "x", "y"], tiny)


def test_nothing_is_left_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench(["loader"], tiny)
    assert not list(Path(tmp_path).glob("lgd-bench-*"))
