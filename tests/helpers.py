"""Small models, seeded examples, and configs, shared by several test files."""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from halos import dataset_specs, loading  # noqa: F401  dataset_specs registers config/dataset with Hydra
from halos.models import PolicyModel
from halos.tokens import Role, TokenizedExample

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG_DIR = os.path.join(PROJECT, "config")

# Words of train.py for one block of the tiny model and few examples.
ONE_BLOCK = [
    "model.architecture.num_hidden_layers=1",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=2",
    "model.batch_size=8",
    "model.eval_batch_size=8",
    "model.max_length=96",
    "model.max_prompt_length=80",
    "eval_every=16",
    "n_eval_examples=8",
    "warmup_steps=0",
]

VOCAB = 97  # of the models below, and of `random_examples`

_LIKE_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_LIKE_LLAMA, "num_key_value_heads": 2}  # two query heads read one key/value head
_WINDOWED = {**_GROUPED, "sliding_window": 6}  # shorter than the sequences

# Architectures for which packing must work.
ARCHITECTURES = {
    "llama": _GROUPED,
    "gpt_neox": _LIKE_LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": _WINDOWED,
    "gemma2": {
        **_WINDOWED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "cohere": {**_GROUPED, "logit_scale": 0.5},  # multiplies its logits
    "cohere2": {**_WINDOWED, "logit_scale": 0.5, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {**_GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.4},  # divides its logits
}


def clone(folder: Path) -> Path:
    """Copy the project to `folder`, without the files that git ignores."""
    ignored = shutil.ignore_patterns(".venv", ".git", ".cache", "demo", "samples", "site", "__pycache__", ".*_cache")
    shutil.copytree(PROJECT, folder, ignore=ignored, dirs_exist_ok=True)
    return folder


def tiny_lm(model_type: str, seed: int = 0, **fields):
    """Make a causal LM with random weights, without dropout, in training mode, with the project's own loading.

    Weights are large, and biases and norms are moved from their neutral starting values, so that any error in a forward
    pass shows up in the log-probs.
    """
    architecture = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **ARCHITECTURES.get(model_type, {}),
        **fields,
    }
    settings = {"architecture": architecture, "load_from": None, "name_or_path": None, "max_length": 128}
    config = OmegaConf.create({"seed": seed, "trust_remote_code": False, "cache_dir": "", "model": settings})
    lm = loading.load_lm(config, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lm.train()


def tiny_policy(model_type: str, packs: bool = False, seed: int = 0, **fields) -> PolicyModel:
    policy = PolicyModel(tiny_lm(model_type, seed, **fields))
    policy.use_packing(packs)
    return policy.train()


def example(prompt: list[int], *responses: list[int], chosen: tuple[bool | None, ...] = ()) -> TokenizedExample:
    """Make a TokenizedExample from lists. By default the first response is chosen, and the others are rejected.

    chosen: one per response; None for an unrelated one
    """
    chosen = chosen or tuple(index == 0 for index in range(len(responses)))
    arrays = [np.array(ids, np.int32) for ids in (prompt, *responses)]
    return TokenizedExample(arrays[0], tuple(arrays[1:]), roles(*chosen))


def roles(*chosen: bool | None) -> tuple[Role, ...]:
    """Translate flags into roles: True is chosen, False is rejected, None is unrelated."""
    return tuple({True: Role.CHOSEN, False: Role.REJECTED, None: Role.UNRELATED}[flag] for flag in chosen)


def judged(one: TokenizedExample, chosen: bool) -> TokenizedExample:
    """Return the example with its first response chosen or rejected."""
    return one._replace(roles=(*roles(chosen), *one.roles[1:]))


def random_examples(n: int, n_responses: tuple[int, ...] = (2,), seed: int = 0) -> list[TokenizedExample]:
    """Make examples of ragged lengths: prompts of 3 to 12 tokens, responses of 1 to 14 tokens.

    n_responses: numbers of responses, taken in turn: (2, 1) gives 2, 1, 2, 1, ... responses
    """
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()

    return [example(ids(3, 13), *(ids(1, 15) for _ in range(n_responses[i % len(n_responses)]))) for i in range(n)]


@functools.cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("config", list(words))


@functools.cache
def _loss(name: str) -> DictConfig:
    return OmegaConf.load(os.path.join(CONFIG_DIR, "loss", f"{name}.yaml"))


def make_config(cache_dir: Path | str, *words: str) -> DictConfig:
    """Return the config of `python train.py cache_dir=... words`, without validating it.

    Composing takes a tenth of a second. So the losses share a composed config, unless words change one of their keys.
    """
    names = [word.removeprefix("loss=") for word in words if word.startswith("loss=")]
    shares = names and not any(word.lstrip("+~").startswith("loss.") for word in words)
    others = tuple(word for word in words if not word.startswith("loss="))
    config = _composed(others if shares else words).copy()
    if shares:
        config.loss = _loss(names[-1]).copy()
    config.cache_dir = str(cache_dir)
    return config
