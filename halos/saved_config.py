"""The config.yaml of a run: read, given the defaults of newer keys, and changed by key=value words.

The file may have been cut, edited, or written by an earlier version. `halos/config.py` checks the values.
"""

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from halos.config import check_value
from halos.config_keys import check_names, flat, is_open, resolved, short, shown, written_for
from halos.errors import UserError, first_line

LARGEST = 2**20  # bytes of a config.yaml; those of runs have some ten thousand
DEEPEST = 30  # levels of nesting
# Keys that every version has written. A config without one of them is damaged; other missing keys are newer.
ALWAYS = (
    "seed exp_name mode cache_dir datasets n_epochs n_examples lr optimizer optimizer_kwargs lr_scheduler warmup_steps "
    "eval_every n_eval_examples do_first_eval n_samples top_p temperature samples_dir wandb trust_remote_code "
    "loss.name loss.trainer loss.dataloader loss.use_reference_model "
    "model.name model.name_or_path model.tokenizer_name_or_path model.architecture model.load_from model.batch_size "
    "model.gradient_accumulation_steps model.eval_batch_size model.policy_dtype model.max_length "
    "model.max_prompt_length model.packing model.logps"
).split()

ALWAYS_OF_DATASET = "source splits form columns prompt_as pairs margin keep weight reader".split()


def read(path: str) -> DictConfig:
    """Return the config of a run. Keys that are newer than the run get their defaults, which are printed."""
    config = read_yaml(path)
    raw = flat(config) if isinstance(config, DictConfig) else {}
    if not all(isinstance(raw.get(section), dict) for section in ("loss", "model")):
        raise UserError(f"{path} is not a run's config; give the config.yaml that train.py wrote")
    try:
        resolved(config)
        add_new_keys(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_yaml(path: str) -> Any:
    """Return what a YAML file holds, as OmegaConf reads it. Everything that is wrong with the file is a UserError."""
    try:
        if os.path.getsize(path) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if not text.endswith("\n"):
            raise ValueError("it is cut: its last line has no end")
        _check_structure(text)
        return OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); copy it again, or give another one") from None


def _check_structure(text: str) -> None:
    """Raise ValueError for a file that holds one value alone, and for what makes a small file huge in memory: aliases,
    and deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise ValueError(f"it holds one value alone: {short(event.value)!r}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: an alias *{event.anchor}, which no run writes")
        if depth > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1}: more than {DEEPEST} levels of nesting")


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: {error.reason} at byte {error.start}"
    return getattr(error, "strerror", None) or short(first_line(error))


def add_new_keys(config: DictConfig) -> None:
    """Give the config of an earlier run the defaults of keys that are newer than the run, and name them."""
    given, known, new = flat(config), flat(written_for(config)), []
    check_names(given, known)
    for key in _always(given, known):
        if key not in given:
            raise UserError(f"{key} is missing, which every run has; the file is cut or changed, so copy it again")
    for key, default in known.items():
        parent = key.rpartition(".")[0]
        if key in given or is_open(key) or (parent and not isinstance(given.get(parent), dict)):
            continue  # what lacks a whole dictionary gets it whole
        OmegaConf.update(config, key, default, force_add=True)
        new.append(f"{key}={'...' if isinstance(default, dict) else shown(default)}")
    if new:
        print(f"the run is older than some keys, which get their defaults: {', '.join(sorted(new))}")


def _always(given: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """Yield the keys that a whole config has: ALWAYS, and those of its datasets, if its version wrote datasets."""
    yield from ALWAYS
    if "dataset" not in given:
        return
    used = given["datasets"] if isinstance(given["datasets"], list) else []
    yield from (f"dataset.{name}" for name in used if f"dataset.{name}" in known)
    for name in given["dataset"] if isinstance(given["dataset"], dict) else ():
        yield from (f"dataset.{name}.{key}" for key in ALWAYS_OF_DATASET)


def locate_cache(config: DictConfig, path: str) -> None:
    """Make a relative cache_dir absolute. It is relative to the directory where the run was started.

    That directory is found from the place of the config file.
    """
    cache_dir, name = str(config.get("cache_dir")), str(config.get("exp_name"))
    if os.path.isabs(cache_dir):
        return
    directory = os.path.dirname(os.path.abspath(path))
    ending = os.path.join(os.sep, os.path.normpath(cache_dir), name)
    for run_dir in (directory, os.path.dirname(directory)):  # the latter for RUN/step-N/config.yaml
        if run_dir.endswith(ending):
            config.cache_dir = run_dir.removesuffix(os.sep + name)


def overrides(config: DictConfig, assignments: Iterable[str]) -> DictConfig:
    """Return a copy of a saved config with assignments such as 'top_p=0.9' applied. Unknown keys raise UserError."""
    known, result = flat(config), config.copy()
    for assignment in assignments:
        key, equals, text = assignment.lstrip("+").removeprefix("config.").partition("=")
        if not equals or not key:
            raise UserError(f"{short(assignment)!r} is not an assignment; write key=value, for example top_p=0.9")
        try:
            new = OmegaConf.from_dotlist([f"{key}={text}"])
            check_names(flat(new), known)
            for name, value in flat(new).items():
                check_value(name, value)
            with open_dict(result):
                result.merge_with(new)
        except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{short(assignment)!r} cannot be read; write a list as key=[a,b]") from None
    return result
