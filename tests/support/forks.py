"""Processes that have imported everything: a start takes a tenth of a second instead of six.

All tests of a process share the server that they are forked from, so its imports are named here, for all.
"""

import multiprocessing
from collections.abc import Callable

from torch.multiprocessing.spawn import start_processes

FORKS = multiprocessing.get_context("forkserver")
# No module of tests: the server does not find it, and then imports what is below for each process.
FORKS.set_forkserver_preload(
    """pytest hypothesis torch transformers h5py webdataset s3fs sklearn.metrics matplotlib.pyplot
    lgd.cli lgd.pipeline lgd.shards.builder lgd.shards.verify lgd.store.cache lgd.train.launch lgd.models.teacher
    lgd.report.report lgd.report.evaluation torch.utils.tensorboard torch._dynamo
    transformers.modeling_utils transformers.models.resnet.modeling_resnet""".split()
)


def run_ranks(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Call `function(rank, *arguments)` in so many processes; raise what one of them raises."""
    start_processes(function, arguments, nprocs=size, start_method="forkserver")
