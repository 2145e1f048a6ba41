"""Conditional SFT: both kinds of responses behind control texts, and samples behind the text of desirable ones."""

from argparse import Namespace

import numpy as np
import pytest
import torch

import eval as eval_program
from dataloaders import ConditionalSFTDataLoader
from halos import demo, samplers
from halos.engine import Batch, Forward
from halos.errors import UserError
from halos.examples import Example
from halos.loader import DataLoader
from halos.tokens import Encoder
from helpers import example, make_config, tiny_policy
from losses.sft import ConditionalSFTTrainer
from small_runs import loader_for, tokenizer
from test_loaders import character_tokenizer, shown
from test_losses import bare, close, loss_of, vector

CONTROLS = {"chosen_control": "gg", "rejected_control": "b"}
PAIR = Example("abcdefgh:", [" yes", " no"], pairs=[(0, 1)], truncation_mode="keep_start")


@pytest.fixture
def loader(tmp_path):
    """Make a loader over the pair with the character tokenizer: loader(**settings)."""

    def loader(**settings) -> DataLoader:
        lengths = {"max_length": 100, "max_prompt_length": 50}
        settings = {"batch_size": 4, "cache_dir": str(tmp_path)} | lengths | CONTROLS | settings
        return ConditionalSFTDataLoader([PAIR], character_tokenizer(), **settings)

    return loader


def test_the_control_text_stands_before_the_response_and_is_not_trained_on(loader):
    data = loader()
    (batch,) = data
    assert shown(batch) == [("abcdefgh:", ["gg yes|"], (True,)), ("abcdefgh:", ["b no|"], (False,))]
    assert [mask.tolist() for one in batch for mask in one.masks] == [2 * [False] + 5 * [True], [False] + 4 * [True]]
    assert data.counts()["tokens"] == sum(len(one.prompt) + len(one.responses[0]) for one in batch)


def test_truncation_leaves_the_control_text(loader):
    """Of 12 tokens, 5 are prompt and 2 or 1 control text, also where the end of a prompt is what is cut."""
    data = loader(max_length=12, max_prompt_length=5)
    assert shown(next(iter(data))) == [("abcde", ["gg yes|"], (True,)), ("abcde", ["b no|"], (False,))]
    data = loader(max_length=8, max_prompt_length=5)
    assert shown(next(iter(data))) == [("abcde", ["gg "], (True,)), ("abcde", ["b n"], (False,))]
    assert (data.counts()["truncated_prompts"], data.counts()["truncated_responses"]) == (2, 2)


def test_a_control_text_that_leaves_no_room_is_refused(loader):
    with pytest.raises(UserError, match=r"loss.chosen_control='gg' has 2 tokens, .* use model.max_prompt_length=5 or"):
        loader(max_length=8, max_prompt_length=6)


def test_the_loss_by_hand():
    """Each response costs its negative log-likelihood, whatever its kind."""
    chosen, rejected = vector(-3, -5, grad=True), vector(-2, grad=True)
    losses, *rewards = loss_of(ConditionalSFTTrainer)(chosen, rejected, None, None)
    losses.sum().backward()
    close(losses, (3, 5, 2))
    close(torch.cat([chosen.grad, rejected.grad]), (-1, -1, -1))
    assert torch.equal(rewards[0], chosen) and torch.equal(rewards[1], rejected)


def test_responses_are_given_prompt_and_control_text():
    """The log-probs are those of a plain example whose prompt ends with the control text."""
    policy = tiny_policy("llama", packs=True, vocab_size=512)
    data = loader_for("csft", 3, batch_size=6)
    batch = [one._replace(prompt=one.prompt.astype(np.int32)) for one in next(iter(data))]
    plain = [
        example(
            [*one.prompt, *data.control[one.roles[0]]],
            one.responses[0][len(data.control[one.roles[0]]) :].tolist(),
            chosen=(one.roles[0] == "chosen",),
        )
        for one in batch
    ]
    with torch.no_grad():
        ours, expected = (Batch(some, Forward(policy, some, 1000).tokens, None) for some in (batch, plain))
        close(ours.policy.logps, expected.policy.logps, rtol=1e-5, atol=1e-5)
        losses = bare(ConditionalSFTTrainer, **CONTROLS).batch_loss(ours).losses
    close(losses.sum(), -expected.policy.logps.sum())


def test_eval_py_samples_the_policy_behind_the_text_of_desirable_responses(tmp_path, monkeypatch):
    """The reference model has seen no control text, so its prompts have none. A long prompt is cut before the text."""
    prompts = {}

    class Recorder:
        def __init__(self, config, encoder, name, **weights):
            self.name = name

        def keys(self, prompt_ids):
            prompts[self.name] = prompt_ids
            return [f"{self.name} {index}" for index in range(len(prompt_ids))]

        def sample(self, prompt_ids, done, record):
            return ["text"] * len(prompt_ids)

    monkeypatch.setattr(samplers, "Sampler", Recorder)
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 30, "test": 30})
    config = make_config(tmp_path, "loss=csft", "model.max_prompt_length=12", "loss.chosen_control=Good:")
    flags = {
        "sample_reference": True,
        "hub_reference": True,
        "format": "rows",
        "output": str(tmp_path / "samples.json"),
    }
    args = Namespace(file=None, n_samples=4, n_per_prompt=2, best_of=None, **flags)
    eval_program.sample(args, config, "LATEST/policy.pt")
    text = Encoder(tokenizer()).continuation("Good:").tolist()
    assert len(prompts["reference"]) == 8 and max(map(len, prompts["reference"])) == 12
    for policy, reference in zip(prompts["policy"], prompts["reference"], strict=True):
        assert policy.tolist() == reference.tolist() + text
