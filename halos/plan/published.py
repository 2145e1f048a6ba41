"""Architectures of the models in config/model/, so that a plan needs no download."""

from typing import Any

from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig
from transformers import AutoConfig, PreTrainedConfig

from halos import loading


def _published(model_type: str, vocab: int, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": False,
    }


# From the config.json of each model on the hub.
PUBLISHED = {
    "EleutherAI/pythia-1.4b": _published("gpt_neox", 50304, 2048, 24, 16, 8192),
    "EleutherAI/pythia-2.8b": _published("gpt_neox", 50304, 2560, 32, 32, 10240),
    "EleutherAI/pythia-6.9b": _published("gpt_neox", 50432, 4096, 32, 32, 16384),
    "EleutherAI/pythia-12b": _published("gpt_neox", 50688, 5120, 36, 40, 20480),
    "huggyllama/llama-7b": _published("llama", 32000, 4096, 32, 32, 11008),
    "huggyllama/llama-13b": _published("llama", 32000, 5120, 40, 40, 13824),
    "huggyllama/llama-30b": _published("llama", 32000, 6656, 60, 52, 17920),
    "huggyllama/llama-65b": _published("llama", 32000, 8192, 80, 64, 22016),
}


def architecture(config: DictConfig) -> tuple[PreTrainedConfig, str]:
    """The architecture of the policy, and where it was found.

    A published model that is not in the local cache is taken from the table above: a request to the hub fails only
    after 20 s where there is no network.
    """
    name, load_from = config.model.name_or_path, config.model.load_from
    if load_from and not load_from.endswith(".pt"):
        return loading.load_config(config), f"config.json of {load_from}"
    if name in PUBLISHED and try_to_load_from_cache(name, "config.json") is None:
        return AutoConfig.for_model(**PUBLISHED[name]), f"built-in facts about {name}"
    return loading.load_config(config), f"config.json of {name}" if name else "model.architecture"
