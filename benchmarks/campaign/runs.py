"""Small runs, what is in their directories, and whether two are the same."""

import json
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from omegaconf import OmegaConf

from halos import checkpoint, demo, manifest, metrics, records, states
from halos.records import Records

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS = 12
SAVE_EVERY = 2  # steps
ONE_BLOCK = [
    "model.architecture.num_hidden_layers=1",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=2",
    "model.batch_size=8",
    "model.eval_batch_size=8",
    "model.max_length=96",
    "model.max_prompt_length=80",
    "n_eval_examples=8",
    "warmup_steps=0",
]
LOSSES = ("kto", "dpo", "ppo")


@cache
def programs() -> tuple:
    """Import everything that a command imports, once, and return the three commands."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import openai  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import compare
    import dataloaders  # noqa: F401
    import eval as eval_program
    import train
    import trainers  # noqa: F401
    from halos import curves, judge, launch, samplers, token_store  # noqa: F401

    torch.set_num_threads(1)
    demo.N_PROMPTS = {"train": 200, "test": 20}
    return train.main, eval_program.main, compare.main


def words_of(cache_dir: str, loss: str = "kto", *more: str) -> list[str]:
    """The command line of a small run that saves, evaluates and exports often."""
    return [
        "exp_name=run",
        f"cache_dir={cache_dir}",
        f"loss={loss}",
        *ONE_BLOCK,
        f"n_examples={8 * STEPS}",
        f"save_every={8 * SAVE_EVERY}",
        "eval_every=32",
        "intermediate_checkpoints=true",
        *more,
    ]


def two_processes() -> None:
    """In a child: fork the processes of a run instead of spawning them, so that they need not import everything."""
    import dataclasses

    from halos import launch

    settings, work = launch._settings, launch._work
    launch._settings = lambda *args: dataclasses.replace(settings(*args), start_method="fork")

    def forked_work(*args):
        for number in (signal.SIGTERM, *launch.AT_ONCE):
            signal.signal(number, signal.SIG_DFL)  # those of the launcher, which a spawned process would not have
        work(*args)

    launch._work = forked_work


#### WHAT IS THERE


def unreadable(run_dir: str) -> list[str]:
    """Return what is wrong with the files of a run that was killed, as the next command would find them."""
    problems = []
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    for name in names:
        path = os.path.join(run_dir, name)
        if re.fullmatch(r"LATEST|BEST|step-\d+", name):
            problems += _problem(checkpoint.check_whole, path)
        elif name == "config.yaml":
            problems += _problem(OmegaConf.load, path)
        elif name in ("data.json", "eval.json"):
            problems += _problem(_json, path)
        elif name == "metrics.jsonl":
            problems += _problem(rows_before, path)
    for step in records.steps(run_dir):
        problems += _problem(Records.read, records.path_of(run_dir, step))
    for state in states.complete(run_dir):
        problems += _problem(manifest.check, state)
    whole = [name for name in names if name.startswith("LATEST") and manifest.is_complete(os.path.join(run_dir, name))]
    if "LATEST.old" in names and not whole:
        problems.append(f"{run_dir}: no LATEST is whole")
    return problems


def _problem(check, path: str) -> list[str]:
    try:
        check(path)
    except Exception as error:
        return [f"{path}: {error}"]
    return []


def _json(path: str):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def rows_before(path: str) -> list[dict]:
    """The rows of metrics.jsonl without their times. Of a killed run, the last line may be torn."""
    with open(path) as file:
        lines = file.read().split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if not metrics.is_time(key)} for line in lines]


def rows_of(cache_dir: str, name: str = "run") -> list[dict]:
    path = os.path.join(cache_dir, name, "metrics.jsonl")
    return rows_before(path) if os.path.exists(path) else []


def steps_made(cache_dir: str) -> int:
    return max((row["step"] for row in rows_of(cache_dir) if row["mode"] == "train"), default=0)


def leftovers(folder: str) -> list[str]:
    """Return what a finished command must not leave."""
    left = [os.path.join(path, name) for path, folders, names in os.walk(folder) for name in (*folders, *names)]
    return [path for path in left if path.endswith((".unfinished", ".old", ".lock"))]


def weights(cache_dir: str, name: str = "run") -> dict[str, torch.Tensor]:
    return checkpoint.load_state(os.path.join(cache_dir, name, "LATEST", "policy.pt"))


@dataclass
class Difference:
    """How a run that was killed and resumed differs from the one that was not."""

    lost: int = 0  # rows that are missing in metrics.jsonl
    repeated: int = 0  # rows that are there twice
    other: int = 0  # rows and tensors that are not equal bit by bit

    def __bool__(self) -> bool:
        return bool(self.lost or self.repeated or self.other)


def difference(cache_dir: str, whole: str) -> Difference:
    rows, expected = rows_of(cache_dir), rows_of(whole)
    found = Counter((row["mode"], row["step"]) for row in rows)
    wanted = Counter((row["mode"], row["step"]) for row in expected)
    ours, theirs = weights(cache_dir), weights(whole)
    other = sum(name not in ours or not torch.equal(ours[name], theirs[name]) for name in theirs)
    lost, repeated = (wanted - found).total(), (found - wanted).total()
    if not lost and not repeated:
        other += sum(row != reference for row, reference in zip(rows, expected, strict=True))
    return Difference(lost, repeated, other)
