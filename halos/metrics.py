"""Log a run: metrics.jsonl, the progress bar, and the loggers of `halos/loggers.py`.

The picture of the metrics is drawn in `halos/curves.py`.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from halos import distributed
from halos.curves import Series, draw_curves
from halos.files import writing
from halos.loggers import Loggers

# Metrics of one dataset, such as loss/eval/shp: in metrics.jsonl and the curves, and too many for the terminal.
OF_DATASET = re.compile(r"(loss/eval|rewards_eval/\w+)/.")


class MetricsLog:
    """Writes one flat JSON object per update or evaluation, and shows progress on the terminal.

    total_examples: examples of the whole run, for the progress bar
    interval: least seconds between two refreshes of the bar, and between two lines in the loggers
    late: write the line of an update at the next one, so that nothing waits for its numbers
    examples, n_bytes: of a resumed run: examples before, and what metrics.jsonl had then. Later lines are cut off: they
        are of steps that are made again.
    """

    def __init__(
        self,
        run_dir: str,
        total_examples: int,
        interval: float,
        loggers: Loggers,
        *,
        late: bool = False,
        examples: int = 0,
        n_bytes: int | None = None,
    ):
        self.run_dir = run_dir
        path = os.path.join(run_dir, "metrics.jsonl")
        if n_bytes is not None:
            cut_rows(path, n_bytes)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  open for the whole run; flushed at every line
        self.series = Series(whole_rows(path))
        self.interval = interval
        self.loggers = loggers
        self.last_shown = -float("inf")
        self.late = late
        self.pending: Callable[[], None] | None = None
        self.bar = tqdm(
            total=total_examples, initial=examples, unit="ex", desc="training", mininterval=interval, smoothing=0.1
        )

    def write(self, step: int, examples: int, mode: str, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, for an update or an evaluation. No line is skipped."""
        row = {"step": step, "examples": examples, "mode": mode, **metrics}
        with writing(self.file.name):
            self.file.write(json.dumps(row) + "\n")
        self.series.add(row)

    def flush(self) -> int:
        """Make sure that the lines so far survive a power cut. Returns the size of metrics.jsonl, in bytes."""
        self.settle()
        with writing(self.file.name):
            self.file.flush()
            os.fsync(self.file.fileno())
        return os.path.getsize(self.file.name)

    def draw_curves(self, title: str) -> None:
        draw_curves(self.run_dir, title, self.series)

    def training_step(
        self, step: int, examples: int, read: Callable[[], dict[str, float]], tokens_per_second: float
    ) -> None:
        """Log an update. read: returns its metrics, and may wait for the device"""
        self.settle()
        self.pending = lambda: self._training_step(step, examples, read(), tokens_per_second)
        if not self.late:
            self.settle()

    def settle(self) -> None:
        """Write the line of the last update, if it is not written yet."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending()

    def _training_step(self, step: int, examples: int, metrics: dict[str, float], tokens_per_second: float) -> None:
        self.write(step, examples, "train", metrics)
        self.bar.update(examples - self.bar.n)
        now = time.monotonic()
        if now - self.last_shown >= self.interval:
            self.last_shown = now
            shown = {"loss": metrics["loss/train"]}
            shown |= {"margin": metrics["rewards_train/margins"]} if "rewards_train/margins" in metrics else {}
            shown |= {"acc": metrics["rewards_train/accuracies"]} if "rewards_train/accuracies" in metrics else {}
            postfix = ", ".join(f"{name}={value:.3g}" for name, value in shown.items())
            self.bar.set_postfix_str(f"{postfix}, {tokens_per_second:,.0f} tok/s")
            self.loggers.log(metrics, step=step)

    def evaluation(self, step: int, examples: int, metrics: dict[str, float]) -> None:
        self.settle()
        self.write(step, examples, "eval", metrics)
        self.loggers.log(metrics, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not OF_DATASET.match(name))
        self.say(f"eval after {examples} examples: {shown}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.loggers.finish()


class NoLog:
    """The log of every rank but 0. Rank 0 writes the same numbers."""

    def training_step(self, *args) -> None:
        pass

    def evaluation(self, *args) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def settle(self) -> None:
        pass

    def flush(self) -> int:
        return 0

    def draw_curves(self, title: str) -> None:
        pass

    def close(self) -> None:
        pass


def progress(batches: Iterable, description: str, total: int) -> Iterator:
    """Iterate over the batches with a progress bar. The bar appears only after 3 seconds."""
    quiet = not distributed.is_main()
    return iter(tqdm(batches, desc=description, total=total, unit="batch", delay=3, leave=False, disable=quiet))


def is_time(name: str) -> bool:
    """Return whether a metric is a time or a speed, which is another one in an equal run."""
    return name == "examples_per_second" or name.startswith("time/")


def read_metrics(path: str) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def cut_rows(path: str, n_bytes: int) -> None:
    """Cut off what follows the first n_bytes, or say that rows are missing. A new row starts on a line of its own."""
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size < n_bytes:
            print(
                f"warning: {path} has {size:,} bytes, and the run had written {n_bytes:,}: rows are missing", flush=True
            )
        n_bytes = file.truncate(min(size, n_bytes))
        file.seek(max(0, n_bytes - 1))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")


def whole_rows(path: str) -> Iterator[dict]:
    """Yield the rows of metrics.jsonl. Lines that are none, in a file that was damaged, are left out with a warning."""
    bad = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            row = _row(line)
            bad += row is None
            if row is not None:
                yield row
    if bad:
        print(f"warning: {bad} lines of {path} are no rows of a run, and are not in the curves", flush=True)


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or "examples" not in row:
        return None
    return row if all(type(value) in (int, float) for key, value in row.items() if key != "mode") else None
