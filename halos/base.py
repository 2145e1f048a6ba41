"""The base model of a run: where its files are, its tokenizer, its config, and its generation settings.

`model.name_or_path` names it, a hub name or a directory; `model.load_from` may replace it. If both are null, the config
is `model.architecture`. `halos/loading.py` loads the weights. Everything that is wrong with a file of the base ends in
a one-line UserError: `reading` makes it.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from halos import chat, checkpoint, reward_model
from halos.errors import UserError
from halos.project_dir import PROJECT

MOST_LAYERS = 10_000  # building more blocks than this would take hours

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


#### WHERE THE FILES ARE


def source(config: DictConfig, use_load_from: bool) -> str | None:
    """Return the hub name or directory of the architecture; None means `model.architecture`."""
    return config.model.load_from if _is_hf_source(config, use_load_from) else config.model.name_or_path


def source_key(config: DictConfig, use_load_from: bool) -> str:
    return "model.load_from" if _is_hf_source(config, use_load_from) else "model.name_or_path"


def _is_hf_source(config: DictConfig, use_load_from: bool) -> bool:
    return bool(use_load_from and config.model.load_from and not config.model.load_from.endswith(".pt"))


def load_from_pt(config: DictConfig) -> str | None:
    """Return the path of `model.load_from` if it is a policy.pt, absolute or relative to cache_dir; else None."""
    path = config.model.load_from
    return os.path.join(config.cache_dir, path) if path and path.endswith(".pt") else None


def local(name: str) -> str:
    """Resolve a path that comes with the project, so that it works from every working directory."""
    inside = os.path.join(PROJECT, name)
    return inside if not os.path.exists(name) and os.path.isdir(inside) else name


@contextmanager
def reading(key: str, name: str) -> Iterator[None]:
    """Turn the many errors of a failed download, a wrong name or a damaged file into a one-line UserError.

    transformers raises errors of every kind when a file has an unexpected value, so all of them are caught here.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if pointer := _git_lfs_pointer(name):
            reason = f"{pointer} is a pointer of git-lfs, not the file itself; run `git lfs pull` there"
        else:
            reason = _in_one_line(error)
        if os.path.isdir(local(name)):
            remedy = "its files are damaged or do not belong together, so copy or download all of them again"
        else:
            remedy = f"give a hub name that this machine can reach, or a local directory with {key}=DIR"
        raise UserError(f"{key}={name} cannot be loaded ({reason}); {remedy}") from error


@contextmanager
def building(config: DictConfig, use_load_from: bool = True) -> Iterator[None]:
    """Do the same where a model is built as the base's config.json, or `model.architecture`, describes it."""
    name = source(config, use_load_from)
    if name is not None:
        with reading(source_key(config, use_load_from), name):
            yield
        return
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"model.architecture describes no model ({_in_one_line(error)}); correct its fields") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of torch and transformers while a file is only looked at. Loading has its own."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _git_lfs_pointer(name: str) -> str | None:
    """Return the name of a file in a local directory that git has cloned without git-lfs; None if there is none."""
    directory = local(name)
    for file in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
        with suppress(OSError), open(os.path.join(directory, file), "rb") as opened:
            if opened.read(23) == b"version https://git-lfs":
                return file
    return None


#### THE TOKENIZER


def load_tokenizer(config: DictConfig):
    """Load the tokenizer. It must have an end-of-text token, which is also used for padding if it has no pad token.

    Its chat template renders a short conversation, so that a broken one is found here. A reward model pads with a token
    that ends no response.
    """
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    with reading("model.tokenizer_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(local(name), trust_remote_code=config.trust_remote_code)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        len(tokenizer)
    if eos is None:
        raise UserError(
            f"the tokenizer {name} has no end-of-text token, so that no response could end; "
            "set model.tokenizer_name_or_path to one that has"
        )
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    _set_template(tokenizer, config.get("chat_template", "auto"))
    with reading("model.tokenizer_name_or_path", name):
        chat.stop_token_ids(tokenizer)
    if config.loss.get("use_reward_head", False):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(reward_model.pad_token_id(tokenizer))
    return tokenizer


def _set_template(tokenizer, choice: str) -> None:
    """Give the tokenizer the configured chat template. choice: auto (its own, if it has one), none, or a file"""
    if choice == "none":
        tokenizer.chat_template = None
    elif choice != "auto":
        tokenizer.chat_template = _template_in(choice)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        if "default" not in tokenizer.chat_template:
            raise UserError(
                f"the tokenizer has the chat templates {', '.join(sorted(tokenizer.chat_template))}, and none of them "
                "is called default; write the one to use into a file and give chat_template=FILE, or chat_template=none"
            )
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if not isinstance(tokenizer.chat_template, str | None):
        raise UserError(
            "the tokenizer has a chat template that is no text; give chat_template=FILE or chat_template=none"
        )


def _template_in(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = _in_one_line(error)
        raise UserError(f"chat_template={path} cannot be read ({reason}); give a file of UTF-8 text") from None


#### THE CONFIG


def load_config(config: DictConfig, use_load_from: bool = True) -> PreTrainedConfig:
    """Load the architecture, with all dropout set to 0."""
    name = source(config, use_load_from)
    with building(config, use_load_from), quiet():
        if name is None:
            architecture: Any = OmegaConf.to_container(config.model.architecture)
            lm_config = AutoConfig.for_model(**architecture)
        else:
            lm_config = AutoConfig.from_pretrained(local(name), trust_remote_code=config.trust_remote_code)
        _check_sizes(lm_config.get_text_config())
        _disable_dropout(lm_config)
    return lm_config


def _check_sizes(text_config: PreTrainedConfig) -> None:
    """Raise ValueError for sizes with which a model can be built, in principle, but cannot run."""
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    layers, heads, groups = (getattr(text_config, name, None) or 1 for name in names)
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}")
    if isinstance(groups, int) and heads % groups:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")


def _disable_dropout(lm_config: PreTrainedConfig) -> None:
    for config in (lm_config, lm_config.get_text_config()):
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                setattr(config, key, 0.0)


def meta_lm(config: DictConfig, use_load_from: bool = True) -> PreTrainedModel:
    """Build the causal LM on the meta device: its names and shapes, without weights."""
    lm_config = load_config(config, use_load_from)
    with building(config, use_load_from), quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(lm_config, trust_remote_code=config.trust_remote_code)


def generation_settings(config: DictConfig, own: GenerationConfig) -> GenerationConfig:
    """Return the base's generation settings for the export: of generation_config.json, or of config.json as of old.

    own: those of the model, for random weights
    """
    name, settings = source(config, use_load_from=True), own
    if name:
        with reading(source_key(config, use_load_from=True), name):
            try:
                settings = GenerationConfig.from_pretrained(local(name))
            except OSError:  # transformers does the same, with the same private argument
                old: Any = {"config_file_name": "config.json", "_from_model_config": True}
                settings = GenerationConfig.from_pretrained(local(name), **old)
    return checkpoint.say_that_it_samples(settings)
