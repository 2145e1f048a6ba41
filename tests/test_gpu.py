"""Tests that need a GPU: its kernels against the plain forward pass, and training in mixed precision.

Run them with `pytest -m gpu`. They are skipped without a GPU.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from halos import checkpoint, loading, logps, metrics, packing_check, run_dir, sharding
from halos.launch import launch
from halos.models import PolicyModel
from helpers import random_examples, tiny_lm
from small_runs import SMALL, Batches, batches_for, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen2"])
def test_the_kernel_for_packs_agrees_with_the_padded_forward(name):
    """In bfloat16, packed log-probs pass the check of a run's start: at most twice the error of padded bfloat16."""
    wide = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}  # heads of 64, for the kernels
    policy = PolicyModel(tiny_lm(name, **wide, initializer_range=0.05)).to(CUDA)
    float32 = packing_check.in_float32(policy)
    sharding.prepare_policy(policy, torch.bfloat16)
    agrees, reason = packing_check.choose(policy, True, torch.bfloat16, float32)
    assert agrees, reason


def test_packed_gradients_agree_with_padded_ones():
    """Gradients of packed and padded bfloat16 forward passes agree to 5 %, on shared prompts."""
    examples, grads = random_examples(8, (2, 1, 3)), []
    for packs in (True, False):
        lm = tiny_lm("llama", hidden_size=256, num_attention_heads=4, intermediate_size=512, initializer_range=0.05)
        policy = PolicyModel(lm).to(CUDA)
        sharding.prepare_policy(policy, torch.bfloat16)
        policy.use_packing(packs)
        policy(policy.inputs(examples)).logps.sum().backward()
        grads.append(torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


def test_the_head_in_bfloat16():
    """Log-probs, entropies, and gradients of bfloat16 inputs agree with float64 on the same inputs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device=CUDA).bfloat16(), torch.randn(5000, 64, device=CUDA).bfloat16() / 4
    targets, entropy = torch.randint(5000, (300,), device=CUDA), torch.empty(300, device=CUDA)
    ours = logps.fused(hidden.requires_grad_(), weight, targets, entropy=entropy)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(ours.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    (expected,) = torch.autograd.grad(exact.gather(1, targets[:, None]).sum(), hidden)
    assert (grad - expected).norm() < 0.01 * expected.norm()


def train(folder: str, loss: str, *words: str) -> None:
    """Train for three updates, on the GPU of each process."""
    import trainers
    from halos import distributed
    from helpers import make_config

    config = make_config(folder, f"loss={loss}", *SMALL, *words)
    directory = run_dir.create(config)
    policy, reference = loading.load_policy_and_reference(config, tokenizer(), distributed.default_device())
    loaders = Batches(batches_for(loss)), Batches(batches_for(loss, 1))
    getattr(trainers, config.loss.trainer)(policy, reference, tokenizer(), config, *loaders, directory).train()


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto", "ppo"])
def test_a_run_in_mixed_precision(tmp_path, loss):
    """Training float32 weights in bfloat16, packed and with checkpointing, starts at a log-ratio of 0.

    The export opens in transformers, and policy.pt is float32.
    """
    train(str(tmp_path), loss, "model.activation_checkpointing=true")
    rows = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    if loss != "sft":
        assert rows[0]["rewards_train/margins"] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "LATEST")
    state = checkpoint.load_state(str(tmp_path / "run/LATEST/policy.pt"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path):
    """Two GPUs give the weights of one, in float32, over NCCL."""
    words = ("model.fsdp_policy_mp=float32", "lr=0.05")
    for n in (1, 2):
        launch(train, str(tmp_path / str(n)), "kto", *words, nproc_per_node=n)
    states = [checkpoint.load_state(str(tmp_path / str(n) / "run/LATEST/policy.pt")) for n in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
