"""Check the configuration of a run, a new or a saved one: `validate`.

The YAML files under config/ define the keys (`halos/config_keys.py`). RULES and CHOICES below define the values that
these keys may have; a trainer's `rules` do so for its loss. Change this file to add a check. `halos/commands.py` shows
the errors to the user.
"""

import inspect
import os
from collections.abc import Callable
from glob import glob
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from halos import config_keys, dataset_specs, rules
from halos.components import component
from halos.config_keys import check_complete, check_names, flat, is_open, resolved, shown
from halos.errors import UserError, did_you_mean, first_line
from halos.files import require_writable
from halos.rules import Rule

# Rules for the keys that every run has. A trainer class states the rules for the hyperparameters of its loss.
RULES: dict[str, Rule] = {
    key: rule
    for rule, keys in (
        (
            rules.whole(least=1),
            "eval_every n_eval_examples n_samples model.batch_size model.gradient_accumulation_steps"
            " model.eval_batch_size model.max_length model.max_prompt_length model.max_tokens_per_forward",
        ),
        (rules.whole(least=1).or_null(), "n_epochs n_examples nproc_per_node hsdp_replicas save_every"),
        (rules.number(above=0).or_null(), "save_every_minutes"),
        (rules.whole(least=0), "keep_checkpoints seed warmup_steps"),
        (rules.number(least=0), "lr temperature minimum_log_interval_secs"),
        (
            Rule("a number above 0", lambda x: x == float("inf") or rules.number(above=0).allows(x)),
            "model.max_grad_norm model.v_head_max_grad_norm",
        ),
        (rules.number(above=0, most=1), "top_p"),
        (
            rules.flag,
            "cache_reference_logps do_first_eval group_prompts intermediate_checkpoints overwrite resume strict_data"
            " trust_remote_code wandb.enabled loss.use_reference_model model.compile"
            " use_fsdp",
        ),
        (rules.choice(True, False, "auto"), "model.packing"),
        (rules.choice(True, False, "selective"), "model.activation_checkpointing"),
        (rules.text, "cache_dir samples_dir optimizer loss.name loss.trainer loss.dataloader model.name wandb.project"),
        (
            rules.text.or_null(),
            "model.load_from model.name_or_path model.tokenizer_name_or_path model.block_name sampler_url wandb.entity",
        ),
        (Rule("a dictionary of fields", lambda x: isinstance(x, dict)).or_null(), "model.architecture"),
    )
    for key in keys.split()
}

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("train", "eval"),
    "on_nonfinite": ("stop", "skip"),
    "lr_scheduler": ("constant", "cosine", "linear"),
    "sampler": ("hf", "server", "vllm"),
    "model.logps": ("fused", "plain"),
    "model.policy_dtype": ("float32", "bfloat16"),
    "model.fsdp_policy_mp": ("float32", "bfloat16", "null"),
    "model.reference_dtype": ("float32", "bfloat16", "null"),
    "model.export_dtype": ("float32", "bfloat16", "float16", "null"),
}


NAME_SPARE = 55  # bytes that a file system's 255 leave for endings of exp_name, such as _step-100.partial.jsonl.bak-10


def validate(config: DictConfig, trainers: ModuleType, dataloaders: ModuleType) -> None:
    """Raise a one-line UserError for any mistake that can be found before a model loads.

    A top-level node `config` is folded into the root first (`++config.lr=1e-6` means `lr=1e-6`). Interpolations are
    replaced by their values, so that what is checked here is what the run reads.
    """
    _fold(config)
    written = config_keys.as_written()
    known = flat(written if written is not None else config_keys.written_for(config))
    _check_keys(flat(config), known)
    values = resolved(config)
    _check_keys(values, known)
    OmegaConf.resolve(config)
    _check_values(values)
    _check_lengths(values)
    _check_run_directory(values)
    _check_loss(values, trainers, dataloaders)
    _check_datasets(values, dataloaders)
    _check_template(values)
    if written is not None:
        _check_base_model(values)
    _check_model(values)
    _check_optimizer(values)


def _check_keys(given: dict[str, Any], known: dict[str, Any]) -> None:
    check_names(given, known)
    for key, default in (config_keys.OPTIONAL | known).items():
        if key in given:
            _check_kind(key, given[key], default)
    check_complete(given, known)


def _fold(config: DictConfig) -> None:
    if "config" not in config:
        return
    with open_dict(config):
        inner = config.pop("config")
        if inner is not None and not isinstance(inner, DictConfig):
            raise UserError(f"config={shown(inner)} is not a dictionary; write the keys themselves, such as lr=1e-6")
        try:
            config.merge_with(inner or {})
        except OmegaConfBaseException as error:
            raise UserError(f"config={shown(flat(inner))}: {first_line(error)}; write the keys themselves") from None


#### VALUES


def _is_numeric(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda x: isinstance(x, bool)),
    int: ("a number", _is_numeric),  # a float is allowed too: a loss with `beta: 1` in its YAML accepts 0.5
    float: ("a number", _is_numeric),
    str: ("text", lambda x: isinstance(x, str)),
    list: ("a list", lambda x: isinstance(x, list)),
    dict: ("a dictionary", lambda x: isinstance(x, dict)),
}


def _check_kind(key: str, value: Any, default: Any) -> None:
    """Check that a value has the type of the default in the YAML file, unless a rule covers the key.

    A default of null, ??? or ${...} tells nothing about the type, so any value is accepted.
    """
    unsaid = default is None or default == "???" or "${" in str(default) or is_open(key)
    has_rule = key in RULES or key in CHOICES or dataset_specs.has_rule(key)
    if unsaid or has_rule or (isinstance(value, str) and ("${" in value or value == "???")):
        return
    kind, fits = KINDS[type(default)]
    if not fits(value):
        raise UserError(f"{key}={shown(value)} is not {kind}; use for example {key}={shown(default)}")


def _check_sane(key: str, value: Any) -> None:
    """Refuse what no key can hold: NaN, numbers of more than 64 bits, and text that cannot be written to a file."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, float) and one != one:
            raise UserError(f"{key}=nan is not a number; give one")
        if rules.is_too_large(one):
            raise UserError(f"{key}={shown(one)} is too large; give a number below 2^63")
        if isinstance(one, str) and not rules.is_writable(one):
            raise UserError(f"{key}={shown(one)!r} has characters that are not text; leave them out")


def _check_rule(key: str, value: Any, rule: Rule) -> None:
    if not rule.allows(value):
        raise UserError(f"{key}={shown(value)} must be {rule.expected}")


def check_value(key: str, value: Any) -> None:
    typed, known = shown(value), CHOICES.get(key)
    if key in RULES:
        _check_rule(key, value, RULES[key])
    if known and typed == "float16" and typed not in known:
        raise UserError(f"{key}=float16 needs loss scaling, which is not supported; use bfloat16 or float32")
    if known and typed not in known:
        raise UserError(f"{key}={typed} is not known; {did_you_mean(typed, known)}")


def _check_values(values: dict[str, Any]) -> None:
    for key in (*RULES, *CHOICES):
        check_value(key, values.get(key))
    for key, value in values.items():
        _check_sane(key, value)
    if values.get("n_epochs") is None and values.get("n_examples") is None:
        raise UserError("n_epochs=null and n_examples=null: the run would never end; set one, such as n_epochs=1")


def _check_lengths(values: dict[str, Any]) -> None:
    """Check that lengths and counts fit together: prompt in sequence, evaluation interval in whole updates."""
    longest, prompt = values["model.max_length"], values["model.max_prompt_length"]
    if prompt >= longest:
        raise UserError(
            f"model.max_prompt_length={prompt} is not below model.max_length={longest}, so a long prompt leaves no room"
            f" for its response; use model.max_prompt_length={max(1, longest // 2)}"
        )
    every, size, steps = (values[k] for k in ("eval_every", "model.batch_size", "model.gradient_accumulation_steps"))
    update = size * steps
    if every % update:
        below = every // update * update
        what = f"model.batch_size={size}"
        what += f" x model.gradient_accumulation_steps={steps} ({update})" if steps > 1 else ""
        either = f"{below} or {below + update}" if below else f"{update}"
        raise UserError(f"eval_every={every} is not a multiple of {what}; use eval_every={either}")


def _check_run_directory(values: dict[str, Any]) -> None:
    """Check that the run directory is inside cache_dir and outside its caches, and that cache_dir is writable."""
    name, cache_dir = values.get("exp_name"), values["cache_dir"]
    if not rules.is_text(name):
        raise UserError(f"exp_name={shown(name)} is not a directory name; use letters, such as exp_name=run_1")
    problem = None
    if os.path.isabs(name) or ".." in name.split(os.sep):
        problem = "leaves cache_dir"
    elif {"", "."} & set(name.split("/")):
        problem = "has empty parts"
    elif name.startswith("."):
        problem = "starts with a dot, as the caches in cache_dir do"
    if problem:
        raise UserError(f"exp_name={name} {problem}; use a plain name, and cache_dir=DIR to keep runs elsewhere")
    _check_path("exp_name", name, NAME_SPARE)
    _check_path("cache_dir", cache_dir)
    _check_path("samples_dir", values["samples_dir"])
    require_writable(cache_dir, "cache_dir")


def _check_path(key: str, path: str, spare: int = 0) -> None:
    if problem := rules.problem_of_path(path, spare):
        raise UserError(f"{key}={shown(path)!r} {problem}; use a shorter and plain name")


def _check_loss(values: dict[str, Any], trainers: ModuleType, dataloaders: ModuleType) -> None:
    """Check that the trainer and the loader exist and have the same `data_format`. None matches every format."""
    trainer = component(trainers, values["loss.trainer"], trainers.BasicTrainer, "loss.trainer")
    loader = component(dataloaders, values["loss.dataloader"], dataloaders.DataLoader, "loss.dataloader")
    for key in (key for keys in _declared(trainer, "needs") for key in keys):
        if not values.get(f"loss.{key}"):
            raise UserError(f"loss.{key}=false: loss.trainer={trainer.__name__} needs it; use loss.{key}=true")
    for key, rule in {key: rule for own in _declared(trainer, "rules") for key, rule in own.items()}.items():
        if f"loss.{key}" not in values:
            raise UserError(f"loss.{key} is missing, and loss.trainer={trainer.__name__} needs it; add it to the YAML")
        _check_rule(f"loss.{key}", values[f"loss.{key}"], rule)
    needs, gives = (getattr(c, "data_format", None) for c in (trainer, loader))
    if needs is None or gives is None or needs == gives:
        return
    fitting = [name for name, c in vars(dataloaders).items() if getattr(c, "data_format", None) == needs]
    raise UserError(
        f"loss.dataloader={loader.__name__} gives {gives} data, and loss.trainer={trainer.__name__} needs {needs};"
        f" use loss.dataloader={' or '.join(sorted(fitting)) or f'a loader with data_format {needs!r}'}"
    )


def _declared(cls: type, name: str) -> list[Any]:
    """Return what a class and its bases declare under a name, bases first: a loss keeps the demands of its parent."""
    return [vars(one)[name] for one in reversed(cls.__mro__) if name in vars(one)]


def _check_datasets(values: dict[str, Any], dataloaders: ModuleType) -> None:
    """Check the datasets' names and YAMLs. dataloaders.py has the readers that these can name: get_*."""
    readers = {name for name, f in vars(dataloaders).items() if name.startswith("get_") and callable(f)} - {"get_local"}
    choice = _choice_of_datasets()
    if choice not in (None, "all"):
        raise UserError(f"dataset={choice} is not how datasets are chosen; use datasets=[{choice}]")
    dataset_specs.check(values, readers)


def _choice_of_datasets() -> str | None:
    """Return the choice of Hydra's group `dataset`: all, unless the user changed it. None outside a Hydra run."""
    return HydraConfig.get().runtime.choices.get("dataset") if HydraConfig.initialized() else None


def _check_template(values: dict[str, Any]) -> None:
    """The chat template is the tokenizer's, none, or a file."""
    template = values.get("chat_template", "auto")
    if template not in ("auto", "none") and not (rules.is_text(template) and os.path.isfile(template)):
        raise UserError(
            f"chat_template={shown(template)}: there is no such file; give auto, none, or the path of a Jinja file"
        )


def _check_model(values: dict[str, Any]) -> None:
    """Check the architecture, and that all local files of the model exist."""
    architecture, name = values.get("model.architecture"), values.get("model.name_or_path")
    load_from = values.get("model.load_from") or ""
    if architecture is not None:
        _check_architecture(architecture, values["model.max_length"])
    elif name is None and (not load_from or load_from.endswith(".pt")):
        raise UserError("model.name_or_path=null: nothing to load; give a hub name or a local folder")
    if name is None and values.get("model.tokenizer_name_or_path") is None:
        raise UserError("model.tokenizer_name_or_path=null: a model of random weights has none; name a tokenizer")
    for key in ("model.load_from", "model.name_or_path", "model.tokenizer_name_or_path"):
        path, remedy = values.get(key) or "", "give the path of a local copy, or a name on the hub"
        looks_local = path.startswith(("/", "./", "../", "~"))
        if key == "model.load_from" and path.endswith(".pt"):
            looks_local, remedy = True, _earlier_policies(values["cache_dir"]) or remedy
            path = os.path.join(values["cache_dir"], path)  # an absolute path stays unchanged
        if looks_local and not os.path.exists(path):
            raise UserError(f"{key}={values[key]}: {path} does not exist; {remedy}")


def _check_base_model(values: dict[str, Any]) -> None:
    """Refuse `model.name_or_path=X` together with an architecture, as in model=tiny without model=base_model.

    X would get the other model's tokenizer, learning rate, and lengths. Runs saved with both can still be evaluated.
    """
    name = values.get("model.name_or_path")
    if name is None or values.get("model.architecture") is None:
        return
    kept = {key: values.get(key) for key in ("model.tokenizer_name_or_path", "lr", "model.max_length")}
    settings = " ".join(f"{key}={shown(value)}" for key, value in kept.items())
    short = os.path.basename(name.rstrip("/")).lower() or "NAME"
    raise UserError(
        f"model.name_or_path={name} is given with a model that has an architecture of its own, whose settings would "
        f"stay ({settings}); use model=base_model model.name={short} model.name_or_path={name}"
    )


def _earlier_policies(cache_dir: str) -> str:
    """List the existing policy.pt files, as a suggestion when the requested one is missing."""
    found = sorted(os.path.relpath(p, cache_dir) for p in glob(os.path.join(cache_dir, "*", "LATEST", "policy.pt")))
    return f"{cache_dir} has {', '.join(found)}" if found else ""


def _check_architecture(fields: Any, max_length: int) -> None:
    """Check the fields of model.architecture. transformers silently ignores an unknown field and keeps the default."""
    from transformers import CONFIG_MAPPING

    model_type = str(fields.get("model_type") if isinstance(fields, dict) else fields)
    if model_type not in CONFIG_MAPPING:
        nearest = did_you_mean(model_type, CONFIG_MAPPING, list_all=False)
        raise UserError(f"model.architecture.model_type={model_type} is not an architecture; {nearest}")
    cls = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(cls).parameters, *cls.attribute_map, "model_type", "rope_theta", "rope_scaling"}
    for name, value in fields.items():
        if name not in known:
            nearest = did_you_mean(name, known, list_all=False)
            raise UserError(f"model.architecture.{name}={shown(value)} is not a field of {cls.__name__}; {nearest}")
    positions = fields.get("max_position_embeddings", max_length)
    if rules.is_number(positions) and positions < max_length:
        raise UserError(
            f"model.max_length={max_length} is more than model.architecture.max_position_embeddings={positions};"
            f" use model.max_length={positions} or raise the other"
        )


def _check_optimizer(values: dict[str, Any]) -> None:
    """Check that the optimizer exists, accepts its arguments, and can take a step on an ordinary parameter."""
    import torch

    from halos import optimizers

    name, kwargs = values["optimizer"], values.get("optimizer_kwargs") or {}
    if name not in optimizers.NOT_IN_TORCH:
        component(torch.optim, name, torch.optim.Optimizer, "optimizer")
    cls = optimizers.class_of(name)
    if "lr" in kwargs:
        raise UserError(f"optimizer_kwargs.lr={shown(kwargs['lr'])} is the key lr; use lr={shown(kwargs['lr'])}")
    known = set(inspect.signature(cls).parameters) - {"params", "lr"}
    for key, value in kwargs.items():
        if key not in known:
            nearest = did_you_mean(key, known)
            raise UserError(f"optimizer_kwargs.{key}={shown(value)} is not an argument of {name}; {nearest}")
    if not kwargs and name in ("AdamW", "RMSprop") or name in optimizers.OF_TORCHAO:
        return  # known to work; building the first optimizer of a process takes torch 2 s
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    try:  # `capturable` works for GPU parameters only
        cls([parameter], lr=values["lr"], **{k: v for k, v in kwargs.items() if k != "capturable"}).step()
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        setting = f"optimizer={name}" + (f" optimizer_kwargs={shown(kwargs)}" if kwargs else "")
        raise UserError(f"{setting} cannot train: {first_line(error)}; use for example optimizer=AdamW") from None
