"""Trainers as train.py builds them, on a model of two small layers and hand-made batches, and comparisons of runs."""

import json
import os
from functools import cache
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

import dataloaders
import trainers
from halos import checkpoint, components, loading, run_dir
from halos.loader import DataLoader
from halos.loss_card.batches import loader_over
from helpers import CONFIG_DIR, PROJECT, make_config, random_examples

CPU = torch.device("cpu")

# Two small layers, and SGD, whose step is the gradient times lr.
SMALL = (
    "model=tiny",
    "model.architecture.hidden_size=32",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.intermediate_size=48",
    "++model.architecture.num_key_value_heads=2",
    "++model.architecture.initializer_range=0.1",
    "optimizer=SGD",
    "lr=0.01",
    "warmup_steps=0",
    "do_first_eval=false",
    "keep_checkpoints=0",
    "exp_name=run",
    "minimum_log_interval_secs=1000",
    "model.batch_size=8",
    "eval_every=8",
)


class Batches:
    """A loader that yields given batches."""

    def __init__(self, batches):
        self.batches = batches
        self.total_examples = sum(map(len, batches))
        self.examples_seen = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.examples_seen += len(batch)
            yield batch

    fingerprint = ""

    def restart(self):
        self.examples_seen = 0

    def state_dict(self):
        return {"examples_seen": self.examples_seen}

    def load_state_dict(self, state):
        self.examples_seen = state["examples_seen"]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(os.path.join(PROJECT, "assets", "tiny_tokenizer"))


def losses() -> list[str]:
    """Return the names of the files in config/loss. Tests of all of them test a new loss, too."""
    return sorted(os.path.splitext(name)[0] for name in os.listdir(os.path.join(CONFIG_DIR, "loss")))


# Losses for runs that are slower than a step or two: a format of data, a reference model and a critic each.
FEW = ("sft", "dpo", "slic", "kto", "ppo")


def one_per_loader() -> list[str]:
    """Return a loss for each loader, with and without a reference model: for tests of what no loss can change."""
    found: dict[tuple, str] = {}
    for name in [*FEW, *losses()]:
        loss = make_config("", f"loss={name}").loss
        found.setdefault((loss.dataloader, loss.use_reference_model), name)
    return list(found.values())


def data_format(loss: str) -> str:
    """Return the data format of a loss's trainer: sft, unpaired or paired."""
    return components.find(trainers, make_config("", f"loss={loss}").loss.trainer).data_format


def loader_for(loss: str, n_examples: int, seed: int = 0, **settings) -> DataLoader:
    """Make the loss's own loader over pairs of random tokens, each with the scores 1 and 0."""
    keys = make_config("", f"loss={loss}").loss
    loader_class = components.find(dataloaders, keys.dataloader)
    pairs = [one._replace(scores=(1.0, 0.0)) for one in random_examples(n_examples, (2,), seed)]
    settings = {"max_length": 100, "max_prompt_length": 50, "seed": seed} | settings
    settings |= {key: keys[key] for key in loader_class.loss_keys}
    return loader_over(loader_class, pairs, tokenizer(), **settings)


def batches_for(loss: str, n_batches: int = 3, n: int = 8, seed: int = 0) -> list:
    """Return batches of the loss's own loader over pairs of random tokens."""
    return list(islice(loader_for(loss, n_batches * n, seed, batch_size=n), n_batches))


def make_trainer(folder, loss: str, *words: str, batches=None, eval_batches=None, train_loader=None):
    """Build a trainer as train.py does, with the run directory folder/run. With resume=true, the directory stays."""
    config = make_config(folder, f"loss={loss}", *SMALL, *words)
    directory = run_dir.path_of(config) if config.resume else run_dir.create(config)
    policy, reference = loading.load_policy_and_reference(config, tokenizer(), CPU)
    batches = batches if batches is not None else batches_for(loss)
    loaders = train_loader or Batches(batches), Batches(eval_batches if eval_batches is not None else batches[:1])
    trainer_class = components.find(trainers, config.loss.trainer)
    return trainer_class(policy, reference, tokenizer(), config, *loaders, directory)


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Copy the policy's weights, gathered from all ranks."""
    state = checkpoint.full_state(trainer.policy.lm, torch.float32)
    return {name: tensor.clone() for name, tensor in state.items()}


def moved(before: dict, after: dict) -> torch.Tensor:
    """Return after - before, all weights as one vector, in float64."""
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])


def trained(folder, loss: str, *words: str, batches=None) -> tuple[torch.Tensor, list[dict]]:
    """Train on all batches; return how far the weights moved, and the training lines of metrics.jsonl."""
    trainer = make_trainer(folder, loss, *words, batches=batches)
    trainer.log_evaluation = trainer.save = lambda: None
    before = state_of(trainer)
    trainer.train()
    return moved(before, state_of(trainer)), rows_of(trainer)


def rows_of(trainer, mode: str = "train") -> list[dict]:
    with open(os.path.join(trainer.run_dir, "metrics.jsonl")) as file:
        return [row for row in map(json.loads, file) if row["mode"] == mode]


def assert_same_training(one, other, tolerance=1e-5, losses=True) -> None:
    """Compare two results of `trained`: the weights' movement relative to its norm, and the logged numbers."""
    (way, rows), (other_way, other_rows) = one, other
    assert other_way.norm() > 1e-3
    assert (way - other_way).norm() <= tolerance * other_way.norm()
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        keys = {"loss/train", "grad_norm", "logps_train/chosen", "rewards_train/chosen"} if losses else set()
        for key in keys & {*row, *other_row}:  # a reward model has no log-probs
            assert row[key] == pytest.approx(other_row[key], rel=1e-4, abs=1e-5)
