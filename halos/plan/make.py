"""The plan of a run, from its config and the architecture of its model."""

from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

# A private path, because torch has no public one: its documentation of fake tensors imports it from here.
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from halos import adapters, base, loading, packing, packing_check
from halos.errors import UserError
from halos.plan.activations import measure_activations
from halos.plan.measure import Measured
from halos.plan.optimizer import optimizer_bytes
from halos.plan.phases import Plan
from halos.plan.setup import Setup, full_layout
from halos.plan.sizes import sizes_of


def make_plan(
    config: DictConfig,
    lm_config: PreTrainedConfig,
    gpus: int,
    replicas: int,
    *,
    forwards: int = 1,
    device: str = "cuda",
    layout: packing.Layout | None = None,
    n_targets: int | None = None,
) -> Plan:
    """Plan a run on `gpus` ranks, in `replicas` groups that each hold all weights.

    forwards: forward passes of each rank per microbatch
    layout, n_targets: of one forward pass; None for max_tokens_per_forward tokens in sequences of max_length, all of
        which are targets
    """
    _refuse_what_is_not_planned(config)
    where = torch.device(device)
    layout = layout or full_layout(config.model.max_tokens_per_forward, config.model.max_length)
    setup = Setup(
        shards=gpus // replicas,
        replicas=replicas,
        stored=loading.policy_dtype(config),
        compute=loading.compute_dtype(config, where),
        reference=loading.reference_dtype(config, where) if config.loss.use_reference_model else None,
        layout=layout,
        n_targets=n_targets or sum(layout.q_lengths),
        forwards=forwards,
        microbatches=config.model.gradient_accumulation_steps,
        checkpointing=config.model.activation_checkpointing,
        cuda=where.type == "cuda",
        adapter=config.model.use_peft,
    )
    with base.building(config), torch.device("meta"):
        trust = config.trust_remote_code
        lm = AutoModelForCausalLM.from_config(lm_config, dtype=setup.compute, trust_remote_code=trust)
        if setup.adapter:
            adapters.add(lm, config.model, config.seed)
            packing_check.cast_weights(lm, setup.compute)
    with base.building(config), FakeTensorMode(allow_non_fake_inputs=True):
        v_head = loading.load_value_head(config, lm)
        model = sizes_of(lm, config.model.block_name, v_head)
        lm.to_empty(device="cpu")
        activations = measure_activations(lm, model, setup, v_head)
    if config.loss.get("use_reward_head", False):  # its language head never runs
        activations = replace(activations, head=Measured())
    kwargs: Any = OmegaConf.to_container(config.optimizer_kwargs)
    optimizer = optimizer_bytes(config.optimizer, kwargs, setup.trained, setup.cuda, setup.uses_fsdp, model)
    return Plan(model, setup, activations, optimizer)


def _refuse_what_is_not_planned(config: DictConfig) -> None:
    for key, value, instead in (("packing", False, "auto"), ("logps", "plain", "fused")):
        if config.model[key] == value:
            shown = str(value).lower()
            raise UserError(
                f"model.{key}={shown} is for checking, and cannot be planned; leave it out (model.{key}={instead})"
            )
