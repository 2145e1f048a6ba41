"""The suite from its start to its results: prompts, bases, tuning, the comparison, and the A/A run."""

import glob
import json
import math
import os
import random

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from halos import demo, loading, locks
from halos.commands import hydra_message
from halos.config import validate
from halos.errors import UserError
from halos.files import finished
from halos.project_dir import PROJECT
from halos.suite import findings, plan, report, runner
from halos.suite.plan import Run
from halos.suite.runner import Programs, Runner
from halos.suite.settings import Suite, before, loss_of, stages_of

Settings = dict[str, dict[str, tuple[str, ...]]]  # size -> row -> the words that were best


def whole(suite: Suite, programs: Programs) -> None:
    """Do what is missing of the suite, and write its results."""
    check(suite, programs)
    with locks.take(suite.out, on_wait=lambda who: print(f"waiting for {who}, who runs this suite", flush=True)):
        write_data(suite, programs)
        finished_runs = glob.glob(os.path.join(suite.out, "*", runner.SCORES))
        worker = Runner(suite, programs, n_runs(suite), len(finished_runs))
        settings = {size: tuned(suite, size, worker) for size in suite.sizes}
        plan.write_json(os.path.join(suite.out, "settings.json"), settings)
        for seed in range(1, suite.seeds + 1):
            for size in suite.sizes:
                for run in plan.final_runs(suite, size, range(seed, seed + 1), settings[size]):
                    worker.finish(run)
            report.write(suite, findings.of_suite(suite, settings, seed), settings)
        if suite.aa:
            twice(suite, worker, settings)
            report.write(suite, findings.of_suite(suite, settings, suite.seeds), settings)


def check(suite: Suite, programs: Programs) -> None:
    """Raise UserError if training could not start with the words of each loss, before anything runs."""
    for row in {loss_of(row): row for row in suite.rows}.values():
        words = *plan.first_settings(suite)[row], *suite.tries_of(row)["then"]
        run = Run(next(iter(suite.sizes)), row, 1, words)
        try:
            with initialize_config_dir(os.path.join(PROJECT, "config"), version_base="1.3"):
                config = compose("config", plan.train_words(suite, run, programs.formats))
        except HydraException as error:
            raise UserError(hydra_message(error)) from None
        validate(config, programs.trainers, programs.dataloaders)


def n_runs(suite: Suite) -> int:
    n_tries = len(suite.rows) * suite.n_tries if suite.n_tries > 1 else 0
    n_aa = suite.seeds * len(stages_of(suite.aa)) if suite.aa else 0
    return len(suite.sizes) * (bool(suite.base) + n_tries + suite.seeds * len(suite.rows)) + n_aa


def tuned(suite: Suite, size: str, worker: Runner) -> dict[str, tuple[str, ...]]:
    """Find the best settings of every row, on the tuning seed and prompts."""
    base = plan.base_run(suite, size)
    if base:
        worker.finish(base)
    if suite.n_tries == 1:
        return plan.first_settings(suite)
    best: dict[str, Run] = {}
    for row in suite.rows:
        start = best.get(before(row)) or base
        best[row] = plan.tries(suite, size, row, start, lambda run: quality(run, worker))
    return {row: run.words for row, run in best.items()}


def quality(run: Run, worker: Runner) -> float:
    """Finish a run that tries a setting. One that fails, as with a learning rate that diverges, is the worst."""
    try:
        return findings.quality(worker.finish(run))
    except UserError as reason:
        print(f"this setting is left out: {reason}", flush=True)
        return -math.inf


def twice(suite: Suite, worker: Runner, settings: Settings) -> None:
    """Train the A/A row with as many further seeds, at the first size."""
    assert suite.aa
    size, seeds = next(iter(suite.sizes)), range(suite.seeds + 1, 2 * suite.seeds + 1)
    for run in plan.final_runs(suite, size, seeds, settings[size], stages_of(suite.aa)):
        worker.finish(run)


#### DATA


def write_data(suite: Suite, programs: Programs) -> None:
    """Make the suite's directory, with the prompts and, for a base, its texts."""
    runner.prepare(suite)
    if suite.judge is not None:
        write_prompts(suite, programs)
    if suite.base:
        write_texts(suite, **suite.base)


def write_prompts(suite: Suite, programs: Programs) -> None:
    """Write the prompts of the comparison and those of tuning: two parts of one shuffle of the test split."""
    paths = [os.path.join(suite.out, name) for name in ("prompts.jsonl", "prompts_tuning.jsonl")]
    if all(map(os.path.isfile, paths)):
        return
    with initialize_config_dir(os.path.join(PROJECT, "config"), version_base="1.3"):
        config = compose("config", [*next(iter(suite.sizes.values())), *suite.words, "seed=0"])
    n = suite.n_samples + suite.n_tuning_samples
    prompts = programs.dataloaders.read_prompts(config, loading.load_tokenizer(config), None, n)
    if len(prompts) < n:
        raise UserError(f"n_samples + n_tuning_samples = {n}: the test split has {len(prompts)} prompts; use fewer")
    rows = [{"prompt": prompt.messages or prompt.text, "chosen": prompt.chosen} for prompt in prompts]
    for path, part in zip(paths, (rows[: suite.n_samples], rows[suite.n_samples :]), strict=True):
        write_lines(path, part)


def write_texts(suite: Suite, prompts: int, **_) -> None:
    """Write the texts of the base: questions of the embedded data, each with one of its responses, good or bad."""
    path = plan.texts_of(suite)
    if not os.path.isfile(path):
        rng, n_seeds = random.Random("suite/base"), math.ceil(prompts / demo.N_PROMPTS["train"])
        items = [item for seed in range(1, n_seeds + 1) for item in demo.generate("train", seed)][:prompts]
        write_lines(path, [{"prompt": item["prompt"], "completion": rng.choice(item["responses"])} for item in items])


def write_lines(path: str, rows: list[dict]) -> None:
    with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
