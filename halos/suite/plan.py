"""The runs of the suite: the words of each one's commands, and how its settings are found.

A run trains one stage: the base, or the last loss of a row, from the weights of the run before it. All stages of a row
see the same data in the order of their seed, and make equally many updates: an update has `responses_per_update`
responses, which is half as many examples for a loss on pairs.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from halos.files import finished
from halos.suite.settings import Suite, before, loss_of

BASE = "base"
TUNING_SEED = 0
NEVER = 10**6  # updates between evaluations: there is one at the end


@dataclass(frozen=True)
class Run:
    """A stage to train and to measure.

    words: of train.py, without its name, size and seed
    start: the run whose weights it starts from; None: the weights of the model
    attempt: number of the setting that is tried; None in the comparison
    """

    size: str
    row: str
    seed: int
    words: tuple[str, ...]
    start: "Run | None" = None
    attempt: int | None = None

    @property
    def name(self) -> str:
        end = name_of_seed(self.seed) if self.attempt is None else f"_try{self.attempt}"
        return f"{self.size}_{self.row.replace('+', '_')}{end}"


def name_of_seed(seed: int | str) -> str:
    return f"_seed{seed}"


def base_run(suite: Suite, size: str) -> Run | None:
    """Return the stand-in for pretraining: SFT on texts of any quality; None if the model has weights."""
    if suite.base is None:
        return None
    words = [f"datasets=[{texts_of(suite)}]", *suite.base["words"]]
    return Run(size, BASE, TUNING_SEED, (*words,))


def tries(suite: Suite, size: str, row: str, start: Run | None, score: Callable[[Run], float]) -> Run:
    """Try the settings of a row, and return the best run: first learning rates, then the rest at the best one.

    score: finishes a run and returns how good it is; higher is better
    """
    found = suite.tries_of(row)
    runs = [Run(size, row, TUNING_SEED, (f"lr={lr}",), start, number) for number, lr in enumerate(found["lr"], 1)]
    scores = {run: score(run) for run in runs}
    best = max(runs, key=scores.__getitem__)
    for number, word in enumerate(found["then"], len(runs) + 1):
        run = Run(size, row, TUNING_SEED, (*best.words, word), start, number)
        scores[run] = score(run)
    return max(scores, key=scores.__getitem__)


def first_settings(suite: Suite) -> dict[str, tuple[str, ...]]:
    """Return the first setting of each row, for a suite without tuning."""
    return {row: (f"lr={suite.tries_of(row)['lr'][0]}",) for row in suite.rows}


def final_runs(
    suite: Suite, size: str, seeds: range, settings: dict[str, tuple[str, ...]], rows: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Yield the runs of the comparison, seed by seed, each after the run that it starts from.

    settings: row -> the words that were best; rows: if not all
    """
    for seed in seeds:
        runs: dict[str, Run] = {}
        for row in rows or suite.rows:
            start = runs.get(before(row)) or base_run(suite, size)
            runs[row] = Run(size, row, seed, settings[row], start)
            yield runs[row]


#### WORDS


def train_words(suite: Suite, run: Run, formats: dict[str, str]) -> list[str]:
    """Return the words of train.py. formats: loss -> data format of its trainer"""
    loss = "sft" if run.row == BASE else loss_of(run.row)
    is_paired = formats[loss] == "paired"
    batch = suite.responses_per_update // 2 if is_paired else suite.responses_per_update
    return [
        f"loss={loss}",
        *suite.sizes[run.size],
        f"exp_name={run.name}",
        f"cache_dir={suite.out}",
        f"seed={run.seed}",
        *suite.words,
        *(suite.sft if loss == "sft" else []),
        f"model.batch_size={batch}",
        f"eval_every={batch * NEVER}",
        *([f"model.load_from={run.start.name}/LATEST/policy.pt"] if run.start else []),
        *run.words,
    ]


def sample_words(suite: Suite, run: Run) -> list[str]:
    """Return the words of eval.py: for the prompts of the comparison, or for those of tuning."""
    prompts = os.path.join(suite.out, prompts_file(run))
    config, out = os.path.join(suite.out, run.name, "config.yaml"), file_of(suite, run, "samples.json")
    return ["-c", config, "-m", "sample", "-f", prompts, "-u", "false", "-o", out]


def judge_words(suite: Suite, run: Run) -> list[str]:
    """Return the words of compare.py, against the responses that people preferred."""
    results, verdicts = (file_of(suite, run, name) for name in ("results.jsonl", "verdicts.csv"))
    words = ["-f", file_of(suite, run, "samples.json"), "-bk", "chosen", "-ck", "policy", "-r", results]
    return [*words, "--verdicts", verdicts, *(suite.judge or [])]


def file_of(suite: Suite, run: Run, name: str) -> str:
    return os.path.join(suite.out, run.name, name)


def prompts_file(run: Run) -> str:
    return "prompts.jsonl" if run.attempt is None else "prompts_tuning.jsonl"


def write_json(path: str, content: Any) -> None:
    with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def texts_of(suite: Suite) -> str:
    return os.path.join(suite.out, "base.jsonl")
