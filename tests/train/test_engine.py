import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgd.base.errors import ConfigError, DataError
from lgd.config_sections import Train
from lgd.stream.plan import World
from lgd.train import prepare
from lgd.train.deepspeed_engine import build_extension, deepspeed_environment, deepspeed_problem
from lgd.train.prepare import choose_engine, make_engine
from tests.support.forks import run_ranks

TRAIN = Train(batch=8, accumulate=2, lr=1e-2, clip=0.9)
HALF, STEPS = 3, 6
GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.rand(STEPS, TRAIN.batch, 3, 16, 16, generator=GENERATOR)
LEVELS = torch.randint(0, 4, (STEPS, TRAIN.batch), generator=GENERATOR)

needs_deepspeed = pytest.mark.skipif(deepspeed_problem() is not None, reason=str(deepspeed_problem()))


def stages_for(size):
    """Partitions need two ranks."""
    return (0, 1, 2, 3) if size > 1 else (0,)


class Net(nn.Module):
    """Both parameter groups, sizes that two ranks do not divide, frozen BatchNorm, and a parameter without use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, stride=2)
        self.norm = nn.GroupNorm(3, 9)
        self.frozen = nn.BatchNorm2d(9).eval()
        self.frozen.running_mean.uniform_(-1, 1)
        self.head = nn.Linear(9, 4)
        self.unused = nn.Parameter(torch.zeros(5))

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return {"logits": self.head(self.frozen(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))}


def fresh(name, train=TRAIN, world=None, extra=None):
    torch.manual_seed(0)
    return make_engine(name, Net().train(), train, extra or {}, world or World())


def run(engine, steps, train=TRAIN, world=None):
    """Loss and gradient norm of each step; all see the same global batches."""
    world, told = world or World(), []
    micro = train.batch // train.accumulate
    for step in steps:
        total = torch.zeros(())
        for part in range(train.accumulate):
            rows = slice(part * micro + world.rank, (part + 1) * micro, world.size)
            logits = engine.forward(IMAGES[step, rows])["logits"].float()
            loss = nn.functional.cross_entropy(logits, LEVELS[step, rows], reduction="sum") / train.batch
            engine.backward(loss, last=part == train.accumulate - 1)
            total += loss.detach()
        if world.size > 1:
            dist.all_reduce(total)
        told.append((float(total), float(engine.step(train.lr * (step + 1) / STEPS))))
    return told


def numbers(state):
    """A state as plain lists by name."""
    weights, moments = state
    # DeepSpeed holds moments of the unused parameter, which are zeros; PyTorch has none.
    used = {name: tensor for name, tensor in moments.items() if not name.startswith("unused|")}
    return {name: tensor.flatten().tolist() for name, tensor in (weights | used).items()}


def journey(name, world, train, extra, other):
    """Train, take the state, train on; and go on from that state in this and in another engine."""
    whole = fresh(name, train, world, extra)
    first = run(whole, range(HALF), train, world)
    state = whole.state()
    result = {"curve": first + run(whole, range(HALF, STEPS), train, world), "state": numbers(state)}
    for kind, (to, with_) in {"again": (name, extra), "other": other}.items():
        resumed = fresh(to, train, world, with_)
        with torch.no_grad():
            for p in resumed.model.parameters():
                p.add_(0.1)  # what `load` must overwrite
        resumed.load(*state, HALF)
        result[kind] = run(resumed, range(HALF, STEPS), train, world)
        result[f"{kind} state"] = numbers(resumed.state())
    return result


class Reduced(TorchDispatchMode):
    """Notes the types of what travels between ranks."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.dtypes |= {str(leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        return func(*args, **kwargs or {})


def rank_main(rank, size, folder, stages):
    """One rank: all engines in turn; rank 0 writes down what they gave."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    world, results = World(rank=rank, size=size), {}
    for precision in ("fp32", "bf16"):
        train = replace(TRAIN, workers=size, precision=precision)
        settings = {str(stage): {"zero_optimization": {"stage": stage}} for stage in stages}
        if precision == "bf16" and size > 1 and stages:
            settings["2 asked"] = settings["2"] | {"communication_data_type": "bf16"}
        for name, extra in {"torch": {}, **settings}.items():
            engine = "torch" if name == "torch" else "deepspeed"
            with Reduced() as reduced:
                results[f"{precision} {name}"] = journey(engine, world, train, extra, ("torch", {}))
            results[f"{precision} {name}"]["reduced"] = sorted(reduced.dtypes)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    """What 1 and what 2 processes gave."""
    with tempfile.TemporaryDirectory() as folder:
        stages = () if deepspeed_problem() else stages_for(request.param)
        run_ranks(rank_main, request.param, request.param, folder, stages)
        return request.param, json.loads(Path(folder, "results.json").read_text())


def assert_close(a, b, tolerance):
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=0)


def assert_same_state(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], tolerance)


def test_accumulation_changes_nothing():
    one = fresh("torch", replace(TRAIN, accumulate=1))
    curve = run(one, range(STEPS), replace(TRAIN, accumulate=1))
    assert len({loss for loss, _ in curve}) == STEPS
    for accumulate in (2, 4, 8):
        train = replace(TRAIN, accumulate=accumulate)
        other = fresh("torch", train)
        assert_close(run(other, range(STEPS), train), curve, 1e-5)
        assert_same_state(numbers(other.state()), numbers(one.state()), 1e-5)


def test_any_number_of_ranks_gives_the_curve_of_one(ranks):
    _, results = ranks
    alone = fresh("torch")
    assert_close(results["fp32 torch"]["curve"], run(alone, range(STEPS)), 1e-5)


def test_a_step_is_that_of_plain_pytorch():
    """Against AdamW and clipping written out, in one process and without accumulation."""
    train = replace(TRAIN, accumulate=1)
    ours = fresh("torch", train)
    torch.manual_seed(0)
    model = Net()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    )
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(IMAGES[step])["logits"], LEVELS[step])
        plain.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1.0, train.clip / float(norm))
        for group in plain.param_groups:
            group["lr"] = train.lr * (step + 1) / STEPS
        plain.step()
        assert_close(run(ours, [step], train), [(loss.item(), norm.item())], 1e-5)
    assert_same_state(numbers(ours.state()), numbers((model.state_dict(), numbers_of(plain, model))), 1e-5)


def numbers_of(optimizer, model):
    held = [(name, optimizer.state[p]) for name, p in model.named_parameters() if name != "unused"]
    return {f"{name}|{moment}": state[moment] for name, state in held for moment in ("exp_avg", "exp_avg_sq")}


def test_no_clipping_with_0():
    train = replace(TRAIN, clip=0.0, accumulate=1)
    norms = [norm for _, norm in run(fresh("torch", train), range(2), train)]
    assert all(np.isfinite(norms)) and norms[0] > 0


def test_a_state_is_a_copy():
    engine = fresh("torch")
    run(engine, range(1))
    weights, moments = engine.state()
    before = numbers((weights, moments))
    run(engine, range(1, 2))
    assert numbers((weights, moments)) == before


def test_plain_pytorch_goes_on_from_its_state(ranks):
    _, results = ranks
    for precision in ("fp32", "bf16"):
        told = results[f"{precision} torch"]
        assert told["again"] == told["curve"][HALF:]


@needs_deepspeed
def test_deepspeed_gives_the_curve_of_plain_pytorch(ranks):
    size, results = ranks
    twin = results["fp32 torch"]
    for stage in stages_for(size):
        told = results[f"fp32 {stage}"]
        assert_close(told["curve"], twin["curve"], 1e-4)
        assert_same_state(told["state"], twin["state"], 1e-4)


@needs_deepspeed
def test_deepspeed_goes_on_from_its_state_in_either_engine(ranks):
    size, results = ranks
    for stage in stages_for(size):
        told = results[f"fp32 {stage}"]
        assert_close(told["again"], told["curve"][HALF:], 1e-5)
        assert_close(told["other"], told["curve"][HALF:], 1e-5)
        assert_same_state(told["again state"], told["other state"], 1e-5)


@needs_deepspeed
def test_deepspeed_in_bf16_gives_the_curve_of_its_twin(ranks):
    """Gradients travel in float32, unless bf16 is asked for, which has 8 bits."""
    size, results = ranks
    for stage in stages_for(size):
        told = results[f"bf16 {stage}"]
        assert_close(told["curve"], results["bf16 torch"]["curve"], 1e-5)
        assert_close(told["again"], told["curve"][HALF:], 1e-5)
        assert told["curve"] != results["fp32 torch"]["curve"]


def test_gradients_travel_in_float32_unless_asked(ranks):
    size, results = ranks
    for name, told in results.items():
        kinds = {kind for kind in told["reduced"] if "float" in kind}
        if size > 1:
            assert "torch.float32" in kinds, name
            assert ("torch.bfloat16" in kinds) == ("asked" in name), (name, kinds)


def test_the_engine_is_chosen_by_what_the_machine_has(monkeypatch):
    alone = World()
    assert choose_engine("torch", alone, {}) == "torch"
    monkeypatch.setattr(prepare, "deepspeed_problem", lambda: None)
    assert choose_engine("auto", alone, {}) == choose_engine("deepspeed", alone, {}) == "deepspeed"
    monkeypatch.setattr(prepare, "deepspeed_problem", lambda: "there is no C++ compiler: install g++")
    assert choose_engine("auto", alone, {}) == "torch"
    with pytest.raises(DataError, match="install g..; or set train.engine to torch"):
        choose_engine("deepspeed", alone, {})


def test_deepspeed_settings_without_deepspeed_are_refused():
    with pytest.raises(ConfigError, match="this run uses the torch engine"):
        fresh("torch", extra={"zero_optimization": {"stage": 1}})


@needs_deepspeed
def test_a_build_that_was_killed_is_not_waited_for(tmp_path):
    """PyTorch's lock of a build, as a killed one leaves it: without care the next one waits for ever.

    Nothing is compiled again, whichever ninja is in PATH.
    """
    folder = tmp_path / "extensions"
    with deepspeed_environment("cpu"):
        build_extension()
        shutil.copytree(os.environ["TORCH_EXTENSIONS_DIR"], folder)
    (folder / "deepspeed_shm_comm" / "lock").touch()
    library, other = folder / "deepspeed_shm_comm" / "deepspeed_shm_comm.so", tmp_path / "ninja"
    compiled = library.stat().st_mtime_ns
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    code = "from lgd.train.deepspeed_engine import build_extension; build_extension()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert library.stat().st_mtime_ns == compiled


def test_a_missing_compiler_is_a_problem(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("DeepSpeed runs on Linux only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "install g++" in (deepspeed_problem() or "")
