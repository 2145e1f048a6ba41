"""Tests that need a GPU: its kernels against the plain forward pass, and training in mixed precision.

Run them with `pytest -m gpu`. They are skipped without a GPU.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from halos import checkpoint, components, loading, logps, metrics, packing, packing_check, run_dir, sharding
from halos.launch import launch
from halos.models import PolicyModel
from helpers import random_examples, tiny_lm
from small_runs import SMALL, Batches, batches_for, loader_for, tokenizer

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


# Plain causal, second responses after a shared prompt (one of them of a single token), and prompts of other lengths.
SEGMENTS = [(0, 40, 0, 0), (40, 41, 0, 25), (41, 120, 0, 25), (120, 123, 0, 0), (123, 300, 0, 0), (300, 310, 123, 290)]


@pytest.mark.parametrize("sliding_window", [None, 16, 200])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_the_kernel_against_plain_attention(heads, head_size, sliding_window):
    """Output and gradients of the kernel, for unequal lengths, windows and grouped heads, against float64.

    The reference goes segment by segment, with masks that are aligned at the lower right.
    """
    torch.manual_seed(0)
    shapes = [(1, n, SEGMENTS[-1][1], head_size) for n in (heads[0], heads[1], heads[1])]
    half = [torch.randn(shape, device=CUDA).bfloat16().requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    layout, options = packing.Layout(SEGMENTS, CUDA), {"scaling": None, "sliding_window": sliding_window}
    ours, _ = packing.packed_attention(torch.nn.Identity(), *half, None, layout=layout, **options)
    plain, _ = packing.packed_attention(torch.nn.Identity(), *exact, None, layout=layout, **options)
    upstream = torch.randn_like(plain)
    ours.backward(upstream.bfloat16())
    plain.backward(upstream)
    pairs = [(ours, plain)] + [(one.grad, other.grad) for one, other in zip(half, exact, strict=True)]
    for one, other in pairs:
        assert (one - other).norm() < 0.02 * other.norm()


def test_the_head_s_product_is_exact():
    """`torch.mm(..., out_dtype=float32)` of bfloat16 matrices has no rounding of its output to bfloat16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 512, device=CUDA).bfloat16(), torch.randn(1000, 512, device=CUDA).bfloat16()
    logits = logps._logits(hidden, weight, None, None, 1.0)
    expected = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32 and (logits - expected).norm() < 1e-5 * expected.norm()


def test_fsdp_of_one_gpu_is_autocast():
    """Float32 weights that FSDP casts to bfloat16 give the loss and gradients of torch.autocast, up to its rounding."""
    examples, found = random_examples(8, (2,)), []
    for fsdp in (True, False):
        lm = tiny_lm("llama", hidden_size=256, num_attention_heads=4, intermediate_size=512, initializer_range=0.05)
        policy = PolicyModel(lm).to(CUDA)
        if fsdp:
            sharding.prepare_policy(policy, torch.bfloat16)
        with torch.autocast(CUDA, torch.bfloat16, enabled=not fsdp):
            policy.use_packing(False)
            loss = policy(policy.inputs(examples)).logps.sum()
        loss.backward()
        grads = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)().flatten() for p in policy.parameters()]
        found.append((loss.item(), torch.cat(grads)))
    (loss, grad), (other_loss, other_grad) = found
    assert grad.dtype == torch.float32
    assert loss == pytest.approx(other_loss, rel=5e-3)
    assert (grad - other_grad).norm() < 0.05 * other_grad.norm()


def train(folder: str, loss: str, *words: str) -> None:
    """Train for three updates, on the GPU of each process."""
    import trainers
    from halos import distributed
    from helpers import make_config

    config = make_config(folder, f"loss={loss}", *SMALL, *words)
    directory = run_dir.create(config)
    policy, reference = loading.load_policy_and_reference(config, tokenizer(), distributed.default_device())
    loaders = Batches(batches_for(loss)), Batches(batches_for(loss, 1))
    components.find(trainers, config.loss.trainer)(policy, reference, tokenizer(), config, *loaders, directory).train()


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


def run_of(folder, *words: str, stops_after: int | None = None) -> list[dict]:
    """Train DPO with AdamW as train.py does, from the reference cache to the states. Returns the lines of the log."""
    import trainers
    from halos import reference_cache, resume
    from helpers import make_config

    config = make_config(folder, "loss=dpo", *SMALL, "optimizer=AdamW", "keep_checkpoints=2", "eval_every=1000", *words)
    directory = run_dir.path_of(config) if config.resume else run_dir.create(config)
    loaders = [loader_for("dpo", n, batch_size=8, n_epochs=1) for n in (32, 8)]
    policy, reference, cache = reference_cache.load(config, tokenizer(), loaders)
    trainer = trainers.DPOTrainer(policy, reference, tokenizer(), config, *loaders, directory)
    trainer.reference_cache = cache
    if config.resume:
        trainer.load_state(resume.newest_state(config))
    if stops_after is not None:
        trainer.should_stop = lambda: trainer.state.updates >= stops_after
    trainer.train()
    return [row for row in metrics.read_metrics(directory + "/metrics.jsonl") if row["mode"] == "train"]


def test_the_reference_cache_on_a_gpu(tmp_path):
    """Cached and live log-probs of the reference give the same first loss, ln 2, and the same losses after it.

    In bfloat16, where batches of the cache's pass are packed in another way, rewards are off by rounding only.
    """
    cached = run_of(tmp_path / "cached")
    live = run_of(tmp_path / "live", "cache_reference_logps=false")
    assert len(cached) == len(live) == 4
    for one, other in zip(cached, live, strict=True):
        assert one["loss/train"] == pytest.approx(other["loss/train"], abs=0.02)
        assert one["logps_train/chosen"] == pytest.approx(other["logps_train/chosen"], rel=1e-2)


def test_a_resumed_run_on_a_gpu(tmp_path):
    """Stopped after two updates and resumed, a run logs what the uninterrupted one does. It writes states, too."""
    whole = run_of(tmp_path / "whole")
    run_of(tmp_path / "parts", stops_after=2)
    parts = run_of(tmp_path / "parts", "resume=true")
    assert [row["counters/updates"] for row in parts] == [1, 2, 3, 4]
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss/train", "logps_train/chosen", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path):
    """Two GPUs give the weights of one, in float32, over NCCL."""
    words = ("model.fsdp_policy_mp=float32", "lr=0.05")
    for n in (1, 2):
        launch(train, str(tmp_path / str(n)), "kto", *words, nproc_per_node=n)
    states = [checkpoint.load_state(str(tmp_path / str(n) / "run/LATEST/policy.pt")) for n in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
