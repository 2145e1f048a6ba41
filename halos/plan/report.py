"""The plan of one run, as `scripts/plan.py` prints it."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from halos.plan.make import make_plan
from halos.plan.phases import Plan
from halos.plan.published import architecture
from halos.plan.setup import Setup, replicas_of
from halos.plan.traffic import bytes_sent

GIB = 2**30
RESERVE = 0.1  # of a GPU's memory: for the CUDA context, the buffers of NCCL and the gaps of the allocator

ROWS = {  # field of `Memory` -> label
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer, and its step",
    "reference": "reference model",
    "gathered": "gathered weights, unreduced gradients",
    "activations": "activations, and computing with them",
}


def report(config: DictConfig, gpus: int, gpu_memory: float, nodes: int | None = None, forwards: int = 1) -> str:
    """Plan a run and describe the plan.

    gpu_memory: of each GPU, in GiB
    nodes: None for one per 8 GPUs
    forwards: forward passes of each rank per microbatch
    """
    replicas = replicas_of(config, gpus, nodes)
    lm_config, source = architecture(config)
    plan = make_plan(config, lm_config, gpus, replicas, forwards=forwards)
    return "\n".join([*describe(config, plan, source), "", *memory(plan), "", traffic(plan), verdict(plan, gpu_memory)])


def describe(config: DictConfig, plan: Plan, source: str) -> list[str]:
    setup, n_parameters = plan.setup, sum(group.elements for group in plan.model.groups)
    trained, reference = "", "no reference model"
    if setup.adapter:
        n_trained = sum(group.trained.elements for group in plan.model.groups)
        trained = f", {n_trained / 1e9:.3f} billion of them trained (LoRA of rank {config.model.lora.rank})"
    if setup.reference:
        reference = f"a reference model in {short(setup.reference)}"
        reference = "the policy without its adapter as reference model" if setup.adapter else reference
    return [
        f"{config.model.name}: {n_parameters / 1e9:.3f} billion parameters{trained}, {len(plan.model.blocks)} blocks "
        f"({source})",
        f"loss={config.loss.name}, with {reference}; {settings(config, plan.setup)}",
        f"{setup.world_size} GPUs: {setup.replicas} x {setup.shards} (replicas x shards)",
    ]


def settings(config: DictConfig, setup: Setup) -> str:
    checkpointing = {True: "", False: "no ", "selective": "selective "}[setup.checkpointing]
    return (
        f"{config.optimizer}, {short(setup.stored)} weights, {short(setup.compute)} computation, "
        f"{setup.n_tokens} tokens per forward, {checkpointing}activation checkpointing"
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory(plan: Plan) -> Iterator[str]:
    where, peak = plan.peak()
    yield f"{'GiB per GPU':40}{'at the most':>12}{'at the peak':>12}"
    for name, label in ROWS.items():
        most = max(getattr(phase, name) for phase in plan.phases().values())
        yield f"{label:40}{most / GIB:12.2f}{getattr(peak, name) / GIB:12.2f}"
    yield f"{'peak':52}{peak.total / GIB:12.2f}  in the {where}"


def traffic(plan: Plan) -> str:
    sent = {purpose: n / 1e9 for purpose, n in bytes_sent(plan.model, plan.setup).items() if n}
    line = f"each GPU sends {sum(sent.values()):.1f} GB per update" + ": " * bool(sent)
    return line + ", ".join(f"{gigabytes:.1f} {purpose}" for purpose, gigabytes in sent.items())


def verdict(plan: Plan, gpu_memory: float) -> str:
    room = (
        f"{plan.peak()[1].total / GIB:.1f} of {gpu_memory:g} GB, where a tenth has to be left for what is not planned"
    )
    if fits(plan, gpu_memory):
        return f"it fits: {room}"
    return f"it does not fit: {room}; {remedy(plan, gpu_memory)}"


def fits(plan: Plan, gpu_memory: float) -> bool:
    return plan.peak()[1].total <= (1 - RESERVE) * gpu_memory * GIB


def remedy(plan: Plan, gpu_memory: float) -> str:
    """Suggest fewer replicas, or else more GPUs, if that is enough."""
    gpus, replicas = plan.setup.world_size, plan.setup.replicas
    fewer = [(gpus, n) for n in reversed(range(1, replicas)) if gpus % n == 0]
    for total, n in fewer + [(gpus * 2**k, 1) for k in range(1, 8)]:
        if fits(plan.on(total, n), gpu_memory):
            return f"gpus={total} hsdp_replicas={n} does"
    return "more GPUs do not help; lower model.max_tokens_per_forward, or use model.activation_checkpointing=true"
