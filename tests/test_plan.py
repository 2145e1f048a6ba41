"""The planner against what it plans: real steps on a CPU, every allocation of which is recorded.

Steps of several processes run in one, whose collectives send nothing: it allocates what one of them would.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import trainers
from halos import distributed, logps, models, planning, sharding
from halos.tokens import TokenizedExample
from helpers import PROJECT, make_config

CPU = torch.device("cpu")
VOCAB = 8192
LLAMA = {  # 26M parameters
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
}
NEOX = {  # 27M
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
BLOCKS = {"llama": "LlamaDecoderLayer", "gpt_neox": "GPTNeoXLayer"}
CHECKPOINTING, BFLOAT16 = "model.activation_checkpointing=true", "model.fsdp_policy_mp=bfloat16"


@dataclass(frozen=True)
class Case:
    architecture: dict
    words: tuple[str, ...] = ()
    processes: int = 1
    replicas: int = 1


ONE = {
    "llama": Case(LLAMA),
    "llama, checkpointing": Case(LLAMA, (CHECKPOINTING,)),
    "gpt_neox": Case(NEOX, ("optimizer=AdamW",)),
    "gpt_neox, checkpointing": Case(NEOX, (CHECKPOINTING, "optimizer=SGD", "++optimizer_kwargs.momentum=0.9")),
    "accumulation": Case(LLAMA, (CHECKPOINTING, "model.gradient_accumulation_steps=2")),
    "critic": Case(LLAMA, (CHECKPOINTING, "loss=ppo")),
    "bfloat16, small": Case(LLAMA | {"hidden_size": 128, "intermediate_size": 344}, (CHECKPOINTING, BFLOAT16)),
}
FOUR = {
    "llama, 4 shards": Case(LLAMA, (CHECKPOINTING,), processes=4),
    "gpt_neox, 2 x 2": Case(NEOX, ("optimizer=AdamW",), processes=4, replicas=2),
    "accumulation, 4 shards": Case(NEOX, (CHECKPOINTING, "model.gradient_accumulation_steps=2"), processes=4),
    "sft, 4 replicas": Case(LLAMA, ("loss=sft",), processes=4, replicas=4),
    "critic, 4 shards": Case(LLAMA, (CHECKPOINTING, "loss=ppo"), processes=4),
}
SLOW_ONE = {
    f"bfloat16, {architecture['model_type']}, {words}": Case(architecture, (BFLOAT16, *words))
    for architecture in (LLAMA, NEOX)
    for words in ((), (CHECKPOINTING,))
}
SLOW_FOUR = {
    "bfloat16, 4 shards": Case(LLAMA, (CHECKPOINTING, BFLOAT16), processes=4),
    "bfloat16, 2 x 2": Case(NEOX, (BFLOAT16,), processes=4, replicas=2),
    "stored in bfloat16, 2 x 2": Case(LLAMA, (BFLOAT16, "model.policy_dtype=bfloat16"), processes=4, replicas=2),
}


#### A STEP, MEASURED (in a process of its own)


def measure_all(cases: dict[str, Case]) -> dict[str, dict]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what nobody sent may be denormal, and slow
    processes = {case.processes for case in cases.values()}.pop()
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    return {name: measured_and_planned(case) for name, case in cases.items()}


def config_of(case: Case):
    fields = [f"++model.architecture.{key}={value}" for key, value in case.architecture.items()]
    block = f"model.block_name={BLOCKS[case.architecture['model_type']]}"
    return make_config("", "loss=dpo", "model=tiny", "optimizer=RMSprop", block, *fields, *case.words)


def measured_and_planned(case: Case) -> dict:
    """{quantity: (measured bytes, planned bytes)}"""
    config = config_of(case)
    trainer = make_trainer(config, case)
    batch = pairs(2 * case.processes)
    [(examples, _)] = trainer.forwards(batch)
    inputs = trainer.policy.inputs(examples)
    plan = planning.make_plan(
        config,
        models.load_config(config),
        case.processes,
        case.replicas,
        device="cpu",
        layout=inputs.layout,
        n_targets=len(inputs.targets),
    )
    take_step(trainer, batch, lambda name, work: work())  # after which the optimizer has its state
    for _ in range(1, config.model.gradient_accumulation_steps):
        take_microbatch(trainer, batch, lambda name, work: work())
    memory, resident, phases = Recorder(trainer), plan.resident, plan.phases()
    take_step(trainer, batch, memory)
    policy, reference, state = memory.before
    a = plan.activations
    waiting = len(plan.model.blocks) * a.block.kept + a.shared + a.ends.kept + a.head.kept + a.critic.kept
    wire = Wire()
    with wire:
        take_step(trainer, batch, lambda name, work: work())
    planned = {name: most(phases, name) for name in ("forward", "backward", "step")}
    planned["reference"] = phases.get("forward of the reference model", planning.Memory()).total
    return {
        "parameters": (policy, resident.parameters),
        "gradients": (memory.gradients, phases["step of the optimizer"].gradients),
        "optimizer": (state, resident.optimizer),
        "reference model": (reference, resident.reference),
        "wire": (wire.sent * config.model.gradient_accumulation_steps, sum(plan.wire().values())),
        "activations": (memory.waiting, waiting + plan._gathered(plan.model.root)),
        **{f"peak of the {name}": (memory.peaks.get(name, 0), planned[name]) for name in planned},
        "peak": (max(memory.peaks.values()), plan.peak()[1].total),
    }


def most(phases: dict[str, planning.Memory], name: str) -> int:
    names = {"forward": ("forward",), "backward": ("backward", "reduction"), "step": ("step",)}[name]
    return max(m.total for phase, m in phases.items() if phase.startswith(names) and "reference" not in phase)


def make_trainer(config, case: Case):
    tokenizer = models.load_tokenizer(config)
    if case.processes == 1:
        policy, reference = models.load_policy_and_reference(config, tokenizer, CPU)
    else:  # without the packing check, which nothing that was not sent could pass
        mesh, lm = distributed.device_mesh("cpu", case.replicas), models.load_lm(config, models._policy_dtype(config))
        policy = models.build(config, lm, tokenizer, models.load_value_head(config, lm))
        checkpointing = config.model.activation_checkpointing
        compute, block = models.compute_dtype(config, CPU), config.model.block_name
        sharding.prepare_policy(
            policy, compute, activation_checkpointing=checkpointing, block_name=block, mesh=mesh
        )
        policy.use_packing(True)
        reference = None
        if config.loss.use_reference_model:
            reference = models.build(config, models.load_lm(config, models.reference_dtype(config, CPU)), tokenizer)
            sharding.prepare_reference(reference.requires_grad_(False), block, mesh)
            reference.use_packing(True)
    trainer = getattr(trainers, config.loss.trainer)(policy, reference, tokenizer, config, None, None, "")
    trainer.optimizer = trainer.make_optimizer()
    return trainer


def pairs(n: int) -> list[TokenizedExample]:
    """Of about 230 tokens each."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    return [TokenizedExample(ids(60 + 7 * i), (ids(90 + 5 * i), ids(70 + 9 * i)), (True, False)) for i in range(n)]


def take_microbatch(trainer, batch, run) -> None:
    """As `forward_backward` does, but for the loss: where nothing is sent its numbers have no meaning."""
    forward = getattr(trainer, "token_outputs", trainer.token_logps)
    leaf, into_policy = run("forward", lambda: trainer.policy_leaf(forward, batch))
    if trainer.reference_model is not None:
        run("reference", lambda: trainer.frozen(trainer.token_logps, trainer.reference_model, batch))
    upstream = torch.ones_like(leaf)
    run("backward", lambda: into_policy(upstream))


def take_step(trainer, batch, run) -> None:
    take_microbatch(trainer, batch, run)
    run("step", trainer.optimizer.step)
    trainer.optimizer.zero_grad(set_to_none=True)


class Recorder:
    """Runs the parts of a step under the profiler, which sees each allocation, and keeps the peak of each part."""

    def __init__(self, trainer):
        self.trainer = trainer
        policy, optimizer = list(trainer.policy.parameters()), trainer.optimizer
        state = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
        reference = list(trainer.reference_model.parameters()) if trainer.reference_model is not None else []
        self.before = tuple(map(n_bytes, (policy, reference, state)))
        self.now = sum(self.before) + n_bytes(p.grad for p in policy if p.grad is not None)
        self.peaks: dict[str, int] = {}

    def __call__(self, name: str, work):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
        events = recorded.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        levels = self.now + np.cumsum([change for _, change in changes])
        self.peaks[name] = int(levels.max())
        if name == "forward":
            self.waiting = int(levels[-1]) - self.now
        if name == "backward":
            self.gradients = n_bytes(p.grad for p in self.trainer.policy.parameters())
        self.now = int(levels[-1])
        return result


def n_bytes(tensors) -> int:
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


class Wire(TorchDispatchMode):
    """Bytes that collectives on weights and gradients would send, if they were rings."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [x.nbytes for x in tree_leaves(args) if torch.is_tensor(x)]
            group = next(x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject) and hasattr(x, "size"))
            n, name = group.size(), func.overloadpacket.__name__
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                self.sent += max(sizes) * (n - 1) / n
            elif name == "allreduce_" and sizes[0] > 2**16:  # not the log-probs of a batch
                self.sent += 2 * sizes[0] * (n - 1) / n
        return func(*args, **(kwargs or {}))
