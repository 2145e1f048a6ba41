"""One row of `benchmarks/gpu.py`: a training step of ours, one of TRL, or a look at the machine.

    python -m benchmarks.gpu_step --loss=dpo --shape=neox-1.4b --checkpointing=selective NUMBERS.json

Weights are random, on the device, and no file of a model is needed. Our step is the trainer's own `train_step`: forward
and backward pass, clipping, AdamW. Reference log-probs are known, as they are with the cache, or computed live by a
second model. Batches have SHP-like lengths, three different ones in turn, and each fits one forward pass. FLOPs are
counted as 6 per weight and unique token, in the head per response token, so recomputation counts as lost time.
"""

import argparse
import importlib.util
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import trainers
from benchmarks.rate import matmul_rate, seconds
from benchmarks.workload import body_parameters, shp_like_pairs
from halos import distributed, packing, packing_check, sharding
from halos.config_keys import CONFIG_DIR
from halos.engine import Forward
from halos.errors import UserError
from halos.models import PolicyModel
from halos.tokens import Role, TokenizedExample

Batch = list[TokenizedExample]

SHAPES: dict[str, dict[str, Any]] = {
    "neox-1.4b": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
N_PAIRS = {"neox-1.4b": 32, "llama-8b": 16}  # a batch has about 500 unique tokens per pair
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VOCABULARY, SMALL_LENGTH = 512, 64
PACKAGES = {  # what a row or a faster kernel needs, besides the project's own dependencies
    "pytest": "pytest (the tests; pip install pytest)",
    "trl": "trl (the rows of TRL; pip install -e '.[bench]')",
    "liger_kernel": "liger-kernel (TRL at its best; pip install liger-kernel)",
    "torch.nn.attention.varlen": "torch.nn.attention.varlen (attention of packs; pip install 'torch>=2.11')",
}


class Lacks(Exception):
    """Something that is not installed, or not supported here: the row is skipped."""


#### WHAT IS RUN


def architecture(shape: str, small: bool) -> dict[str, Any]:
    fields = SHAPES[shape]
    if not small:
        return fields
    grouped = {"num_key_value_heads": 2} if "num_key_value_heads" in fields else {}
    return fields | SMALL | grouped | {"vocab_size": SMALL_VOCABULARY}


def random_lm(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:
        lm_config = AutoConfig.for_model(**architecture(args.shape, args.small))
        return AutoModelForCausalLM.from_config(lm_config, dtype=dtype)


def batches_of(args: argparse.Namespace, vocab_size: int) -> list[Batch]:
    """Three batches of pairs; for KTO of single responses to as many prompts, chosen and rejected in turn."""
    n_pairs = 2 if args.small else args.n_pairs or N_PAIRS[args.shape]
    lengths = {"max_length": SMALL_LENGTH} if args.small else {}
    found = [shp_like_pairs(n_pairs, vocab_size, seed, **lengths) for seed in range(3)]
    if args.loss == "kto":
        found = [[one.only([i % 2]) for i, one in enumerate(batch)] for batch in found]
    assert args.loss != "kto" or {one.roles for one in found[0]} == {(Role.CHOSEN,), (Role.REJECTED,)}
    return found


def config_of(args: argparse.Namespace, max_tokens: int) -> DictConfig:
    """Compose the config of `python train.py`, with AdamW."""
    words = ["optimizer=AdamW", "lr=1e-6", "warmup_steps=0", "minimum_log_interval_secs=1e9"]
    words += [f"loss={args.loss}", f"model.max_tokens_per_forward={max_tokens}"]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("config", words)


def make_policy(args: argparse.Namespace, device: torch.device) -> PolicyModel:
    """Build the policy as a run does: checked for packing, and prepared for mixed precision."""
    policy = PolicyModel(random_lm(args, device, getattr(torch, args.weights)))
    dtype = compute_dtype(device)
    float32 = packing_check.in_float32(policy)
    try:
        checkpointing: Any = {"true": True, "false": False}.get(args.checkpointing, args.checkpointing)
        sharding.prepare_policy(policy, dtype, activation_checkpointing=checkpointing, compile=args.compile == "true")
    except UserError as problem:
        raise Lacks(str(problem)) from problem
    packs, reason = packing_check.choose(policy, "auto", dtype, float32)
    policy.use_packing(packs)
    policy.description = "" if packs else f"padded, not packed: {reason}"
    return policy


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_reference(args: argparse.Namespace, policy: PolicyModel, device: torch.device) -> PolicyModel:
    """The same weights again, in the dtype in which the policy computes."""
    reference = PolicyModel(random_lm(args, device, compute_dtype(device))).requires_grad_(False)
    reference.use_packing(policy.packs)
    return reference.eval()


class KnownLogps:
    """Stands in for the reference cache: log-probs of the batches under the policy as it is now, on the CPU."""

    def __init__(self, policy: PolicyModel, batches: list[Batch], max_tokens: int):
        with torch.no_grad():
            self.known = {self._key(b): Forward(policy, b, max_tokens).tokens.logps.cpu() for b in batches}
        sharding.reshard(policy)

    def logps(self, examples: Batch) -> torch.Tensor:
        return self.known[self._key(examples)]

    @staticmethod
    def _key(examples: Batch) -> bytes:
        return b"".join(one.prompt.tobytes() for one in examples)


class Endless:
    """A loader as far as a trainer asks it for its length."""

    def __init__(self, batches: list[Batch]):
        self.total_examples, self.examples_seen = sum(map(len, batches)), 0

    def __len__(self) -> int:
        return 3

    def state_dict(self) -> dict[str, int]:
        return {"examples_seen": self.examples_seen}


def make_trainer(args: argparse.Namespace, batches: list[Batch], device: torch.device):
    max_tokens = max(sum(one.n_tokens for one in batch) for batch in batches)
    policy = make_policy(args, device)
    live = args.reference == "live"
    reference = make_reference(args, policy, device) if live else None
    trainer_class = {"dpo": trainers.DPOTrainer, "kto": trainers.KTOTrainer}[args.loss]
    loader: Any = Endless(batches)
    trainer = trainer_class(policy, reference, None, config_of(args, max_tokens), loader, loader, "")
    if not live:
        known: Any = KnownLogps(policy, batches, max_tokens)
        trainer.reference_cache = known
    return trainer


#### THE ROWS


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps on three batches in turn, after one step on each."""
    vocab_size = architecture(args.shape, args.small)["vocab_size"]
    batches = batches_of(args, vocab_size)
    trainer = make_trainer(args, batches, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warm_up = [seconds(partial(trainer.train_step, [batch]), device) for batch in batches]
    turns = [batches[i % 3] for i in range(3 if args.small else args.steps)]
    times = [seconds(partial(trainer.train_step, [batch]), device) for batch in turns]
    live = args.reference == "live"
    flops = sum(floor_flops(trainer.policy, batch, live) for batch in turns)
    notes = [f"first step {warm_up[0]:.0f} s"] if args.compile == "true" else []
    notes += [trainer.policy.description] if trainer.policy.description else []
    return summary(turns, times, peak_memory(device)) | {
        "flops_per_second": flops / sum(times),
        "note": "; ".join(notes),
    }


def summary(turns: list[Batch], times: list[float], peak: int) -> dict[str, Any]:
    """tokens_per_second: each token once, without padding, a shared prompt once."""
    return {
        "tokens_per_second": sum(n_unique(batch) for batch in turns) / sum(times),
        "examples_per_second": sum(map(len, turns)) / sum(times),
        "peak_bytes": peak,
    }


def n_unique(batch: Batch) -> int:
    return packing.pack(batch).input_ids.numel()


def floor_flops(policy: PolicyModel, batch: Batch, live: bool) -> int:
    """FLOPs that a step needs at least: 6 per weight and token, and 2 in a live reference; attention not counted."""
    n_targets = sum(n for one in batch for n in one.n_targets)
    head = policy.lm.get_output_embeddings().weight.numel()
    return (8 if live else 6) * (body_parameters(policy) * n_unique(batch) + head * n_targets)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peer(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time TRL on the same batches, with reference log-probs computed before, by the process of the comparison."""
    if importlib.util.find_spec("trl") is None:
        raise Lacks(PACKAGES["trl"])
    from benchmarks.throughput.block import Block

    with tempfile.TemporaryDirectory() as folder:
        lm = random_lm(args, device, torch.float32)
        batches = batches_of(args, lm.config.vocab_size)
        lm.save_pretrained(os.path.join(folder, "model"))
        del lm
        if device.type == "cuda":
            torch.cuda.empty_cache()
        turns = batches if args.small else batches * (1 + args.steps // 3)  # the first three warm up
        given, made, wanted = (os.path.join(folder, name) for name in ("batches.pickle", "block.json", "result.json"))
        with open(given, "wb") as file:
            pickle.dump(turns, file)
        dtype = str(compute_dtype(device)).removeprefix("torch.")
        block = Block(
            way="trl_precomputed", loss=args.loss, model=os.path.join(folder, "model"), device=device.type, dtype=dtype,
            batches=given, checks=False, beside_other_work=True,
        )  # fmt: skip
        with open(made, "w") as file:
            json.dump(vars(block), file)
        subprocess.run([sys.executable, "-m", "benchmarks.throughput.block", made, wanted], check=True)
        with open(wanted) as file:
            result = json.load(file)
    skipped = 0 if args.small else 3
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "torch")
    return summary(turns[skipped:], result["seconds"][skipped:], result["peak_memory"]) | {
        "note": f"reference precomputed; {versions}"
    }


def probe(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Name the machine, what is not installed, and the rate of a large matrix product."""
    side, dtype = 256 if args.small else 8192, compute_dtype(device)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else distributed.free_memory(device)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "memory": memory / 2**30,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "side": side,
        "rate": statistics.median(matmul_rate(device, dtype, side) for _ in range(3)),
        "lacks": [text for name, text in PACKAGES.items() if not is_installed(name)],
    }


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


#### THE PROCESS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["dpo", "kto"], default="dpo")
    parser.add_argument("--shape", choices=list(SHAPES), default="neox-1.4b")
    parser.add_argument("--checkpointing", choices=["false", "true", "selective"], default="false")
    parser.add_argument("--compile", choices=["false", "true"], default="false")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32", help="dtype of stored weights")
    parser.add_argument("--reference", choices=["cached", "live"], default="cached")
    parser.add_argument("--n_pairs", type=int, default=0, help="pairs in a batch; 0: as many as suit the shape")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peer", action="store_true", help="TRL's step, not ours")
    parser.add_argument("--probe", action="store_true", help="look at the machine")
    parser.add_argument("path", help="where the numbers go")
    args = parser.parse_args()
    code, numbers = 0, {}
    try:
        if not args.small and not torch.cuda.is_available():
            raise Lacks("torch sees no GPU; run this on a machine with one, or with --small for the logic on a CPU")
        device = torch.device("cpu") if args.small else distributed.default_device()
        numbers = (probe if args.probe else peer if args.peer else step)(args, device)
    except Lacks as problem:
        code, numbers = 2, {"lacks": str(problem)}
    except Exception as problem:  # whatever it is, it goes into the table
        traceback.print_exc()
        code, numbers = 1, {"error": f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"}
    with open(args.path, "w") as file:
        json.dump(numbers, file)
    sys.exit(code)


if __name__ == "__main__":
    main()
