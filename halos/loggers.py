"""Loggers beside the run directory: wandb, trackio, tensorboard. `log_to` names them; each library is imported late."""

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from halos import secrets
from halos.errors import UserError, did_you_mean
from halos.files import finished


class Logger(Protocol):
    """Where metrics go, too. The runs of wandb and trackio are loggers as they are."""

    def log(self, metrics: Any, step: int | None = None) -> None: ...

    def finish(self) -> None: ...


class Loggers:
    """All loggers of a run; none by default."""

    def __init__(self, loggers: list[Logger] | None = None):
        self.loggers = loggers or []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for one in self.loggers:
            one.log(dict(metrics), step=step)

    def finish(self) -> None:
        for one in self.loggers:
            one.finish()


def names(log_to: list[Any], with_wandb: bool) -> list[str]:
    """Return the loggers that a config names; `wandb.enabled=true` is one way to name wandb."""
    return list(dict.fromkeys([*log_to, *["wandb"] * with_wandb]))


def check(values: Mapping[str, Any]) -> None:
    """Raise UserError if a flat config names a logger that is unknown or not installed. Nothing is imported."""
    for name in names(values["log_to"], values["wandb.enabled"]):
        if name not in OPENERS:
            raise UserError(f"log_to=[{name}] is not a logger; {did_you_mean(str(name), OPENERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log_to=[{name}]: {name} is not installed; pip install {name}, or leave it out")


def open_all(config: DictConfig, run_dir: str, resumed_after: int | None) -> Loggers:
    """Open the loggers of a run, without a question to the user or the network that they do not need.

    resumed_after: updates that a resumed run goes on from; None for a run from the start
    """
    settings: Any = secrets.without_urls_secrets(OmegaConf.to_container(config, resolve=True))
    chosen = names(list(config.log_to), config.wandb.enabled)
    return Loggers([OPENERS[name](config, run_dir, settings, resumed_after) for name in chosen])


def open_wandb(config: DictConfig, run_dir: str, settings: dict[str, Any], resumed_after: int | None) -> Logger:
    """Open a wandb run. Without an API key it is offline, in the run directory, so wandb never prompts or waits.

    A resumed run goes on in the run of wandb that is named in `wandb_id`.
    """
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    id_path = os.path.join(run_dir, "wandb_id")
    if not os.path.exists(id_path):
        with finished(id_path) as unfinished, open(unfinished, "w") as file:
            file.write(uuid.uuid4().hex[:8])
    with open(id_path) as file:
        run_id = file.read()
    return wandb.init(
        id=run_id,
        resume="allow",
        entity=config.wandb.entity,
        project=config.wandb.project,
        name=config.exp_name,
        config=settings,
        dir=run_dir,
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(init_timeout=30, silent=True),
    )


def open_trackio(config: DictConfig, run_dir: str, settings: dict[str, Any], resumed_after: int | None) -> Logger:
    """Open a trackio run, in trackio's local database unless its own environment variables say otherwise.

    A resumed run goes on in the latest run of its name. Steps that are made again are there twice, with equal numbers.
    """
    import trackio

    return trackio.init(
        project=config.wandb.project,
        name=config.exp_name,
        resume="never" if resumed_after is None else "allow",
        config=settings,
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )


class TensorBoard:
    """Writes event files in RUN/tensorboard. A resumed run hides the steps that are made again."""

    def __init__(self, config: DictConfig, run_dir: str, settings: dict[str, Any], resumed_after: int | None):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_after is None else resumed_after + 1
        self.writer = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=purge_step)
        if resumed_after is None:
            self.writer.add_text("config", f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(settings))}```")

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


OPENERS: dict[str, Callable[..., Logger]] = {  # each has the name of its library
    "wandb": open_wandb,
    "trackio": open_trackio,
    "tensorboard": TensorBoard,
}
