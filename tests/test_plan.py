"""The planner against real training steps on a CPU, of which every allocation is recorded.

A step of several ranks runs as rank 0 alone, with fake collectives that send nothing: it allocates what one rank would.
"""

import ast
import functools
import glob
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from torch._subclasses.fake_tensor import FakeTensorMode  # private: see halos/plan/make.py
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode  # private, as the next: see halos/plan/measure.py
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import halos.plan
import trainers
from halos import adapters, components, distributed, loading, logps, packing_check
from halos.engine import TRAINED, Forward, pieces
from halos.plan.activations import Activations, head_bytes, measure_activations
from halos.plan.make import make_plan
from halos.plan.measure import LiveBytes
from halos.plan.optimizer import optimizer_bytes
from halos.plan.phases import Memory, Plan
from halos.plan.published import PUBLISHED
from halos.plan.setup import Setup, full_layout
from halos.plan.sizes import Group, ModelSizes, group_of, sizes_of
from halos.plan.table import MODELS
from halos.plan.traffic import bytes_sent
from halos.tokens import TokenizedExample
from halos.trainer import BasicTrainer
from helpers import PROJECT, make_config, roles
from small_runs import Batches

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
LORA = "model.use_peft=true"
PPO, ACCUMULATION = "loss=ppo", "model.gradient_accumulation_steps=2"


@dataclass(frozen=True)
class Case:
    architecture: dict
    words: tuple[str, ...] = ()
    ranks: int = 1
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
    "llama, 4 shards": Case(LLAMA, (CHECKPOINTING,), ranks=4),
    "gpt_neox, 2 x 2": Case(NEOX, ("optimizer=AdamW",), ranks=4, replicas=2),
    "critic, accumulation, 4 shards": Case(NEOX, (CHECKPOINTING, PPO, ACCUMULATION), ranks=4),
    "lora": Case(LLAMA, (LORA, "optimizer=AdamW"), n_pairs=2),
    "lora, checkpointing, 4 shards": Case(LLAMA, (LORA, CHECKPOINTING), ranks=4),
}
SLOW_CASES = {
    "ppo": Case(LLAMA, (CHECKPOINTING, PPO)),
    "critic, accumulation": Case(LLAMA, (CHECKPOINTING, PPO, ACCUMULATION)),
    "two forward passes, 2 shards": Case(LLAMA, (CHECKPOINTING, "model.max_tokens_per_forward=130"), ranks=2),
    "llama, bfloat16": Case(LLAMA, (BFLOAT16,)),
    "gpt_neox, bfloat16, checkpointing": Case(NEOX, (BFLOAT16, CHECKPOINTING)),
    "sft, 4 replicas": Case(LLAMA, ("loss=sft",), ranks=4, replicas=4),
    "bfloat16, 4 shards": Case(LLAMA, (BFLOAT16, CHECKPOINTING), ranks=4),
    "bfloat16, 2 x 2": Case(NEOX, (BFLOAT16,), ranks=4, replicas=2),
    "lora, ppo, accumulation": Case(NEOX, (LORA, PPO, ACCUMULATION, CHECKPOINTING)),
    "lora, base in bfloat16": Case(LLAMA, (LORA, CHECKPOINTING, "model.policy_dtype=bfloat16")),
    "lora, bfloat16, 2 x 2": Case(LLAMA, (LORA, BFLOAT16), ranks=4, replicas=2),
    "stored in bfloat16, 2 x 2": Case(LLAMA, (BFLOAT16, "model.policy_dtype=bfloat16"), ranks=4, replicas=2),
}


#### A MEASURED STEP


def measure_all(cases: dict[str, Case]) -> dict[str, dict]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no rank has filled may hold denormal numbers, which are slow
    return {name: measured_and_planned(case) for name, case in cases.items()}


def pretend_to_be_one_of(ranks: int) -> None:
    if dist.is_initialized() and dist.get_world_size() != ranks:
        dist.destroy_process_group()
    if ranks > 1 and not dist.is_initialized():
        # Private, because torch keeps the store of its "fake" backend among its own tests.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def config_of(case: Case):
    fields = [f"++model.architecture.{key}={value}" for key, value in case.architecture.items()]
    block = f"model.block_name={BLOCKS[case.architecture['model_type']]}"
    replicas = f"hsdp_replicas={case.replicas}"
    return make_config("", "loss=dpo", "model=tiny", "optimizer=RMSprop", block, replicas, *fields, *case.words)


def measured_and_planned(case: Case) -> dict:
    """{quantity: (measured bytes, planned bytes)}"""
    pretend_to_be_one_of(case.ranks)
    config = config_of(case)
    examples = pairs(case.n_pairs)
    microbatches = [examples] * config.model.gradient_accumulation_steps
    trainer = make_trainer(config, microbatches)
    plan = plan_of(trainer, examples)
    with Wire(case.replicas) as wire:
        trainer.train_step(microbatches)  # afterwards the optimizer has its state
    step = RecordedStep(trainer, microbatches)
    quantities = {
        **weights(step, plan),
        "wire": (wire.sent, sum(bytes_sent(plan.model, plan.setup).values())),
        "activations": (step.waiting, waiting(plan)),
        **{f"peak of the {name}": (step.peak(name), most(plan.phases(), name)) for name in step.phases},
        "peak": (step.levels.max(), plan.peak()[1].total),
    }
    if plan.setup.forwards > 1:  # the first ones run without gradient, and keep nothing
        del quantities["activations"], quantities["peak of the forward"]
    return quantities


def make_trainer(config, microbatches: list[list[TokenizedExample]]):
    tokenizer = loading.load_tokenizer(config)
    with patch.object(packing_check, "is_wanted", return_value=False):  # fails if weights were not sent
        policy, reference = loading.load_policy_and_reference(config, tokenizer, CPU)
    for model in filter(None, (policy, reference)):
        model.use_packing(True)
    loader = Batches(microbatches)
    trainer = trainer_class(config)(policy, reference, tokenizer, config, loader, loader, "")
    trainer.checks.finite = lambda *args: None  # with fake collectives, log-probs are uninitialised memory
    return trainer


def trainer_class(config) -> type[BasicTrainer]:
    cls = components.find(trainers, config.loss.trainer)
    if config.model.gradient_accumulation_steps == 1:
        return cls
    # PPO runs all microbatches of an update as one batch. The planner plans a critic as the loop would accumulate it.
    return type("Accumulating", (cls,), {"train_step": BasicTrainer.train_step})


def plan_of(trainer, examples: list[TokenizedExample]) -> Plan:
    """The plan of the trainer's step, with the layout of its longest forward pass."""
    config = trainer.config
    runs = pieces(examples, TRAINED, config.model.max_tokens_per_forward, CPU)
    longest = max(runs, key=lambda piece: sum(example.n_tokens for example in piece.examples))
    inputs = trainer.policy.inputs(longest.examples)
    return make_plan(
        config,
        loading.load_config(config),
        distributed.world_size(),
        config.hsdp_replicas,
        forwards=len(runs),
        device="cpu",
        layout=inputs.layout,
        n_targets=len(inputs.targets),
    )


def pairs(n: int) -> list[TokenizedExample]:
    """Pairs with at least 90 tokens each."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    return [TokenizedExample(ids(30 + 5 * i), (ids(35 + 3 * i), ids(25 + 7 * i)), roles(True, False)) for i in range(n)]


def weights(step: "RecordedStep", plan: Plan) -> dict[str, tuple[int, int]]:
    resident, gradients = plan.resident, plan.phases()["step of the optimizer"].gradients
    return {
        "parameters": (step.parameters, resident.parameters),
        "gradients": (step.gradients, gradients),
        "optimizer": (step.optimizer, resident.optimizer),
        "reference model": (step.reference, resident.reference),
    }


def waiting(plan: Plan) -> int:
    """What is planned to be left of a forward pass until its backward pass."""
    a = plan.activations
    kept = len(plan.model.blocks) * a.block.kept + a.shared + a.ends.kept + a.head.kept + a.critic.kept
    return kept + plan._root


def most(phases: dict[str, Memory], part: str) -> int:
    """The maximum over the planned phases of one part of a step."""

    def belongs(phase: str) -> bool:
        of_reference = "reference" in phase
        return {
            "forward": phase.startswith("forward") and not of_reference,
            "reference": of_reference,
            "backward": phase.startswith(("backward", "reduction")),
            "step": phase.startswith("step"),
        }[part]

    return max(memory.total for phase, memory in phases.items() if belongs(phase))


class RecordedStep:
    """A training step under the profiler, which sees every allocation.

    phases: name -> (start, end) in ns, each time that the step went through it
    times, levels: the allocated bytes before the step, and after each change
    """

    def __init__(self, trainer, microbatches: list[list[TokenizedExample]]):
        policy, optimizer = list(trainer.policy.parameters()), trainer.state.optimizer
        state = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
        own = isinstance(trainer.reference_model, adapters.WithoutAdapter)
        reference = trainer.reference_model.parameters() if trainer.reference_model and not own else []
        self.parameters, self.reference, self.optimizer = map(n_bytes, (policy, reference, state))
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "gradients", n_bytes(p.grad for p in policy)))
        with named_phases(trainer), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            trainer.train_step(microbatches)
        self._read(recorded.profiler.kineto_results.events())

    def _read(self, events) -> None:
        self.phases: dict[str, list[tuple[int, int]]] = {}
        for event in events:
            if event.name().startswith(PHASE):
                span = (event.start_ns(), event.end_ns())
                self.phases.setdefault(event.name().removeprefix(PHASE), []).append(span)
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        before = (0, self.parameters + self.reference + self.optimizer)
        self.times, nbytes = np.array([before, *changes]).T
        self.levels = np.cumsum(nbytes)

    def peak(self, name: str) -> int:
        return max(self.levels[self._during(*span)].max() for span in self.phases[name])

    @property
    def waiting(self) -> int:
        """Bytes that the last forward pass of the policy left for its backward pass."""
        levels = self.levels[self._during(*max(self.phases["forward"]))]
        return levels[-1] - levels[0]

    def _during(self, start: int, end: int) -> slice:
        """The changes of a phase, and the last one before it."""
        first, last = np.searchsorted(self.times, (start, end))
        return slice(first - 1, last)


PHASE = "phase: "


@contextmanager
def named_phases(trainer):
    """Inside, the profiler finds the methods that a training step goes through by the name of their phase."""

    def named(name: str, method):
        @functools.wraps(method)
        def wrapper(*args, **kwargs):
            with record_function(PHASE + name):
                return method(*args, **kwargs)

        return wrapper

    run, optimizer = Forward.__init__, trainer.state.optimizer

    def forward(self, model, *args, **kwargs):
        named("forward" if model is trainer.policy else "reference", run)(self, model, *args, **kwargs)

    with (
        patch.object(Forward, "__init__", forward),
        patch.object(Forward, "backward", named("backward", Forward.backward)),
        patch.object(optimizer, "step", named("step", optimizer.step)),
    ):
        yield


def n_bytes(tensors) -> int:
    return sum(distributed.local(x).nbytes for x in tensors if x is not None)


class Wire(TorchDispatchMode):
    """Counts the bytes that the collectives on weights and gradients would send in rings."""

    def __init__(self, replicas: int):
        super().__init__()
        self.replicas = replicas
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes = [x.nbytes for x in tree_leaves(args) if torch.is_tensor(x)] if func.namespace == "c10d" else []
        if func.__name__.startswith(("_allgather_base_", "_reduce_scatter_base_")):
            self.sent += max(sizes) - min(sizes)  # the shards of the other ranks, gathered or to be reduced
        elif func.__name__.startswith("allreduce_") and max(sizes) > 2**16:  # log-probs of a batch are smaller
            self.sent += 2 * sum(sizes) * (self.replicas - 1) / self.replicas
        return func(*args, **(kwargs or {}))


#### MEASURED AND PLANNED


def in_a_process(cases: dict[str, Case]) -> dict[str, dict]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_all, cases).result()


@pytest.fixture(scope="module")
def measured():
    return in_a_process(CASES)


def compare(quantities: dict[str, tuple[float, float]]) -> None:
    """Weights and traffic are exact; peaks and activations are within 5 %."""
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
    """Views and tensors from before take nothing; the peak counts tensors that are alive together."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        x = before[:500] + 1  # 2000 bytes
        y = x.view(5, 100) * 2  # another 2000
        x = x[1:] * 1  # another 1996, and then the first 2000 are freed
        assert (live.now, live.peak) == (3996, 5996)
        del x, y
    assert (live.now, live.peak) == (0, 5996)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("n_chunks, trains", [(1, True), (3, True), (1, False)])
def test_head(n_chunks, trains, softcap, monkeypatch):
    """`head_bytes` against the allocations of logps.fused."""
    n, d, vocab = 240, 64, 4096
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", n * vocab // n_chunks)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(vocab, d, requires_grad=trains)
    targets = torch.randint(vocab, (n,))

    def peak(work):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        return result, np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])

    values, forward = peak(lambda: logps.fused(hidden, weight, targets, softcap=softcap))
    upstream = torch.ones_like(values)
    _, backward = peak(lambda: values.backward(upstream))
    model = ModelSizes([], group_of([weight]), Group(()), vocab, d, softcap is not None)
    planned = head_bytes(model, setup(n_targets=n))
    assert planned.forward == pytest.approx(hidden.nbytes + forward.max(), rel=0.01)
    assert planned.kept == pytest.approx(hidden.nbytes + forward[-1], rel=0.01)
    assert planned.backward == pytest.approx(hidden.nbytes + forward[-1] + backward.max(), rel=0.01)


def setup(**changes) -> Setup:
    defaults = {
        "shards": 1,
        "replicas": 1,
        "stored": torch.float32,
        "compute": torch.float32,
        "reference": None,
        "layout": full_layout(1024, 256),
        "n_targets": 1024,
        "forwards": 1,
        "microbatches": 1,
        "checkpointing": False,
        "cuda": False,
    }
    return Setup(**(defaults | changes))


@pytest.mark.parametrize(
    "name, kwargs, state, step",
    [
        ("RMSprop", {}, 1, 1),  # the squares; in a step of all parameters at once, their roots
        ("RMSprop", {"centered": True, "momentum": 0.9}, 3, 1),
        ("AdamW", {}, 2, 0),  # one kernel for all of it
        ("AdamW", {"foreach": True}, 2, 1),
        ("AdamW", {"foreach": False}, 2, 2),  # of one parameter at a time
        ("AdamW", {"amsgrad": True}, 3, 0),
        ("SGD", {}, 0, 0),
        ("SGD", {"momentum": 0.9}, 1, 0),
    ],
)
def test_optimizers(name, kwargs, state, step):
    """State and step, in tensors of the size of the parameters."""
    found = optimizer_bytes(name, kwargs, torch.float32, cuda=True)
    assert found.state == state and found.step == pytest.approx(step, abs=0.01)
    assert found.all_at_once == (kwargs.get("foreach", True) and (name == "RMSprop" or "foreach" in kwargs))


def test_muon_keeps_one_number_for_a_hidden_weight_and_two_for_others():
    """48 hidden weights, 64 others: 48 + 2 * 64. A step takes more than the largest hidden matrix."""
    shapes = [torch.Size((4, 12)), torch.Size((8,))]
    model = ModelSizes([Group(tuple(shapes))], Group((torch.Size((14, 4)),)), Group(()), 14, 4, False)
    found = optimizer_bytes("Muon", {}, torch.float32, cuda=False, model=model)
    assert found.state * 112 == pytest.approx(48 + 2 * 64)
    assert 48 * 4 < found.matrix < 10 * 48 * 4


def test_the_attention_of_a_gpu_saves_no_scores():
    """A token saves in each block of a Llama: queries, keys, values and output, of d numbers with 2 bytes each, and a
    float32 log-sum-exp per head. It saves the same amount when sequences are twice as long."""
    config = AutoConfig.for_model(**(LLAMA | {"num_key_value_heads": 8}))
    kept = []
    for length in (256, 512):
        layout = full_layout(1024, length)
        kept.append(activations(config, setup(compute=torch.bfloat16, cuda=True, layout=layout)).block.kept)
    assert kept[1] == pytest.approx(kept[0], rel=1e-3)
    q_k_v_output = 4 * 2 * 512
    assert kept[0] / 1024 > q_k_v_output + 4 * 8


def activations(config, of: Setup) -> Activations:
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = AutoModelForCausalLM.from_config(config, dtype=of.compute)
        return measure_activations(lm, sizes_of(lm, None), of, None)


def test_checkpointing_keeps_the_inputs_of_blocks():
    config = AutoConfig.for_model(**LLAMA)
    measured = activations(config, setup(compute=torch.bfloat16, cuda=True, checkpointing=True))
    assert measured.block.kept == measured.hidden == 1024 * 512 * 2


def test_selective_checkpointing_keeps_the_attention_of_a_gpu():
    """Beside its input a block keeps the output of `varlen_attn` (512 numbers of 2 bytes a token) and its log-sum-exp
    (a float32 for each of 8 heads)."""
    config = AutoConfig.for_model(**LLAMA)
    found = activations(config, setup(compute=torch.bfloat16, cuda=True, checkpointing="selective"))
    assert found.block.kept == pytest.approx(found.hidden + 1024 * (512 * 2 + 8 * 4), abs=64)


def test_shards_are_padded():
    """FSDP cuts the first dimension: 10 rows of 3 on 4 ranks are 3 rows each; a vector of 5 is 2 each."""
    group = Group((torch.Size([10, 3]), torch.Size([5])))
    assert (group.elements, group.shard(4), group.gathered(4)) == (35, 11, 44)


#### THE ROOMS


def test_nothing_else_in_halos_imports_the_planner():
    """The engine does not need it: `halos/plan/` can be read, changed or deleted on its own."""
    rooms = os.path.join(PROJECT, "halos")
    for path in glob.glob(os.path.join(rooms, "**", "*.py"), recursive=True):
        if os.path.dirname(path) != os.path.join(rooms, "plan"):
            assert not any(name.startswith("halos.plan") for name in imports_of(path)), path


def imports_of(path: str) -> set[str]:
    """Full names of the modules, and of what is imported from them."""
    with open(path) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def test_the_map_lists_every_room_and_imports_nothing():
    code = "import sys, halos.plan; print(sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    rooms = {os.path.basename(path) for path in glob.glob(os.path.join(PROJECT, "halos", "plan", "*.py"))}
    listed = [line.split()[0] for line in halos.plan.__doc__.splitlines() if line.startswith("    ")]
    assert set(listed) == rooms - {"__init__.py"} and len(listed) == len(set(listed))


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


# Parameters of the checkpoints on the hub.
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
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PUBLISHED[name]))
    assert sum(group.elements for group in sizes_of(lm, None).groups) == PARAMETERS[name]


def test_published_models_are_those_of_the_config(program):
    configs = [make_config("", f"model={name}") for name in MODELS]
    assert {config.model.name_or_path for config in configs} == set(PUBLISHED)
    files = {name.removesuffix(".yaml") for name in os.listdir(os.path.join(PROJECT, "config", "model"))}
    assert files == {*MODELS, "tiny", "base_model"}


def test_llama_13b_on_eight_gpus(plan):
    """13.016e9 float32 numbers on 8 GPUs are 6.06 GiB each; bfloat16 goes around the ring of 8 twice, the root once:
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
        "model.use_peft=true model.lora.targets=[q_pro]": ["model.lora.targets=q_pro", "did you mean 'q_proj'?"],
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
