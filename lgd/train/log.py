"""What a person watches: TensorBoard, `log.jsonl`, a bar or lines of progress, and a summary at the end."""

import contextlib
import json
import logging
import math
import operator
import os
import resource
import sys
import time

import torch

from lgd.base.errors import DataError
from lgd.base.labels import Labels
from lgd.base.logs import progress
from lgd.base.markup import markdown_table
from lgd.base.process_state import quiet_threads
from lgd.base.target import Target
from lgd.base.text import dump_json
from lgd.io.files import exists, explain_write_errors, read_bytes, write_bytes
from lgd.io.folders import WorkingFolder
from lgd.io.location import Location
from lgd.labels.classes import count_confusion
from lgd.metrics import Floats

logger = logging.getLogger(__name__)


class Log:
    """The record of a run; rank 0 keeps it. That of a url is kept in TMPDIR, and uploaded by `publish`."""

    def __init__(self, folder: Location, start: int, steps: int, batch: int, target: Target) -> None:
        from torch.utils.tensorboard import SummaryWriter

        before = read_lines(folder / "log.jsonl", start)
        self.working = WorkingFolder(folder)
        self.working.enter_context(quiet_threads("tensorboard"))
        self.path = self.working.path / "log.jsonl"
        write_bytes(self.path, "".join(line + "\n" for line in before.values()).encode())
        with explain_write_errors(self.path):
            self.board = SummaryWriter(self.working.path / "tensorboard", purge_step=start + 1)
        self.name, self.steps, self.batch, self.start, self.done = folder.name, steps, batch, start, start
        self.target = target
        # Line by line, so that a killed run's log reaches to its last checkpoint.
        self.file = self.path.open("a", buffering=1)
        if start:
            logger.info("%s: goes on after step %d of %d", self.name, start, steps)
        if lost := [step for step in range(1, start + 1) if step not in before]:
            logger.warning(
                f"{self.name}: log.jsonl lacks {len(lost)} of the {start} steps that are done, from step {lost[0]} to "
                f"{lost[-1]}: its lines were lost, the training was not"
            )
        self.bar = progress(steps, self.name, "steps", start)
        self.began, self.waited, self.loss = time.monotonic(), 0.0, math.nan

    def step(self, step: int, values: dict[str, float], waited: float) -> None:
        """Record one step; the loss terms, the learning rate and the gradient's norm."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.waited += waited
        self.done, self.loss = step, values["loss"]
        rate, share = self._speed()
        speed = {"samples_per_second": rate, "data_wait_share": share, "peak_memory_mb": peak_memory() / 1e6}
        with explain_write_errors(self.path):
            self.file.write(dump_json({"step": step, **known}) + "\n")
            for section, numbers in (("train", values), ("speed", speed)):
                for name, value in numbers.items():
                    self.board.add_scalar(f"{section}/{name}", value, step)
        self.bar.set_postfix_str(f"loss {self.loss:.3f}, {rate:.0f} patches/s, data wait {share:.0%}", refresh=False)
        self.bar.update()

    def _speed(self) -> tuple[float, float]:
        """Patches a second, and the share of the time that was spent waiting for data."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return (self.done - self.start) * self.batch / seconds, self.waited / seconds

    def validation(self, step: int, scores: dict[str, float], answer_nK: Floats, label_n: Labels) -> None:
        """Record the scores of a validation pass, and which class was called which."""
        for name, value in scores.items():
            if math.isfinite(value):
                self.board.add_scalar(f"val/{name}", value, step)
        at = f"{self.name}: step {step}/{self.steps}  val"
        if "loss" in scores:
            logger.info("%s loss %.4f", at, scores["loss"])
        elif scores and self.target.is_number:
            logger.info("%s mae %.3g  pearson %.3f", at, scores["mae"], scores["pearson"])
        elif scores:
            names = self.target.classes
            counts_KK = count_confusion(label_n, answer_nK.argmax(1), len(names)).tolist()
            rows = [[name, *map(str, row)] for name, row in zip(names, counts_KK, strict=True)]
            self.board.add_text("val/confusion", "\n".join(markdown_table(["true / called", *names], rows)), step)
            logger.info("%s kappa %.3f  accuracy %.3f", at, scores["kappa"], scores["accuracy"])

    def summary(self) -> None:
        """Log what this process has done, if it trained at all."""
        if self.done == self.start:
            return
        rate, share = self._speed()
        seconds = time.monotonic() - self.began
        logger.info(
            f"{self.name}: {self.done - self.start} steps in {seconds:.1f} s: {rate:.0f} patches/s, {share:.0%} of the "
            f"time waited for data, peak memory {peak_memory() / 1e6:.0f} MB, loss {self.loss:.3f}"
        )

    def publish(self) -> None:
        """Make what was recorded so far appear at the url; a local folder has it already."""
        with explain_write_errors(self.path):
            self.board.flush()
            self.file.flush()
            # A checkpoint follows, and outlives a machine that goes down.
            os.fsync(self.file.fileno())
        self.working.publish()

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        failed: list[Exception] = []
        for finish in (self.publish, self.board.close, self.file.close):
            try:
                finish()
            except (DataError, OSError) as error:
                failed.append(error)
        if failed:
            # Whatever ended the run matters more.
            logger.warning("%s: the log is incomplete: %s", self.name, failed[0])
        self.working.close()


def read_lines(path: Location, last: int) -> dict[int, str]:
    """The lines of a log by their steps, in order, up to the step `last`; a line that was cut off is left out."""
    lines = {}
    for line in read_bytes(path).decode(errors="replace").splitlines() if last and exists(path) else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            lines[operator.index(json.loads(line)["step"])] = line
    return {step: lines[step] for step in sorted(lines) if 0 < step <= last}


def peak_memory() -> int:
    """Most bytes that this process has had: of the GPU where it uses one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
