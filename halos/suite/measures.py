"""Measure a finished run: one number per prompt, in scores.json.

right: 1 where the truth says that the sampled response is right; win: compare.py's score against the response that
people preferred; length: characters of the response. chosen, rejected: how the log-probs of held-out pairs have moved
since the start of the stage, in nats; if the chosen ones have fallen, that is likelihood displacement. order: 1 where
the chosen response has the higher implied reward, which is that movement.
"""

import csv
import importlib
import json
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from halos import checkpoint, loading, reference_cache, saved_config
from halos.project_dir import PROJECT
from halos.suite import plan
from halos.suite.plan import Run
from halos.suite.settings import Suite

PAIRS_SEED = 0  # of the held-out pairs, the same for all runs


def write(suite: Suite, run: Run, trainers: ModuleType, dataloaders: ModuleType) -> None:
    """Measure a run that is trained, sampled and judged, and write its scores.json."""
    scores: dict[str, Any] = {"size": run.size, "row": run.row, "seed": run.seed, "words": run.words}
    scores |= {"budget": budget(suite, run)}
    if suite.judge is not None:
        scores |= of_samples(suite, run)
    if run.row != plan.BASE:
        scores |= of_pairs(suite, run, trainers, dataloaders)
    plan.write_json(plan.file_of(suite, run, "scores.json"), scores)


def of_samples(suite: Suite, run: Run) -> dict[str, list]:
    """right, win and length, one per prompt in the order of the prompts."""
    with open(plan.file_of(suite, run, "samples.json"), encoding="utf-8") as file:
        rows = json.load(file)
    with open(plan.file_of(suite, run, "verdicts.csv"), encoding="utf-8") as file:
        verdicts = {int(line["row"]): line["preference_candidate"] for line in csv.DictReader(file)}
    wins = [float(verdicts.get(number) or "nan") for number in range(1, len(rows) + 1)]
    found: dict[str, list] = {"win": wins, "length": [len(row["policy"].strip()) for row in rows]}
    return found | ({"right": rights(suite.truth, rows)} if suite.truth else {})


def rights(truth: str, rows: list[dict]) -> list[float]:
    """1.0 for each sample that the function `truth` (module:name) gives at least 1, else 0.0."""
    module, _, name = truth.partition(":")
    score = getattr(importlib.import_module(module), name)
    return [float(score(row["prompt"], row["policy"]) >= 1) for row in rows]


@torch.no_grad()
def of_pairs(suite: Suite, run: Run, trainers: ModuleType, dataloaders: ModuleType) -> dict[str, list[float]]:
    """chosen, rejected and order: means over the held-out pairs of each prompt, since these are not independent."""
    config = config_for_pairs(suite, run)
    tokenizer = loading.load_tokenizer(config)
    loader = dataloaders.make_loader(config, tokenizer, "test")
    directory = os.path.join(suite.out, run.name)
    policy_pt = os.path.join(checkpoint.newest_whole(directory), checkpoint.POLICY)
    policy, reference, cache = reference_cache.load(config, tokenizer, [loader], policy_pt)
    trainer = trainers.DPOTrainer(policy.eval(), reference, tokenizer, config, None, loader, directory)
    trainer.reference_cache = cache
    batches = list(loader)
    outcomes = [trainer.batch_loss(trainer.forward(examples)[1]) for examples in batches]
    chosen, rejected = (
        torch.cat([getattr(outcome, f"{role}_rewards") for outcome in outcomes]).cpu().numpy()
        for role in ("chosen", "rejected")
    )
    order = np.where(chosen == rejected, 0.5, chosen > rejected)
    prompts = [bytes(example.prompt) for examples in batches for example in examples]
    columns = {"chosen": chosen, "rejected": rejected, "order": order}
    return {name: means(values, prompts) for name, values in columns.items()}


def means(values: np.ndarray, prompts: list[bytes]) -> list[float]:
    """Return the mean of the values of each prompt, in the order of the prompts' first values."""
    by_prompt: dict[bytes, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(float(value))
    return [float(np.mean(one)) for one in by_prompt.values()]


def config_for_pairs(suite: Suite, run: Run) -> DictConfig:
    """Return the run's config with DPO's loss at beta = 1, whose rewards are log-ratios, and the suite's pairs."""
    config = saved_config.read(os.path.join(suite.out, run.name, "config.yaml"))
    with initialize_config_dir(os.path.join(PROJECT, "config"), version_base="1.3"):
        config.loss = compose("config", ["loss=dpo", "loss.beta=1.0"]).loss
    config.seed, config.n_eval_examples, config.cache_dir = PAIRS_SEED, suite.n_pairs, suite.out
    return config


def budget(suite: Suite, run: Run) -> dict[str, float]:
    """Return what the stage was trained on: updates, responses, and the size of its training data in tokens."""
    with open(plan.file_of(suite, run, "metrics.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(plan.file_of(suite, run, "data.json"), encoding="utf-8") as file:
        data = json.load(file)["train"]["loader"]
    last = max((row for row in rows if row["mode"] == "train"), key=lambda row: row["step"])
    return {"updates": last["step"], "examples": last["examples"], "epoch": data["rows"], "tokens": data["tokens"]}
