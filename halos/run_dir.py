"""The run directory `{cache_dir}/{exp_name}/`: when it may be used, its config, and its model card.

Everything that a run produces is there; only caches are elsewhere. Checkpoints are in `halos/checkpoint.py`.
"""

import os

import yaml
from omegaconf import DictConfig, OmegaConf

from halos import distributed, secrets
from halos.errors import UserError
from halos.files import set_aside


def path_of(config: DictConfig) -> str:
    return os.path.join(config.cache_dir, config.exp_name)


def refuse_existing(config: DictConfig) -> None:
    """Raise UserError if the run directory is not empty and overwrite is false."""
    path = path_of(config)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file, and the run would be a directory there; choose another exp_name")
    if os.path.isdir(path) and os.listdir(path) and not config.overwrite:
        raise UserError(
            f"{path} already holds a run; choose another exp_name, or overwrite=true (renames it to {path}.bak-N)"
        )


def create(config: DictConfig) -> str:
    """Make the run directory with its config.yaml, on rank 0, and return its path. An existing directory is renamed."""
    path = path_of(config)
    if not distributed.is_main():
        return path
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)
    set_aside(path)
    os.makedirs(path)
    settings = secrets.without_urls_secrets(OmegaConf.to_container(config, resolve=True))
    OmegaConf.save(OmegaConf.create(settings), os.path.join(path, "config.yaml"))
    return path


def model_card(config: DictConfig, step: int, metrics: dict[str, float]) -> str:
    """Return a model card: loss, data, hyperparameters, final metrics, and how to load the model."""
    model, loss = config.model, config.loss
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["halos", loss.name]}
    if model.name_or_path:
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
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {config.exp_name}

{base}, trained with the `{loss.name}` loss ({loss.trainer}) on {", ".join(config.datasets)}: {step} updates from
{f"`{model.load_from}`" if model.load_from else "the base weights"}.

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
prompt = tokenizer("\\n\\nHuman: Hello!\\n\\nAssistant:", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

## Metrics on the test split
| metric | value |
|---|---|
{rows}

## Hyperparameters
```yaml
{yaml.safe_dump(settings, sort_keys=False)}```
"""
