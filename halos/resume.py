"""Going on with a run: whether it is the same run, and from which state."""

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos import distributed, run_dir, saved_config, states
from halos.config_keys import flat, shown
from halos.errors import UserError

# What may differ between the parts of a run: where and how fast it runs, how long, and what it writes. The other keys
# decide what is learned.
FREE = (
    "best cache_dir cache_reference_logps do_first_eval eval_every exp_name hsdp_replicas intermediate_checkpoints"
    " keep_checkpoints log_to minimum_log_interval_secs mode n_epochs n_eval_examples n_examples n_samples"
    " nproc_per_node on_nonfinite overwrite resume sampler sampler_url samples_dir save_every save_every_minutes"
    " temperature top_p trust_remote_code use_fsdp wandb model.activation_checkpointing model.block_name model.compile"
    " model.eval_batch_size model.export_dtype model.logps model.max_tokens_per_forward model.packing"
).split()


def check_same(config: DictConfig) -> None:
    """Raise UserError with the differences, if resume=true finds a run of another loss, model, data or seed."""
    path = os.path.join(run_dir.path_of(config), run_dir.CONFIG)
    if not config.resume or not os.path.isfile(path):
        return
    try:
        before = saved_config.read(path)
    except UserError as error:
        raise UserError(f"resume=true: {error} (there is one in LATEST)") from None
    different = differences(before, config)
    if different:
        raise UserError(
            f"resume=true, but {path} is of another run: {', '.join(different)}; use the settings of that run, or "
            "another exp_name"
        )


def differences(before: DictConfig, now: DictConfig) -> list[str]:
    """Return the keys that decide what is learned and have another value now, as `lr=1e-6 (was 5e-7)`."""
    old, new = (_deciding(OmegaConf.to_container(config, resolve=True)) for config in (before, now))
    return [f"{key}={shown(new.get(key))} (was {shown(old[key])})" for key in sorted(old) if new.get(key) != old[key]]


def _deciding(config: Any) -> dict[str, Any]:
    """Return the leaves of a config without the keys in FREE and without data sets that are not used."""
    used = {f"dataset.{name}" for name in config["datasets"]}
    keys = {key: value for key, value in flat(config).items() if not isinstance(value, dict)}
    return {
        key: value
        for key, value in keys.items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
        and (not key.startswith(("dataset.", "dataset_paths.")) or any(key.startswith(f"{name}.") for name in used))
    }


def newest_state(config: DictConfig) -> str | None:
    """Return the path of the state to go on from, the same on all ranks; None for a run from the start."""
    found = states.newest(run_dir.path_of(config)) if config.resume and distributed.is_main() else None
    return distributed.from_main(found)
