"""The run directory `{cache_dir}/{exp_name}/`: its lock, when it may be used, its config, and its model card.

Everything that a run produces is there; only caches are elsewhere. Checkpoints are in `halos/checkpoint.py`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import yaml
from omegaconf import DictConfig, OmegaConf

from halos import distributed, locks, manifest, secrets
from halos.errors import UserError
from halos.files import OLD, UNFINISHED, finish_replacement, finished, make_room
from halos.locks import Lock

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
STATES = "states"  # a run's states to resume from
EVALUATIONS = "evaluations"  # what evaluations said of each response
WRITTEN_WHOLE = r"LATEST|BEST|step-\d+|not_finite"  # directories that are written beside their place


def path_of(config: DictConfig) -> str:
    return os.path.join(config.cache_dir, config.exp_name)


@contextmanager
def locked(config: DictConfig) -> Iterator[Lock | None]:
    """Have the run directory to oneself, before anything is made or moved. Yields the lock, on rank 0.

    All ranks must call this. They end if another process writes there, or if the directory may not be used.
    """
    lock = distributed.on_main(_take, config)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _take(config: DictConfig) -> Lock:
    path = path_of(config)
    _refuse_inside(config)  # before the lock, which makes the directory that it is in
    try:
        lock = locks.take(path)
    except locks.Held as held:
        raise UserError(f"{path} is being written by {held}; choose another exp_name, or wait for its end") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another cache_dir or exp_name") from error
    try:
        _refuse_inside(config)
        refuse_existing(config)
        recover(path)
    except BaseException:
        lock.release()
        raise
    return lock


def _refuse_inside(config: DictConfig) -> None:
    """Raise UserError if a directory above the run directory is another run."""
    parts = os.path.normpath(config.exp_name).split(os.sep)
    for n in range(1, len(parts)):
        other = os.path.join(config.cache_dir, *parts[:n])
        if _is_run(other) or locks.holder(other):
            raise UserError(f"exp_name={config.exp_name} is inside the run {other}; choose another exp_name")


def _is_run(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in (CONFIG, METRICS))


def _run_inside(path: str) -> str | None:
    """Return a run that is somewhere under a directory that is not a run itself; None if there is none."""
    for folder, _, names in os.walk(path) if not _is_run(path) else []:
        if folder != path and _is_run(folder):
            return folder
        for name in names:
            run = os.path.join(folder, name.removeprefix(".").removesuffix(".lock"))
            if name.endswith(".lock") and locks.holder(run):
                return run
    return None


def refuse_existing(config: DictConfig) -> None:
    """Raise UserError if the run directory is not empty and overwrite is false, or if other runs are in it."""
    path = path_of(config)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file, and the run would be a directory there; choose another exp_name")
    if other := _run_inside(path):
        raise UserError(f"{path} is a directory of other runs, such as {other}; choose another exp_name")
    if os.path.isdir(path) and os.listdir(path) and not (config.overwrite or config.resume):
        raise UserError(
            f"{path} already holds a run; resume=true goes on with it; or choose another exp_name, or overwrite=true "
            f"(renames it to {path}.bak-N)"
        )


def write_config(config: DictConfig, path: str) -> None:
    """Write a config.yaml, without the keys and passwords of addresses in it."""
    settings = secrets.without_urls_secrets(OmegaConf.to_container(config, resolve=True))
    OmegaConf.save(OmegaConf.create(settings), path)


def create(config: DictConfig) -> str:
    """Make the run directory with its config.yaml, on rank 0, and return its path. An existing directory is renamed."""
    path = path_of(config)
    if not distributed.is_main():
        return path
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)
    make_room(path)
    os.makedirs(path)
    try:
        with finished(os.path.join(path, CONFIG)) as unfinished:
            write_config(config, unfinished)
    except BaseException:
        os.rmdir(path)
        raise
    return path


def recover(path: str) -> None:
    """Finish or undo what a writer that was killed left in a run directory. The caller must have its lock.

    A checkpoint that was to be replaced is in its place again afterwards: the new one if it was complete, else the old.
    Files and directories with names of one's own are left alone.
    """
    for folder in (path, os.path.join(path, STATES), os.path.join(path, EVALUATIONS)):
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if found := re.fullmatch(rf"({WRITTEN_WHOLE})({re.escape(UNFINISHED)}|{re.escape(OLD)})", name):
                finish_replacement(os.path.join(folder, found[1]), manifest.is_complete)
            elif re.fullmatch(rf"\..+{re.escape(UNFINISHED)}", name):
                os.remove(os.path.join(folder, name))


def recover_if_dead(path: str) -> None:
    """Call `recover`, unless a run is writing there or the directory cannot be written. For those who only read."""
    with suppress(locks.Held, OSError), locks.take(path):
        recover(path)


USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
prompt = tokenizer("\\n\\nHuman: Hello!\\n\\nAssistant:", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
"""
USE_OF_REWARD_MODEL = """# A higher score is a better response. The score is read at the token that ends the response.
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
conversation = "\\n\\nHuman: Hello!\\n\\nAssistant: Hi, how are you?" + tokenizer.eos_token
print(model(**tokenizer(conversation, return_tensors="pt")).logits)
"""


def model_card(config: DictConfig, step: int, metrics: dict[str, float]) -> str:
    """Return a model card: loss, data, hyperparameters, final metrics, and how to load the model."""
    model, loss = config.model, config.loss
    scores = loss.get("use_reward_head", False)
    task = "text-classification" if scores else "text-generation"
    header = {"library_name": "transformers", "pipeline_tag": task, "tags": ["halos", loss.name]}
    if model.name_or_path and not os.path.isdir(model.name_or_path):  # the hub refuses a path
        header["base_model"] = model.name_or_path
    base = model.name_or_path or f"a {model.architecture.model_type} with random weights"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    settings = {
        "loss": OmegaConf.to_container(loss, resolve=True),
        "optimizer": {"name": config.optimizer, "lr": config.lr, **config.optimizer_kwargs},
        "lr_scheduler": config.lr_scheduler,
        "warmup_steps": config.warmup_steps,
        "batch_size": model.batch_size * model.gradient_accumulation_steps,
        "max_length": model.max_length,
        "seed": config.seed,
    }
    if model.use_peft:
        settings["lora"] = OmegaConf.to_container(model.lora)
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {config.exp_name}

{base}, trained with the `{loss.name}` loss ({loss.trainer}) on {", ".join(config.datasets)}: {step} updates from
{f"`{model.load_from}`" if model.load_from else "the base weights"}.

## Use
```python
{USE_OF_REWARD_MODEL if scores else USE}```

## Metrics on the test split
| metric | value |
|---|---|
{rows}

## Hyperparameters
```yaml
{yaml.safe_dump(settings, sort_keys=False)}```
"""
