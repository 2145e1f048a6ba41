"""Log a run: metrics.jsonl, curves.png, the progress bar, and wandb if it is enabled.

Change this file to add a panel to curves.png (PANELS) or another place to log to.
"""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from halos import distributed, secrets
from halos.files import finished

# The panels of curves.png: title -> its metrics. A metric that the loss does not report is left out.
PANELS = {
    "loss": ["loss/{mode}"],
    "reward margin": ["rewards_{mode}/margins"],
    "reward accuracy": ["rewards_{mode}/accuracies"],
    "rewards": ["rewards_{mode}/chosen", "rewards_{mode}/rejected"],
    "log-probs (nats per response)": ["logps_{mode}/chosen", "logps_{mode}/rejected"],
    "gradient norm": ["grad_norm"],
    "critic: explained variance": ["val/explained_variance", "val_eval/explained_variance"],
    "KL estimate (nats per token)": ["loss/policykl", "loss_eval/policykl"],
    "share of clipped tokens": ["clipfrac/policy", "clipfrac_eval/policy"],
}


class MetricsLog:
    """Writes one flat JSON object per update or evaluation, and shows progress on the terminal.

    total_examples: examples of the whole run, for the progress bar
    interval: least seconds between two refreshes of the bar, and between two lines in the sink
    sink: the result of `open_wandb`
    """

    def __init__(self, run_dir: str, total_examples: int, interval: float, sink):
        self.path = os.path.join(run_dir, "metrics.jsonl")
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  open for the whole run; flushed at every line
        self.interval = interval
        self.sink = sink
        self.last_shown = -float("inf")
        self.bar = tqdm(total=total_examples, unit="ex", desc="training", mininterval=interval, smoothing=0.1)

    def write(self, step: int, examples: int, mode: str, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, for an update or an evaluation. No line is skipped."""
        self.file.write(json.dumps({"step": step, "examples": examples, "mode": mode, **metrics}) + "\n")

    def training_step(self, step: int, examples: int, metrics: dict[str, float], tokens_per_second: float) -> None:
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
            self.sink.log(metrics, step=step)

    def evaluation(self, step: int, examples: int, metrics: dict[str, float]) -> None:
        self.write(step, examples, "eval", metrics)
        self.sink.log(metrics, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"eval after {examples} examples: {shown}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.sink.finish()


class NoLog:
    """The log of every rank but 0. Rank 0 writes the same numbers."""

    def training_step(self, *args) -> None:
        pass

    def evaluation(self, *args) -> None:
        pass

    def close(self) -> None:
        pass


def progress(loader: Iterable, description: str) -> Iterator:
    """Iterate over the loader's batches with a progress bar. The bar appears only after 3 seconds."""
    quiet = not distributed.is_main()
    return iter(tqdm(loader, desc=description, unit="batch", delay=3, leave=False, disable=quiet))


def read_metrics(path: str) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def draw_curves(run_dir: str, title: str) -> None:
    """Draw curves.png from metrics.jsonl: one panel per kind of metric, training as a line, evaluation as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = defaultdict(list)
    for row in read_metrics(os.path.join(run_dir, "metrics.jsonl")):
        for key, value in row.items():
            if key not in ("step", "examples", "mode"):
                series[key].append((row["examples"], value))
    panels = {
        title: [key for pattern in patterns for key in _in_both_modes(pattern) if key in series]
        for title, patterns in PANELS.items()
    } | _panels_of_own_metrics(series)
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, keys) in zip(axes.flat, panels.items(), strict=False):
        both = list(dict.fromkeys(_without_mode(key) for key in keys))  # a metric has one color in both modes
        for index, key in enumerate(keys):
            _draw(axis, key, series[key], f"C{both.index(_without_mode(key)) if len(both) > 1 else index}")
        axis.set_title(name)
        axis.set_xlabel("examples")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    with finished(os.path.join(run_dir, "curves.png")) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)


def _panels_of_own_metrics(names: Iterable[str]) -> dict[str, list[str]]:
    """A panel for each group of metrics that a loss reports and PANELS does not know, such as all of `kl/...`."""
    known = {_group(pattern) for patterns in PANELS.values() for pattern in patterns} | {"counters", "returns"}
    panels = defaultdict(list)
    for name in sorted(names):
        if "/" in name and _group(name) not in known:
            panels[_group(name)].append(name)
    return panels


def _group(name: str) -> str:
    """`kl` of `kl/chosen` and of `kl_eval/chosen`."""
    return _without_mode(name).partition("/")[0]


def _without_mode(name: str) -> str:
    """`kl/chosen` of `kl_eval/chosen`, `loss` of `loss/train`."""
    return re.sub(r"_(train|eval|\{mode\})(?=/)|/(train|eval|\{mode\})$", "", name)


def _in_both_modes(pattern: str) -> list[str]:
    return [pattern.format(mode="train"), pattern.format(mode="eval")] if "{mode}" in pattern else [pattern]


def _draw(axis, key: str, points: list[tuple[int, float]], color: str) -> None:
    x, y = zip(*points, strict=True)
    if "_eval/" in key or key.endswith("/eval"):
        axis.plot(x, y, "o--", color=color, markersize=5, label=key, zorder=3)
        return
    axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(x, _smoothed(y), color=color, linewidth=1.5, label=key)


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average over about a fiftieth of the run."""
    weight = 1 / max(1.0, len(values) / 50)
    out = [values[0]]
    for value in values[1:]:
        out.append(out[-1] + weight * (value - out[-1]))
    return out


class NoSink:
    """A sink that discards everything, for runs without wandb."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def open_wandb(settings, run_dir: str, name: str, config: dict):
    """Open a wandb run; return a `NoSink` if wandb is not enabled.

    Without an API key, the run is logged offline in the run directory, so wandb never prompts or waits.
    """
    if not settings.enabled:
        return NoSink()
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    return wandb.init(
        entity=settings.entity,
        project=settings.project,
        name=name,
        config=secrets.without_urls_secrets(config),
        dir=run_dir,
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(init_timeout=30, silent=True),
    )
