"""Training speed on a GPU: tokens/s, peak memory, and the share of the matrix-product rate that a step reaches.

    python -m benchmarks.train_1b                 # a GPT-NeoX of 1.0B parameters, SLiC, packs of 16k tokens
    python -m benchmarks.train_1b --layers 2 --hidden_size 256 --n_pairs 4    # a small one, for a CPU

Random weights, stored in float32 and computing in bfloat16 (float32 on a CPU), through the trainer's own `train_step`
with AdamW, with activation checkpointing on and off. The rate is measured first, on one large matrix product. The FLOPs
of a step are counted as 6 per weight and token, so recomputation counts as lost time.
"""

import argparse
import resource
import statistics
import tempfile
import time

import torch
from omegaconf import OmegaConf
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.workload import body_parameters, shp_like_pairs
from halos import distributed, engine, packing_check, sharding
from halos.models import PolicyModel
from trainers import SLiCTrainer


def gpt_neox(hidden_size: int, layers: int, device: torch.device) -> PolicyModel:
    config = GPTNeoXConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        vocab_size=50304,
        max_position_embeddings=2048,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    torch.manual_seed(0)
    with device:
        return PolicyModel(GPTNeoXForCausalLM(config))


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of one large product: the best of ten."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def seconds(function, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_trainer(policy: PolicyModel, batch: list, folder: str, max_tokens: int) -> SLiCTrainer:
    """A trainer of SLiC: pairs without a reference model, so only forward and backward pass of the policy are timed."""
    config = {
        "loss": {"beta": 1.0, "lambda_coef": 0.1, "name": "slic"},
        "model": {"max_tokens_per_forward": max_tokens, "gradient_accumulation_steps": 1, "max_grad_norm": 10.0},
        "optimizer": "AdamW", "optimizer_kwargs": {}, "lr": 1e-5, "warmup_steps": 0, "lr_scheduler": "constant",
        "exp_name": "train_1b", "minimum_log_interval_secs": 1e9, "wandb": {"enabled": False},
    }  # fmt: skip
    loader = Endless(batch)
    return SLiCTrainer(policy, None, None, OmegaConf.create(config), loader, loader, folder)


class Endless:
    """A loader of one batch."""

    def __init__(self, batch: list):
        self.batch, self.total_examples, self.examples_seen = batch, len(batch), 0

    def __len__(self) -> int:
        return 1


def report(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, checkpointing: bool, rate: float
) -> None:
    policy = gpt_neox(args.hidden_size, args.layers, device)
    batch = shp_like_pairs(args.n_pairs, policy.vocab_size)
    float32 = packing_check.in_float32(policy)
    sharding.prepare_policy(policy, dtype, activation_checkpointing=checkpointing)
    agrees, reason = packing_check.choose(policy, "auto", dtype, float32)
    policy.use_packing(agrees)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(policy, batch, folder, args.max_tokens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [seconds(lambda: trainer.train_step([batch]), device) for _ in range(args.steps)]
    step = statistics.median(times[2:] or times)  # the first two warm up
    n_tokens = sum(example.n_tokens for example in batch)
    n_targets = sum(len(response) for example in batch for response in example.responses)
    n_passes = len(engine.pieces(batch, engine.TRAINED, args.max_tokens, device))
    head = policy.lm.get_output_embeddings().weight.numel()
    floor = 6 * (body_parameters(policy) * n_tokens + head * n_targets)
    print(
        f"checkpointing {'on ' if checkpointing else 'off'}: {policy.lm.num_parameters() / 1e9:.2f}B parameters, "
        f"{n_passes} forward passes in a step, {n_tokens / step:,.0f} tokens/s, peak "
        f"{peak_memory(device) / 2**30:.1f} GiB, {floor / step / rate:.2f} of the product's rate; {reason}"
    )


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--n_pairs", type=int, default=48)
    parser.add_argument("--max_tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    device = distributed.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 1024)
    print(f"{distributed.describe()}: {rate / 1e12:.2f} TFLOP/s in a product of {dtype}")
    for checkpointing in (True, False):
        report(args, device, dtype, checkpointing, rate)


if __name__ == "__main__":
    main()
