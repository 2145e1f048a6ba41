"""How time and memory of a DPO step grow with batch size, sequence length, responses per prompt, and processes.

    python -m benchmarks.growth

A 35M-parameter Llama in float32 takes whole steps (`trainer.train_step`, with AdamW and the reference log-probs cached)
packed, as the project trains, and padded: one row per response, logits of all positions. Each point is measured in a
process of its own, for its peak memory. The floor is the arithmetic that no step can leave out, at the rate of matrix
products that was measured in the same process. Writes `assets/growth.png` and `assets/growth.json`, and prints the
numbers as Markdown. --panel measures one panel again and keeps the others; --table measures nothing.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.workload import body_parameters, llama, shp_like_pairs
from halos import distributed, sharding
from halos.files import finished
from halos.launch import launch
from halos.project_dir import PROJECT
from halos.tokens import Role, TokenizedExample
from halos.train_state import TrainState
from trainers import DPOTrainer

NUMBERS = os.path.join(PROJECT, "assets", "growth.json")
PICTURE = os.path.join(PROJECT, "assets", "growth.png")
PANELS = {  # panel -> the values of its axis
    "batch": (1, 2, 4, 8, 16),
    "length": (128, 256, 512, 1024),
    "responses": (2, 4, 8, 16),
    "processes": (1, 2),
}
AXES = {
    "batch": "pairs in a batch (SHP-like lengths)",
    "length": "tokens of prompt and response (4 pairs)",
    "responses": "responses to one prompt (512 and 64 tokens)",
    "processes": "processes on 2 cores (8 SHP-like pairs)",
}
WAYS = ("packed", "padded")
UNITS = ("seconds", "mib"), ("seconds per step", "MiB above the model")
STEPS = 3
MOST_PADDED = 10_000  # positions up to which the padded way is measured: 8 pairs with a long one take 7 GiB and 20 s


#### THE WORK


def pairs(n: int, prompt: int, response: int, vocab_size: int, shared: bool = False) -> list[TokenizedExample]:
    """Return n pairs of random tokens with these lengths. shared: all have the same prompt"""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab_size, length).astype(np.int32)

    prompts = [ids(prompt)] * n if shared else [ids(prompt) for _ in range(n)]
    roles = (Role.CHOSEN, Role.REJECTED)
    return [TokenizedExample(one, (ids(response), ids(response)), roles) for one in prompts]


def examples_of(panel: str, value: int, vocab_size: int) -> list[TokenizedExample]:
    if panel == "length":
        return pairs(4, value // 2, value // 2, vocab_size)
    if panel == "responses":
        return pairs(value // 2, 512, 64, vocab_size, shared=True)
    return shp_like_pairs(value if panel == "batch" else 8, vocab_size)


def is_cheap(examples: list[TokenizedExample]) -> bool:
    """Return whether the padded way is measured, too."""
    lengths = [len(example.prompt) + len(response) for example in examples for response in example.responses]
    return len(lengths) * max(lengths) <= MOST_PADDED


def floor_flops(examples: list[TokenizedExample], body: int, head: int, hidden: int, layers: int) -> int:
    """Return the least FLOPs of a forward and backward pass: 6 per token and weight, and those of attention.

    A prompt counts once. The head counts for response tokens alone. Attention takes 12 per layer, query and key of its
    own sequence, and hidden unit.

    body, head: weights that a token is multiplied with
    """
    responses: dict[bytes, list[int]] = {}
    for example in examples:
        responses.setdefault(example.prompt.tobytes(), []).extend(len(one) for one in example.responses)
    prompts = {example.prompt.tobytes(): len(example.prompt) for example in examples}
    n_response = sum(sum(lengths) for lengths in responses.values())
    n_tokens = sum(prompts.values()) + n_response
    attended = sum(
        p * (p + 1) // 2 + sum(r * p + r * (r + 1) // 2 for r in responses[key]) for key, p in prompts.items()
    )
    return 6 * body * n_tokens + 6 * head * n_response + 12 * layers * hidden * attended


def matrix_rate(n: int = 1024, repeats: int = 7) -> float:
    """Return FLOP/s of float32 products of square matrices, the median of several."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[1:])


#### A POINT


class ZeroReference:
    """A reference cache whose log-probs are all 0: looking one up takes 1 ms."""

    def logps(self, examples: list[TokenizedExample]) -> torch.Tensor:
        return torch.zeros(sum(len(response) for example in examples for response in example.responses))


class NoData:
    """A loader of which only the position is asked for."""

    def state_dict(self) -> dict[str, int]:
        return {"examples_seen": 0}


def trainer_of(policy) -> DPOTrainer:
    model = {"max_tokens_per_forward": 1 << 30, "max_grad_norm": 10.0, "gradient_accumulation_steps": 1}
    settings = {"optimizer": "AdamW", "optimizer_kwargs": {}, "lr": 1e-6, "lr_scheduler": "constant"}
    config = {**settings, "warmup_steps": 0, "humanline": {"enabled": False}, "model": model, "loss": {"beta": 0.1}}
    trainer = DPOTrainer(policy, None, None, OmegaConf.create(config), None, None, "")  # type: ignore[arg-type]
    trainer.reference_cache = ZeroReference()  # type: ignore[assignment]
    optimizer = trainer.make_optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer.state = TrainState(NoData(), optimizer, scheduler)  # type: ignore[arg-type]
    return trainer


def measure(panel: str, value: int, way: str, steps: int = STEPS, **size: int) -> dict[str, float] | None:
    """Return seconds and MiB of a point; None on all ranks but the first.

    MiB: what a step adds to the peak of a process that has taken a small step
    size: of the Llama
    """
    policy = llama(**size)
    body, hidden = body_parameters(policy), policy.lm.config.hidden_size
    examples = examples_of(panel, value, policy.vocab_size)
    layers = policy.lm.config.num_hidden_layers
    flops = floor_flops(examples, body, policy.vocab_size * hidden, hidden, layers)
    policy.use_packing(way == "packed")
    mesh = distributed.device_mesh("cpu") if distributed.world_size() > 1 else None
    sharding.prepare_policy(policy, torch.float32, mesh=mesh)
    trainer = trainer_of(policy)
    trainer.train_step([pairs(2, 8, 8, policy.vocab_size)])
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(steps):
        distributed.barrier()
        started = time.perf_counter()
        trainer.train_step([examples])
        seconds.append(time.perf_counter() - started)
    added = distributed.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)[0]
    rate = matrix_rate() * distributed.world_size()
    if not distributed.is_main():
        return None
    return {"seconds": statistics.median(seconds), "mib": added / 1024, "floor": flops / rate, "gflops": rate / 1e9}


def write_point(path: str, *point) -> None:
    if (found := measure(*point)) is not None:
        with finished(path) as unfinished, open(unfinished, "w") as file:
            json.dump(found, file)


def in_own_process(panel: str, value: int, way: str) -> dict[str, float]:
    path = f"{NUMBERS}.{os.getpid()}"
    words = [sys.executable, "-m", "benchmarks.growth", "--point", panel, str(value), way, path]
    subprocess.run(words, cwd=PROJECT, check=True)
    with open(path) as file:
        found = json.load(file)
    os.remove(path)
    print(
        f"{panel} {value} {way}: {found['seconds']:.2f} s, floor {found['floor']:.2f} s, +{found['mib']:.0f} MiB",
        flush=True,
    )
    return found


#### WHAT IS WRITTEN


def draw(rows: list[dict], path: str) -> None:
    """Draw a column per panel: seconds of a step with the floor above, memory below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(row["panel"] == panel for row in rows)]
    figure = Figure(figsize=(3.4 * len(panels), 5.6), dpi=110, facecolor="white")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        for axis, what, unit in zip(
            axes[:, column], ("seconds", "mib"), ("seconds per step", "MiB above the model"), strict=True
        ):
            for way, color in zip(WAYS, ("C0", "C3"), strict=True):
                points = [(row["value"], row[what]) for row in rows if (row["panel"], row["way"]) == (panel, way)]
                axis.plot(*zip(*points, strict=True), "o-", color=color, label=way) if points else None
            axis.set_xscale("log", base=2)
            axis.set_xticks(PANELS[panel], [str(value) for value in PANELS[panel]])
            axis.set_ylim(bottom=0)
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
        floors = [(row["value"], row["floor"]) for row in rows if (row["panel"], row["way"]) == (panel, "packed")]
        axes[0, column].plot(*zip(*floors, strict=True), "k--", label="floor")
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel(AXES[panel], fontsize=9)
    figure.tight_layout()
    with finished(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def table(rows: Iterable[dict]) -> str:
    lines = ["| against | | packed: s, MiB | padded: s, MiB | floor, s |", "|---|---|---|---|---|"]
    points: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        points.setdefault((row["panel"], row["value"]), {})[row["way"]] = row
    for (panel, value), ways in points.items():
        shown = [f"{ways[way]['seconds']:.2f}, {ways[way]['mib']:.0f}" if way in ways else "" for way in WAYS]
        lines.append(f"| {AXES[panel]} | {value} | {shown[0]} | {shown[1]} | {ways['packed']['floor']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=PANELS, nargs="*", default=list(PANELS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        from benchmarks.growth import write_point as importable

        panel, value, way, path = args.point
        return launch(
            importable, path, panel, int(value), way, nproc_per_node=int(value) if panel == "processes" else 1
        )
    rows = []
    if os.path.exists(NUMBERS):
        with open(NUMBERS) as file:
            rows = [row for row in json.load(file) if args.table or row["panel"] not in args.panel]
    for panel in () if args.table else args.panel:
        for value in PANELS[panel]:
            for way in WAYS if is_cheap(examples_of(panel, value, 32000)) else WAYS[:1]:
                rows.append({"panel": panel, "value": value, "way": way, **in_own_process(panel, value, way)})
    if not args.table:
        rows.sort(key=lambda row: list(PANELS).index(row["panel"]))
        with finished(NUMBERS) as unfinished, open(unfinished, "w") as file:
            json.dump(rows, file, indent=1)
        draw(rows, PICTURE)
    print(table(rows))


if __name__ == "__main__":
    main()
