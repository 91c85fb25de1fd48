"""What a person watches: TensorBoard, `log.jsonl`, and a line every few seconds."""

import json
import math
import sys
import time
from pathlib import Path

from lgd.files import write_bytes


class Log:
    """TensorBoard, `log.jsonl`, and a line for a person every few seconds."""

    def __init__(self, folder: Path, start: int, steps: int, batch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self.name, self.steps, self.batch, self.start = folder.name, steps, batch, start
        path = folder / "log.jsonl"
        before = path.read_text().splitlines()[:start] if path.is_file() else []
        write_bytes(path, "".join(line + "\n" for line in before).encode())
        # Line by line, so that a killed run's log reaches to its last checkpoint.
        self.file = open(path, "a", buffering=1)
        self.began = self.told = time.monotonic()
        self.waited = 0.0

    def step(self, step: int, values: dict[str, float], waited: float) -> None:
        """Record one step; the loss terms, the learning rate and the gradient's norm."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.waited += waited
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)
        now = time.monotonic()
        seconds = now - self.began
        rate = (step - self.start) * self.batch / max(seconds, 1e-9)
        self.board.add_scalar("speed/samples_per_second", rate, step)
        self.board.add_scalar("speed/data_wait_share", self.waited / max(seconds, 1e-9), step)
        if now - self.told > 5 or step == self.steps:
            self.told = now
            left = (self.steps - step) * self.batch / max(rate, 1e-9)
            self.tell(
                f"step {step}/{self.steps}  loss {values['loss']:.3f}  {rate:.0f} patches/s  "
                f"data wait {100 * self.waited / max(seconds, 1e-9):.0f} %  {left:.0f} s left"
            )

    def validation(self, step: int, scores: dict[str, float]) -> None:
        """Record the scores of a validation pass."""
        for name, value in scores.items():
            if math.isfinite(value):
                self.board.add_scalar(f"val/{name}", value, step)
        if scores:
            self.tell(f"step {step}/{self.steps}  val kappa {scores['kappa']:.3f}  accuracy {scores['accuracy']:.3f}")

    def tell(self, line: str) -> None:
        """One line on standard error."""
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush everything."""
        self.board.close()
        self.file.close()
