"""The process that runs one way for some steps: `python -m benchmarks.throughput.block BLOCK.json RESULT.json`.

Each block is a process of its own, and none runs beside another, so its peak memory is its own, and so are all cores.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass

from benchmarks.throughput import machine
from halos.errors import UserError
from halos.files import finished


@dataclass(frozen=True)
class Block:
    """Steps of one way.

    way: a name of `WAYS`
    batches: path of the batches that `work.write` wrote
    checks: compute the first batch once, and make no step
    """

    way: str
    loss: str
    model: str | None
    device: str
    dtype: str
    batches: str
    checks: bool
    beside_other_work: bool


@dataclass(frozen=True)
class Result:
    """The measurements of a block.

    numbers: of the first batch, before any update
    losses, seconds: of each step
    seconds_before: from the start of the way to its first step, the precomputed reference log-probs included
    rates: FLOP/s of a large matrix product, before and after the steps
    other_load: share of the cores that other processes used during the steps
    body, head: weights that every token, and every response token, is multiplied with
    """

    numbers: dict[str, float]
    losses: list[float]
    seconds: list[float]
    seconds_before: float
    rates: list[float]
    other_load: float
    peak_memory: int
    body: int
    head: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Way:
    """One way to train.

    is_live: the reference model runs in every step
    family: ways of one family have the same loss, which is compared; log-probs and rewards are compared among all
    """

    title: str
    is_live: bool
    family: str = "own"
    needs_trl: bool = False


WAYS = {
    "dpo": {
        "ours_cached": Way("this project, cached", False),
        "ours_live": Way("this project, live", True),
        "trl_precomputed": Way("TRL, precomputed", False, needs_trl=True),
        "trl_live": Way("TRL, live", True, needs_trl=True),
        "plain": Way("plain", True),
    },
    "kto": {
        "ours_cached": Way("this project, cached", False),
        "ours_live": Way("this project, live", True),
        "ours_mismatched_cached": Way("this project, mismatched KL, cached", False, "mismatched"),
        "ours_mismatched_live": Way("this project, mismatched KL, live", True, "mismatched"),
        "trl_precomputed": Way("TRL, precomputed", False, "mismatched", needs_trl=True),
        "trl_live": Way("TRL, live", True, "mismatched", needs_trl=True),
        "plain": Way("plain", True),
    },
}


def make(way: str, settings, batches: list):
    import trainers
    from benchmarks.throughput import peer, ways

    trainer_class = {"dpo": trainers.DPOTrainer, "kto": trainers.KTOTrainer}[settings.loss]
    is_cached = not WAYS[settings.loss][way].is_live
    if way.startswith("trl"):
        return peer.TRL(settings, batches, is_precomputed=is_cached)
    if way == "plain":
        return ways.Plain(settings, batches, trainer_class=trainer_class)
    if "mismatched" in way:
        return ways.OursMismatched(settings, batches, is_cached=is_cached)
    return ways.Ours(settings, batches, is_cached=is_cached, trainer_class=trainer_class)


def run(block: Block) -> Result:
    import torch

    from benchmarks.rate import matmul_rate, synchronize
    from benchmarks.throughput import ways, work
    from benchmarks.workload import body_parameters
    from halos.models import PolicyModel

    batches = work.read(block.batches)
    device, dtype = torch.device(block.device), getattr(torch, block.dtype)
    steps = batches[:1] if block.checks else [work.warm_up(batches[0]), *batches]
    n = 8192 if device.type == "cuda" else 2048
    ticks: list[float] = []

    def after_step() -> None:
        synchronize(device)
        ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        rates = [] if block.checks else [matmul_rate(device, dtype, n)]
        started = time.perf_counter()
        settings = ways.Settings(block.loss, block.model, device, dtype, folder)
        way = make(block.way, settings, steps)
        seconds_before, other = time.perf_counter() - started, machine.OtherLoad()
        numbers = way.numbers(steps[0]) if block.checks else {}
        losses = [] if block.checks else way.train(steps, after_step)
        other_load, memory = other(), machine.peak_memory(device)
        rates += [] if block.checks else [matmul_rate(device, dtype, n)]
    policy = PolicyModel(ways.load_lm(settings))
    return Result(
        numbers=numbers,
        losses=losses[1:],
        seconds=[now - then for then, now in zip(ticks, ticks[1:], strict=False)],
        seconds_before=seconds_before,
        rates=rates,
        other_load=other_load,
        peak_memory=memory,
        body=body_parameters(policy),
        head=policy.lm.get_output_embeddings().weight.numel(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torch", "transformers", "trl", "accelerate", "liger_kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    given, wanted = sys.argv[1:]
    with open(given) as file:
        block = Block(**json.load(file))
    try:
        if not block.beside_other_work:
            machine.wait_until_quiet()
        result = run(block)
    except UserError as problem:
        sys.exit(f"benchmarks.throughput: {problem}")
    with finished(wanted) as unfinished, open(unfinished, "w") as file:
        json.dump(dataclasses.asdict(result), file, indent=1)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
