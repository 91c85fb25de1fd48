"""The processes that train together: how one joins the others, leaves them, and does as rank 0 decides."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lgd.base.device import find_device, keep_memory
from lgd.base.process_state import default_environment
from lgd.stream.plan import World
from lgd.train.deepspeed_engine import leave_world

_GROUPS, _DECISIONS = itertools.count(), itertools.count()
"""Number the process groups of this process, and what rank 0 decides; ranks make as many."""


def take_from_rank_0(decide: Callable[[], bool]) -> bool:
    """What rank 0 decides, on the other ranks too, which torchrun ends where it raises; every rank calls this."""
    if dist.is_initialized():
        decided = [decide() if dist.get_rank() == 0 else False]
        dist.broadcast_object_list(decided)
        return decided[0]
    world = _open_store()
    if world is None or world[2] == 1:
        return decide()
    store, rank, _ = world
    key = f"decision-{next(_DECISIONS)}"
    if rank == 0:
        store.set(key, str(decide()))
    return bool(store.get(key) == b"True")


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """This process among the others, those of Ray Train, of torchrun, or none; what it joins is left at the end."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = find_device(number) == "cuda"
    device = f"cuda:{number}" if cuda else "cpu"
    if not cuda:
        keep_memory()
    with torch.cuda.device(device) if cuda else contextlib.nullcontext(), _join_group("nccl" if cuda else "gloo"):
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def _open_store() -> tuple[Store, int, int] | None:
    """The store through which the processes of torchrun meet, rank and world size; None elsewhere."""
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        return None
    return _meet(os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", ""))


@functools.cache
def _meet(address: str, port: str) -> tuple[Store, int, int]:
    """One for the whole process: without torchrun's agent it ends, with what it says, when rank 0 drops it."""
    found: tuple[Store, int, int] = next(rendezvous("env://"))
    return found


@contextlib.contextmanager
def _join_group(backend: str) -> Iterator[None]:
    """The process group that Ray Train or the caller made, else torchrun's, else one of this process alone."""
    if dist.is_initialized():
        yield
    elif world := _open_store():
        store, rank, size = world
        # torchrun's store still has the addresses of the groups before.
        store = PrefixStore(f"lgd-{next(_GROUPS)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        yield
        # Not after an error: the other ranks may be waiting for this one, and it for them.
        leave_world()
    else:
        # DeepSpeed wants a group even alone.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            with default_environment({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}):
                yield
        finally:
            leave_world()
