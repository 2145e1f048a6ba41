"""The names of the configuration: which keys there are, by the YAML files under config/, and which ones a config has.

`halos/config.py` checks the values. Change this file to change which keys may be added.
"""

import functools
import os
from collections.abc import Iterable
from contextlib import nullcontext
from difflib import get_close_matches
from glob import glob
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from halos import dataset_specs
from halos.errors import UserError, first_line
from halos.project_dir import PROJECT

CONFIG_DIR = os.path.join(PROJECT, "config")
# Dictionaries that may have keys which are not in the YAML files. The functions _check_* of config.py check these keys.
OPEN = ("dataset_paths.", "optimizer_kwargs.", "model.architecture.")
# Keys that every loss has, even if its YAML does not contain them.
OPTIONAL: dict[str, Any] = dict.fromkeys(
    ("loss.average_log_prob", "loss.use_value_head", "loss.use_reward_head"), False
)
LONGEST = 200  # characters of a value that a message shows


#### THE KEYS OF A CONFIG


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return every key by its full name, including dictionaries: {'wandb': {...}, 'wandb.entity': None, ...}.

    Interpolations are not resolved.
    """
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    keys = {}
    for name, value in node.items():
        keys[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            keys |= flat(value, f"{prefix}{name}.")
    return keys


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return the flat config with its interpolations resolved.

    Raises UserError if a ??? remains, or if an interpolation refers to a missing key.
    """
    raw = flat(config)
    for key in raw:
        if raw[key] == "???":
            raise UserError(f"{key}=??? has no default; add {key}=VALUE to the command, or set it in its YAML file")
    try:
        return flat(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "the config"
        setting = f"{key}={shown(raw[key])}" if key in raw else key
        raise UserError(
            f"{setting}: {first_line(error)}; name an existing key in full, such as ${{model.name}}"
        ) from None


def command_words() -> list[str]:
    """Return the key=value words of this job's command, as the user typed them."""
    return cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


#### THE KEYS OF THE YAML FILES


def as_written() -> DictConfig | None:
    """Return the config of the YAML files alone, without the user's values; None outside a Hydra run."""
    if not (HydraConfig.initialized() and GlobalHydra.instance().is_initialized()):
        return None
    settings = HydraConfig.get()
    choices = settings.runtime.choices
    groups = [word for word in command_words() if word.lstrip("+~").partition("=")[0] in choices]
    loader = GlobalHydra.instance().config_loader()
    written = loader.load_configuration(settings.job.config_name, groups, run_mode=RunMode.RUN)
    with open_dict(written):
        del written["hydra"]
    return written


def written_for(config: DictConfig) -> DictConfig:
    """Return the config of the YAML files for the loss and the model of a saved config.

    The keys of a loss, a model or a dataset that has no file here any more are those that the saved config has.
    """
    raw = flat(config)
    loss, model = (_file_of(group, raw.get(f"{group}.name")) for group in ("loss", "model"))
    written = _composed(loss or "sft", model or "base_model").copy()
    datasets = raw.get("dataset")
    with open_dict(written):
        if not loss and isinstance(raw.get("loss"), dict):
            written.loss = raw["loss"]
        for name in datasets if isinstance(datasets, dict) else ():
            if name not in written.dataset:
                written.dataset[name] = dataset_specs.base_spec()
    return written


def _file_of(group: str, name: Any) -> str | None:
    names = [os.path.basename(path)[: -len(".yaml")] for path in glob(os.path.join(CONFIG_DIR, group, "*.yaml"))]
    return name if name in names else None


@functools.cache
def _composed(loss: str, model: str) -> DictConfig:
    is_in_hydra = GlobalHydra.instance().is_initialized()  # in train.py, and not in eval.py
    with nullcontext() if is_in_hydra else initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("config", [f"loss={loss}", f"model={model}"])


def is_open(key: str) -> bool:
    """Return True for a key whose dictionary may have keys that are not in the YAML files."""
    return key.startswith(OPEN) or dataset_specs.is_open(key)


#### CHECKS


def check_names(given: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse keys that are not in `known`."""
    known = OPTIONAL | known
    for key, value in given.items():
        if key not in known and not is_open(key) and not (isinstance(value, dict) and value):  # its own keys come later
            raise UserError(unknown_key(key, shown(value), known))


def check_complete(given: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse a config that lacks one of the known keys."""
    for key in known:
        if key not in given and key not in OPTIONAL and not is_open(key):
            raise UserError(f"{key} was removed from the config, and every run needs it; give it a value instead")


def unknown_key(key: str, value: str, known: Iterable[str]) -> str:
    """Return the message about an unknown key. Suggest the same name elsewhere first, then a similar name."""
    parent, _, tail = key.rpartition(".")
    tails = {k: k.rpartition(".")[2] for k in known}
    siblings = [tails[k] for k in tails if k == f"{parent}.{tails[k]}"]
    similar = get_close_matches(tail, siblings, n=1) or get_close_matches(tail, tails.values(), n=1)
    near = [k for k in tails if tails[k] in ([tail] if tail in tails.values() else similar)]
    near.sort(key=lambda k: not k.startswith(f"{parent}."))
    if near:
        remedy = f"did you mean {near[0]}?"
    else:
        remedy = f"{parent} has {', '.join(siblings)}" if siblings else "`python train.py --cfg job` shows the keys"
    return f"{short(key)}={value}: there is no key {short(key)}; {remedy}"


def shown(value: Any) -> str:
    """Return a value as one types it on the command line; a long one is cut."""
    return short(_typed(value))


def short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_typed(v)}' for name, v in value.items())}}}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{float(value):g}" if abs(value) < 10**300 else "a number of more than 300 digits"
    return str(value)
