"""The planner against what it plans: real steps on a CPU, every allocation of which is recorded.

Steps of several processes run in one, whose collectives send nothing: it allocates what one of them would.
"""

import importlib.util
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
from torch._subclasses.fake_tensor import FakeTensorMode  # private: see halos/planning.py
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode  # private, as the next: see halos/measuring.py
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import trainers
from halos import distributed, loading, logps, measuring, planning, sharding
from halos.tokens import TokenizedExample
from helpers import PROJECT, make_config

CPU = torch.device("cpu")
VOCAB = 8192
LLAMA = {  # 20M parameters
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
}
NEOX = {  # 21M
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
BLOCKS = {"llama": "LlamaDecoderLayer", "gpt_neox": "GPTNeoXLayer"}
CHECKPOINTING = "model.activation_checkpointing=true"
BFLOAT16 = "model.fsdp_policy_mp=bfloat16"
PPO, ACCUMULATION = "loss=ppo", "model.gradient_accumulation_steps=2"


@dataclass(frozen=True)
class Case:
    architecture: dict
    words: tuple[str, ...] = ()
    processes: int = 1
    replicas: int = 1
    n_pairs: int = 4


CASES = {
    "llama": Case(LLAMA, n_pairs=2),
    "llama, checkpointing": Case(LLAMA, (CHECKPOINTING,), n_pairs=2),
    "gpt_neox": Case(NEOX, ("optimizer=AdamW",), n_pairs=2),
    "gpt_neox, checkpointing": Case(
        NEOX, (CHECKPOINTING, "optimizer=SGD", "++optimizer_kwargs.momentum=0.9"), n_pairs=2
    ),
    "bfloat16, small": Case(LLAMA | {"hidden_size": 128, "intermediate_size": 344}, (CHECKPOINTING, BFLOAT16)),
    "llama, 4 shards": Case(LLAMA, (CHECKPOINTING,), processes=4),
    "gpt_neox, 2 x 2": Case(NEOX, ("optimizer=AdamW",), processes=4, replicas=2),
    "critic, accumulation, 4 shards": Case(NEOX, (CHECKPOINTING, PPO, ACCUMULATION), processes=4),
}
SLOW_CASES = {
    "critic, accumulation": Case(LLAMA, (CHECKPOINTING, PPO, ACCUMULATION)),
    "two forwards, 2 shards": Case(LLAMA, (CHECKPOINTING, "model.max_tokens_per_forward=130"), processes=2),
    "llama, bfloat16": Case(LLAMA, (BFLOAT16,)),
    "gpt_neox, bfloat16, checkpointing": Case(NEOX, (BFLOAT16, CHECKPOINTING)),
    "sft, 4 replicas": Case(LLAMA, ("loss=sft",), processes=4, replicas=4),
    "bfloat16, 4 shards": Case(LLAMA, (BFLOAT16, CHECKPOINTING), processes=4),
    "bfloat16, 2 x 2": Case(NEOX, (BFLOAT16,), processes=4, replicas=2),
    "stored in bfloat16, 2 x 2": Case(LLAMA, (BFLOAT16, "model.policy_dtype=bfloat16"), processes=4, replicas=2),
}


#### A STEP, MEASURED (in a process of its own)


def measure_all(cases: dict[str, Case]) -> dict[str, dict]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what nobody sent may be denormal, and slow
    return {name: measured_and_planned(case) for name, case in cases.items()}


def pretend_to_be_one_of(processes: int) -> None:
    if dist.is_initialized() and dist.get_world_size() != processes:
        dist.destroy_process_group()
    if processes > 1 and not dist.is_initialized():
        # Private, because torch keeps the store of its "fake" backend among its own tests.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)


def config_of(case: Case):
    fields = [f"++model.architecture.{key}={value}" for key, value in case.architecture.items()]
    block = f"model.block_name={BLOCKS[case.architecture['model_type']]}"
    return make_config("", "loss=dpo", "model=tiny", "optimizer=RMSprop", block, *fields, *case.words)


def measured_and_planned(case: Case) -> dict:
    """{quantity: (measured bytes, planned bytes)}"""
    pretend_to_be_one_of(case.processes)
    config = config_of(case)
    trainer = make_trainer(config, case)
    batch = pairs(case.n_pairs)
    forwards = trainer.forwards(batch)
    longest = max((examples for examples, _ in forwards), key=lambda run: sum(example.n_tokens for example in run))
    inputs = trainer.policy.inputs(longest)
    plan = planning.make_plan(
        config,
        loading.load_config(config),
        case.processes,
        case.replicas,
        forwards=len(forwards),
        device="cpu",
        layout=inputs.layout,
        n_targets=len(inputs.targets),
    )
    with Wire(case.replicas) as wire:
        take_step(trainer, batch, lambda name, work: work())  # after which the optimizer has its state
    for _ in range(1, config.model.gradient_accumulation_steps):
        take_microbatch(trainer, batch, lambda name, work: work())
    memory, resident, phases = Recorder(trainer), plan.resident, plan.phases()
    take_step(trainer, batch, memory)
    policy, reference, state = memory.before
    a = plan.activations
    waiting = len(plan.model.blocks) * a.block.kept + a.shared + a.ends.kept + a.head.kept + a.critic.kept
    planned = {name: most(phases, name) for name in memory.peaks}
    quantities = {
        "parameters": (policy, resident.parameters),
        "gradients": (memory.gradients, phases["step of the optimizer"].gradients),
        "optimizer": (state, resident.optimizer),
        "reference model": (reference, resident.reference),
        "wire": (wire.sent * config.model.gradient_accumulation_steps, sum(plan.wire().values())),
        "activations": (memory.waiting, waiting + plan._gathered(plan.model.root)),
        **{f"peak of the {name}": (memory.peaks[name], planned[name]) for name in planned},
        "peak": (max(memory.peaks.values()), plan.peak()[1].total),
    }
    if len(forwards) > 1:  # the first ones are without gradient, and leave nothing
        del quantities["activations"], quantities["peak of the forward"]
    return quantities


def most(phases: dict[str, planning.Memory], part: str) -> int:
    """The largest of the phases that a part of a step goes through."""

    def belongs(phase: str) -> bool:
        if part == "forward":
            return phase.startswith("forward") and "reference" not in phase
        return phase.startswith({"backward": ("backward", "reduction"), "step": "step"}.get(part, part)) or (
            part == "reference" and part in phase
        )

    return max(memory.total for phase, memory in phases.items() if belongs(phase))


def make_trainer(config, case: Case):
    tokenizer = loading.load_tokenizer(config)
    if case.processes == 1:
        policy, reference = loading.load_policy_and_reference(config, tokenizer, CPU)
    else:  # without the packing check, which nothing that was not sent could pass
        mesh, lm = distributed.device_mesh("cpu", case.replicas), loading.load_lm(config, loading.policy_dtype(config))
        policy = loading.build(config, lm, tokenizer, loading.load_value_head(config, lm))
        checkpointing = config.model.activation_checkpointing
        compute, block = loading.compute_dtype(config, CPU), config.model.block_name
        sharding.prepare_policy(policy, compute, activation_checkpointing=checkpointing, block_name=block, mesh=mesh)
        policy.use_packing(True)
        reference = None
        if config.loss.use_reference_model:
            reference = loading.build(config, loading.load_lm(config, loading.reference_dtype(config, CPU)), tokenizer)
            sharding.prepare_reference(reference.requires_grad_(False), block, mesh)
            reference.use_packing(True)
    trainer = getattr(trainers, config.loss.trainer)(policy, reference, tokenizer, config, None, None, "")
    trainer.optimizer = trainer.make_optimizer()
    return trainer


def pairs(n: int) -> list[TokenizedExample]:
    """Of 90 tokens and more each."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    return [TokenizedExample(ids(30 + 5 * i), (ids(35 + 3 * i), ids(25 + 7 * i)), (True, False)) for i in range(n)]


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
    """Bytes that the collectives on weights and gradients would send in rings."""

    def __init__(self, replicas: int):
        super().__init__()
        self.replicas = replicas
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes = [x.nbytes for x in tree_leaves(args) if torch.is_tensor(x)] if func.namespace == "c10d" else []
        if func.__name__.startswith(("_allgather_base_", "_reduce_scatter_base_")):
            self.sent += max(sizes) - min(sizes)  # what the others have, or what they are to have
        elif func.__name__.startswith("allreduce_") and max(sizes) > 2**16:  # not the log-probs of a batch
            self.sent += 2 * sum(sizes) * (self.replicas - 1) / self.replicas
        return func(*args, **(kwargs or {}))


#### MEASURED = PLANNED


def in_a_process(cases: dict[str, Case]) -> dict[str, dict]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_all, cases).result()


@pytest.fixture(scope="module")
def measured():
    return in_a_process(CASES)


def compare(quantities: dict[str, tuple[float, float]]) -> None:
    """Sizes of weights and traffic are exact, up to padding; peaks and activations within a twentieth."""
    for name, (measured, planned) in quantities.items():
        if name in ("parameters", "gradients", "optimizer", "reference model"):
            assert planned == measured, name
        elif name == "wire":
            assert planned == pytest.approx(measured, rel=1e-6), name
        else:
            assert planned == pytest.approx(measured, rel=0.05), name


@pytest.mark.parametrize("name", CASES)
def test_a_step(measured, name):
    compare(measured[name])


@pytest.mark.slow
def test_more_steps():
    for quantities in in_a_process(SLOW_CASES).values():
        compare(quantities)


#### THE PARTS


def test_live_bytes():
    """Views and what was there before are free; a peak is of what is alive together."""
    before = torch.zeros(1000)
    with measuring.LiveBytes() as live:
        x = before[:500] + 1  # 2000 bytes
        y = x.view(5, 100) * 2  # 2000 more
        x = x[1:] * 1  # 1996 more, and then the first 2000 are free
        assert (live.now, live.peak) == (3996, 5996)
        del x, y
    assert (live.now, live.peak) == (0, 5996)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("n_chunks", [1, 3])
def test_head(n_chunks, softcap, monkeypatch):
    """`head_bytes` against the allocations of logps.fused."""
    n, d, vocab = 240, 64, 4096
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", n * vocab // n_chunks)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(vocab, d, requires_grad=True)
    targets = torch.randint(vocab, (n,))

    def peak(work):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        return result, np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])

    values, forward = peak(lambda: logps.fused(hidden, weight, targets, softcap=softcap))
    upstream = torch.ones_like(values)
    _, backward = peak(lambda: values.backward(upstream))
    model = planning.Model([], measuring.Group(()), measuring.Group(()), vocab, d, softcap is not None)
    planned = measuring.head_bytes(model, setup(n_targets=n))
    assert planned.forward == pytest.approx(hidden.nbytes + forward.max(), rel=0.01)
    assert planned.kept == pytest.approx(hidden.nbytes + forward[-1], rel=0.01)
    assert planned.backward == pytest.approx(hidden.nbytes + forward[-1] + backward.max(), rel=0.01)


def setup(**changes) -> measuring.Setup:
    defaults = {
        "shards": 1,
        "replicas": 1,
        "stored": torch.float32,
        "compute": torch.float32,
        "reference": None,
        "layout": planning.full_layout(1024, 256),
        "n_targets": 1024,
        "forwards": 1,
        "microbatches": 1,
        "checkpointing": False,
        "cuda": False,
    }
    return measuring.Setup(**(defaults | changes))


@pytest.mark.parametrize(
    "name, kwargs, state, step",
    [
        ("RMSprop", {}, 1, 1),  # the squares; in a step of all parameters at once, their roots
        ("RMSprop", {"centered": True, "momentum": 0.9}, 3, 1),
        ("AdamW", {}, 2, 1),
        ("AdamW", {"foreach": False}, 2, 2),  # but of one parameter at a time
        ("AdamW", {"amsgrad": True}, 3, 1),
        ("SGD", {}, 0, 0),
        ("SGD", {"momentum": 0.9}, 1, 0),
    ],
)
def test_optimizers(name, kwargs, state, step):
    """Tensors of the size of the parameters that they keep, and that a step makes."""
    found = measuring.optimizer_bytes(name, kwargs, torch.float32, cuda=True)
    assert found.state == state and found.step == pytest.approx(step, abs=0.01)
    assert found.all_at_once == kwargs.get("foreach", True)


def test_the_attention_of_a_gpu_saves_no_scores():
    """Per token and block of a Llama in bfloat16: queries, keys, values, output in d numbers of 2 bytes each, a float32
    log-sum-exp per head. Twice the length of the sequences, and a token still takes as much."""
    config = AutoConfig.for_model(**(LLAMA | {"num_key_value_heads": 8}))
    kept = []
    for length in (256, 512):
        layout = planning.full_layout(1024, length)
        kept.append(activations(config, setup(compute=torch.bfloat16, cuda=True, layout=layout)).block.kept)
    assert kept[1] == pytest.approx(kept[0], rel=1e-3)
    q_k_v_output = 4 * 2 * 512
    assert kept[0] / 1024 > q_k_v_output + 4 * 8


def activations(config, of: measuring.Setup) -> measuring.Activations:
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = AutoModelForCausalLM.from_config(config, dtype=of.compute)
        return planning.measure_activations(lm, measuring.sizes(lm, None), of, None)


def test_checkpointing_keeps_the_inputs_of_blocks():
    config = AutoConfig.for_model(**LLAMA)
    measured = activations(config, setup(compute=torch.bfloat16, cuda=True, checkpointing=True))
    assert measured.block.kept == measured.hidden == 1024 * 512 * 2


def test_shards_are_padded():
    """FSDP cuts the first dimension: 10 rows of 3 over 4 processes are 3 rows each; a vector of 5 is 2."""
    group = measuring.Group((torch.Size([10, 3]), torch.Size([5])))
    assert (group.elements, group.shard(4), group.gathered(4)) == (35, 11, 44)


#### THE PROGRAM


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("plan", os.path.join(PROJECT, "scripts", "plan.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan(program, monkeypatch, capsys):
    """plan(words...) -> (exit code, stdout, stderr)"""

    def run(*words: str):
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        code = 0
        try:
            program.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return run


# Of the checkpoints on the hub.
PARAMETERS = {
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "huggyllama/llama-30b": 32_528_943_616,
    "huggyllama/llama-65b": 65_285_660_672,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameters(program, name):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**program.PUBLISHED[name]))
    assert sum(group.elements for group in measuring.sizes(lm, None).groups) == PARAMETERS[name]


def test_published_models_are_those_of_the_config(program):
    configs = [make_config("", f"model={name}") for name in program.TABLE_MODELS]
    assert {config.model.name_or_path for config in configs} == set(program.PUBLISHED)
    files = {name.removesuffix(".yaml") for name in os.listdir(os.path.join(PROJECT, "config", "model"))}
    assert files == {*program.TABLE_MODELS, "tiny", "base_model"}


def test_llama_13b_on_eight_gpus(plan):
    """13.016e9 float32 numbers over 8 GPUs are 6.06 GiB; bfloat16 goes twice around the ring of 8, the root once:
    2 * (2 * 12.688e9 + 0.328e9) * 7 / 8 = 45.0 GB, and gradients in float32 are 4 * 13.016e9 * 7 / 8 = 45.6 GB."""
    code, out, err = plan("model=llama13b", "gpus=8", "gpu_memory=80")
    assert code == 0, err
    rows = {line[:40].strip(): line[40:].split() for line in out.splitlines()}
    assert rows["parameters"] == ["6.06", "6.06"] and rows["gradients"][0] == "6.06"
    assert rows["reference model"] == ["0.00", "0.00"]
    assert "45.0 weights, 45.6 gradients" in out and "it fits: " in out and "built-in facts" in out
    assert float(rows["peak"][0]) == pytest.approx(sum(float(rows[label][1]) for label in plan_rows(rows)), abs=0.03)


def plan_rows(rows: dict[str, list[str]]) -> list[str]:
    labels = list(rows)
    return labels[labels.index("parameters") : labels.index("peak")]


def test_a_local_directory_and_what_does_not_fit(plan, tmp_path):
    AutoConfig.for_model(**(LLAMA | {"num_hidden_layers": 2})).save_pretrained(tmp_path)
    words = ["model=base_model", "model.name=own", f"model.name_or_path={tmp_path}", "loss=kto", "optimizer=AdamW"]
    code, out, err = plan(*words, "gpus=16", "gpu_memory=0.5", "model.max_tokens_per_forward=1024")
    assert code == 0 and f"config.json of {tmp_path}" in out and "2 x 8" in out, err
    assert "it fits" in out and "gradients among replicas" in out
    _, out, _ = plan(*words, "gpus=2", "gpu_memory=0.2", "model.max_tokens_per_forward=512")
    assert "it does not fit" in out and "hsdp_replicas=1 does" in out
    _, out, _ = plan(*words, "gpu_memory=0.01")
    assert "lower model.max_tokens_per_forward" in out


@pytest.mark.parametrize(
    "words, parts",
    {
        "gpus=eight": ["gpus=eight", "gpus=8"],
        "gpus=0": ["gpus=0"],
        "gpu_memory=-1": ["gpu_memory=-1", "gpu_memory=80"],
        "gpus=8 nodes=3": ["nodes=3", "1, 2, 4, 8"],
        "gpus=8 hsdp_replicas=3": ["hsdp_replicas=3", "1, 2, 4, 8"],
        "model=lama13b": ["lama13b", "did you mean 'llama13b'"],
        "loss.bta=0.2": ["bta"],
        "model.packing=false": ["model.packing=false", "auto"],
        "model.logps=plain": ["model.logps=plain", "fused"],
        "model.name_or_path=/no/such/model": ["/no/such/model"],
    }.items(),
)
def test_mistakes_are_one_line(plan, words, parts):
    code, _, err = plan(*words.split())
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.slow
def test_the_table_is_what_the_program_writes():
    command = [sys.executable, "scripts/plan.py", "table"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    with open(os.path.join(PROJECT, "docs", "scaling_tables.md")) as file:
        assert file.read() == done.stdout, done.stderr
