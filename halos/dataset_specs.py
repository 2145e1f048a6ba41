"""The files of config/dataset: what each dataset is read from, and how. Register them with Hydra, and check them.

`config.dataset.NAME` is the composition of config/dataset/base_dataset.yaml and config/dataset/NAME.yaml, for every
file there; `datasets=[...]` picks some. A path or a hub name in `datasets` has the keys of base_dataset.yaml.
"""

import functools
import os
import re
from glob import glob
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from halos import rules
from halos.datafiles import is_data_file, is_glob
from halos.errors import UserError, did_you_mean
from halos.forms import FORMS, PAIRINGS
from halos.project_dir import PROJECT
from halos.rows import PROMPTS_AS
from halos.rules import Rule

BASE = "base_dataset"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:config
# Keys that say how rows are read; a reader in dataloaders.py reads its rows itself.
OF_ROWS = ("splits", "form", "columns", "prompt_as", "pairs", "margin")

RULES: dict[str, Rule] = {
    "source": rules.text.or_null(),
    "splits.train": rules.text.or_null(),
    "splits.test": rules.text.or_null(),
    "form": rules.choice("auto", *FORMS),
    "prompt_as": rules.choice(*PROMPTS_AS),
    "pairs": rules.choice(*PAIRINGS),
    "margin": rules.number(least=0),
    "keep.n_prompts": rules.whole(least=1).or_null(),
    "weight": rules.number(above=0),
    "reader": rules.text.or_null(),
}


def register(*config_dirs: str) -> None:
    """Tell Hydra to compose all files of the folders' dataset/ into `config.dataset`, each under its own name."""
    files = [file for folder in config_dirs for file in glob(os.path.join(folder, "dataset", "*.yaml"))]
    names = sorted({os.path.basename(file)[: -len(".yaml")] for file in files} - {BASE})
    node = {"defaults": [{f"/dataset@{name}": [BASE, name]} for name in names]}
    ConfigStore.instance().store(group="dataset", name="all", node=node)


register(os.path.join(PROJECT, "config"))  # for programs that compose the config without `hydra_main`


def is_open(key: str) -> bool:
    """Return True for a key of a dictionary whose keys are the user's: columns, and values of columns."""
    return bool(re.match(r"dataset\.[^.]+\.(columns|keep\.where)\.", key))


def has_rule(key: str) -> bool:
    """Return True for a key such as dataset.shp.reader, whose values `check` checks."""
    parts = key.split(".", 2)
    return parts[0] == "dataset" and len(parts) == 3 and parts[2] in RULES


@functools.cache
def base_spec() -> dict[str, Any]:
    with open(os.path.join(PROJECT, "config", "dataset", f"{BASE}.yaml")) as file:
        return yaml.safe_load(file)


def spec_of(config: DictConfig, name: str) -> DictConfig:
    """Return the keys of one of `config.datasets`: its YAML's, or those of a path, a hub name, or a bare reader."""
    specs = config.get("dataset") or {}
    spec = OmegaConf.merge(base_spec(), specs.get(name) or {})
    assert isinstance(spec, DictConfig)
    if local := (config.get("dataset_paths") or {}).get(name):
        spec.source = local
    if name not in specs and is_source(name):
        spec.source = name
    return spec


def is_source(name: str) -> bool:
    """Return True for what can be read without a YAML: a path, a glob, or a hub name."""
    if is_glob(name) or os.path.exists(os.path.expanduser(name)):
        return True
    return bool(HUB_NAME.fullmatch(name)) and not is_data_file(name)


def check(values: dict[str, Any], readers: set[str]) -> None:
    """Raise UserError if a name in `datasets` is unknown, or if the YAML of one of them is wrong.

    readers: names of the functions of dataloaders.py that read a dataset, as in get_shp
    """
    specs: dict[str, dict] = values.get("dataset") or {}
    known = set(specs) | {reader.removeprefix("get_") for reader in readers}
    datasets = values.get("datasets")
    if not isinstance(datasets, list) or not datasets or not all(rules.is_text(name) for name in datasets):
        raise UserError(f"datasets={_shown(datasets)} must be a list of names or paths, such as datasets=[demo]")
    for name in datasets:
        if datasets.count(name) > 1:
            raise UserError(f"datasets={_shown(datasets)} has {name} twice; name each dataset once")
        if name not in known:
            _check_source(f"datasets={_shown(datasets)}: {name}", name, known)
    for name, path in (values.get("dataset_paths") or {}).items():
        if name not in known:
            raise UserError(f"dataset_paths.{name}={path}: no such dataset; {did_you_mean(name, known)}")
        if path is not None and not (rules.is_text(path) and os.path.exists(os.path.expanduser(path))):
            raise UserError(f"dataset_paths.{name}={path} does not exist; give a local copy, or null")
    for name in specs:
        _check_spec(name, specs[name], readers, name in datasets)


def _check_source(where: str, source: str, known: set[str]) -> None:
    """Raise UserError unless a source can be read without a YAML."""
    if is_source(source):
        return
    if is_data_file(source) or "/" in source:
        raise UserError(f"{where} does not exist; give a file, a folder, or a hub name")
    raise UserError(f"{where} is not known; {did_you_mean(source, known)}, or a path or hub name")


def _check_spec(name: str, spec: dict[str, Any], readers: set[str], is_used: bool) -> None:
    base = base_spec()
    for key, rule in RULES.items():
        value: Any = spec
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not rule.allows(value):
            shown = "null" if value is None else value
            raise UserError(f"dataset.{name}.{key}={shown} must be {rule.expected}")
    reader = spec["reader"]
    if reader is None:
        if is_used and not spec["source"]:
            raise UserError(f"dataset.{name}.source=null: nothing to read; give a file, a folder or a hub name")
        return
    if reader not in readers:
        raise UserError(f"dataset.{name}.reader={reader} is not defined in dataloaders.py; "
                        f"{did_you_mean(reader, readers)}")  # fmt: skip
    changed = [key for key in OF_ROWS if spec[key] != base[key]] + ["keep.where"] * bool(spec["keep"]["where"])
    if changed:
        raise UserError(f"dataset.{name}.{changed[0]} has no effect, since {reader} reads the rows itself; "
                        f"leave it out, or use dataset.{name}.reader=null")  # fmt: skip


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else "null" if value is None else str(value)
