"""LoRA: what is trained and what stays, the reference with the adapter off, merged checkpoints, resuming."""

import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import dataloaders
import trainers
from halos import adapters, checkpoint, config, distributed, loading, metrics, packing_check, reference_cache, states
from halos.errors import UserError
from halos.models import PolicyModel
from helpers import make_config, random_examples, tiny_policy
from small_runs import (
    CPU,
    SMALL,
    assert_same_training,
    batches_for,
    loader_for,
    make_trainer,
    moved,
    state_of,
    tokenizer,
    trained,
)

LORA = ("model.use_peft=true", "model.lora.rank=4", "model.lora.alpha=8")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


def settings(**lora):
    """Return a config's `model` node, as far as an adapter reads it."""
    return OmegaConf.create({"block_name": None, "lora": {"rank": 3, "alpha": 6, "targets": None} | lora})


def with_adapter(model_type: str, **lora) -> PolicyModel:
    policy = tiny_policy(model_type, packs=True)
    adapters.add(policy.lm, settings(**lora), seed=0)
    return policy


def perturb(lm, seed: int = 0) -> None:
    """Move the whole adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if adapters.is_of_adapter(name):
                distributed.local(parameter).add_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logps(policy: PolicyModel) -> torch.Tensor:
    return policy(policy.inputs(random_examples(4, (2, 1)))).logps


def plain_names(lm) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapters.plain_state(lm).items()}


#### THE MODEL


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_the_base_is_there_bit_by_bit_and_merging_is_what_the_adapter_computes(model_type):
    """A new adapter changes no log-prob, nor does one that is off. Merged weights give those of one that is on.

    gpt2 stores its weights as (inputs, outputs). Merging changes no weight.
    """
    base = logps(tiny_policy(model_type, packs=True))
    policy = with_adapter(model_type)
    assert torch.equal(logps(policy), base)
    perturb(policy.lm)
    adapted = logps(policy)
    assert (adapted - base).abs().max() > 0.1
    with adapters.off(policy.lm):
        assert torch.equal(logps(policy), base)
    assert torch.equal(logps(policy), adapted)
    before = plain_names(policy.lm)
    state = checkpoint.full_state(policy.lm, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain_names(policy.lm).items())
    whole = tiny_policy(model_type, packs=True)
    whole.lm.load_state_dict(state)
    torch.testing.assert_close(logps(whole), adapted, rtol=1e-5, atol=1e-5)


def test_merging_by_hand():
    """W = [[1, 2], [3, 4]], B = [1, -1], A = [10, 20], alpha / rank = 0.5: W + 0.5 B A = [[6, 12], [-2, -6]]."""
    layer = torch.nn.Module()
    layer.lora_A, layer.lora_B = (torch.nn.ModuleDict({adapters.NAME: torch.nn.Linear(1, 1)}) for _ in range(2))
    layer.lora_A[adapters.NAME].weight = torch.nn.Parameter(torch.tensor([[10.0, 20.0]]))
    layer.lora_B[adapters.NAME].weight = torch.nn.Parameter(torch.tensor([[1.0], [-1.0]]))
    layer.scaling, layer.fan_in_fan_out = {adapters.NAME: 0.5}, False
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert adapters.merged(weight, layer).tolist() == [[6, 12], [-2, -6]]


def test_an_adapter_starts_from_the_seed_and_draws_nothing_else():
    generator = torch.random.get_rng_state()
    one, same, other = (with_adapter("llama").lm for _ in range(3))
    assert torch.equal(torch.random.get_rng_state(), generator)
    other = tiny_policy("llama").lm
    adapters.add(other, settings(), seed=1)
    a = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(one.state_dict()[a], same.state_dict()[a])
    assert not torch.equal(one.state_dict()[a], other.state_dict()[a])
    assert 0.9 < one.state_dict()[a].abs().max() * 32**0.5 <= 1  # uniform within 1 / sqrt(32 inputs)


@pytest.mark.parametrize(
    "words, parts",
    {
        "model.lora.targets=[q_pro]": ["model.lora.targets=q_pro", "did you mean 'q_proj'"],
        "model.lora.targets=[lm_head]": ["model.lora.targets=lm_head", "in the blocks"],
        "model.lora.targets=[input_layernorm]": ["input_layernorm is not a linear layer"],
        "model.lora.targets=q_proj": ["model.lora.targets=q_proj must be a list of names"],
        "model.lora.rank=0": ["model.lora.rank=0 must be a whole number of at least 1"],
        "model.lora.alpha=-1": ["model.lora.alpha=-1"],
        "model.use_peft=yes": ["model.use_peft=yes must be true or false"],
        "model.reference_dtype=bfloat16": ["model.reference_dtype=bfloat16", "use model.reference_dtype=null"],
    }.items(),
)
def test_mistakes_are_found_before_anything_loads(tmp_path, words, parts):
    wrong = make_config(tmp_path, "loss=dpo", *LORA, words)
    with pytest.raises(UserError) as error:
        config.validate(wrong, trainers, dataloaders)
        loading.check_adapter(wrong)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


#### TRAINING


def test_the_weights_move_by_the_projected_gradient(tmp_path):
    """With A fixed and orthonormal, s = alpha / rank, and SGD, a step moves B by -lr s G A^T, where G is the gradient
    of W, so that W moves by s B A = -lr s^2 G A^T A: full training of these weights with lr s^2, in which gradients are
    projected onto the rows of A. Three updates of DPO agree to 1e-5."""
    words = ("model.lora.targets=[q_proj,down_proj]", "model.max_grad_norm=1e9")
    low = make_trainer(tmp_path / "low", "dpo", *LORA, *words, "lr=0.2")
    full = make_trainer(tmp_path / "full", "dpo", "model.max_grad_norm=1e9", "lr=0.8")
    weights = dict(full.policy.lm.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(False)
    for name, layer in adapters.layers(low.policy.lm).items():
        a = layer.lora_A[adapters.NAME].weight.requires_grad_(False)
        a.copy_(torch.linalg.qr(torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(0))).Q.T)
        weights[name].requires_grad_().register_hook(lambda gradient, a=a: gradient @ a.T @ a)
    ways = []
    for trainer in (low, full):
        before = state_of(trainer)
        trainer.log_evaluation = trainer.save = lambda: None
        trainer.train()
        ways.append(moved(before, state_of(trainer)))
    assert ways[1].norm() > 0.05
    assert (ways[0] - ways[1]).norm() < 1e-5 * ways[1].norm()


@pytest.mark.parametrize("loss", ["sft", "ppo"])
def test_only_the_adapter_and_the_critic_are_trained(tmp_path, loss):
    """The base has no gradients, no place in the optimizer, and is the same after training, bit by bit."""
    trainer = make_trainer(tmp_path, loss, *LORA, "optimizer=AdamW")
    before = plain_names(trainer.policy.lm)
    named = dict(trainer.policy.named_parameters())
    trained = {name for name in named if adapters.is_of_adapter(name) or name.startswith("v_head.")}
    groups = trainer.state.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(named[name]) for name in trained}
    trainer.forward_backward(trainer.train_loader.batches[0])
    assert {name for name, parameter in named.items() if parameter.grad is not None} == trained
    trainer.update([trainer.forward_backward(trainer.train_loader.batches[1])], [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain_names(trainer.policy.lm).items())


WAYS = ["model.packing=false", "model.activation_checkpointing=true", "model.max_tokens_per_forward=40"]


@pytest.mark.parametrize("loss", ["slic", "ppo"])  # without a reference, and with one and a critic
def test_packing_checkpointing_and_pieces_change_nothing(tmp_path, loss):
    words = (*LORA, "lr=0.3", "model.packing=true", "model.activation_checkpointing=false")
    expected = trained(tmp_path / "plain", loss, *words)
    for i, way in enumerate(WAYS):
        assert_same_training(trained(tmp_path / str(i), loss, *words, way), expected, tolerance=2e-5)


@pytest.mark.slow
def test_compiled_blocks_change_nothing(tmp_path):
    words = (*LORA, "lr=0.3")
    plain = trained(tmp_path / "plain", "dpo", *words)
    assert_same_training(trained(tmp_path / "compiled", "dpo", *words, "model.compile=true"), plain, tolerance=2e-5)


@pytest.mark.parametrize("optimizer", ["Muon", "Adafactor", "RMSprop"])
def test_other_optimizers_move_the_adapter(tmp_path, optimizer):
    """All of A and B move, A from the second update on, when B is not 0 any more."""
    trainer = make_trainer(tmp_path, "sft", *LORA, f"optimizer={optimizer}")
    parts = {name: p for name, p in trainer.policy.lm.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parts.items()}
    trainer.log_evaluation = trainer.save = lambda: None
    trainer.train()
    assert all((parts[name] - before[name]).norm() > 0 for name in parts)


def test_a_base_in_bfloat16_has_an_adapter_in_float32(tmp_path):
    """Weights are kept in bfloat16 and compute in it, through FSDP; what is trained is float32, and moves."""
    trainer = make_trainer(tmp_path, "dpo", *LORA, "model.policy_dtype=bfloat16", "lr=1e-4", "optimizer=AdamW")
    dtypes = {adapters.is_of_adapter(name): p.dtype for name, p in trainer.policy.lm.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert "computing in torch.bfloat16" in trainer.policy.description and trainer.policy.packs
    before = checkpoint.full_state(trainer.policy.lm, torch.float32)
    trainer.log_evaluation = trainer.save = lambda: None
    trainer.train()
    assert moved(before, checkpoint.full_state(trainer.policy.lm, torch.float32)).norm() > 1e-3
    assert all(p.dtype == torch.float32 for group in trainer.state.optimizer.param_groups for p in group["params"])


#### THE REFERENCE


@pytest.mark.parametrize("words", [(), ("model.policy_dtype=bfloat16",)], ids=["float32", "bfloat16"])
def test_the_reference_is_the_base_and_no_second_model(tmp_path, words):
    """Its log-probs are what the policy computed before training, bit by bit."""
    trainer = make_trainer(tmp_path, "dpo", *LORA, *words)
    assert trainer.reference_model.policy is trainer.policy
    examples = trainer.train_loader.batches[0]
    start, _ = trainer.forward(examples)
    perturb(trainer.policy.lm)
    _, batch = trainer.forward(examples)
    assert torch.equal(batch.reference_logps, start.tokens.logps)
    assert (batch.policy.logps - batch.reference_logps).abs().max() > 1e-3


def test_a_policy_to_start_from_is_the_reference(tmp_path):
    """An earlier run's merged weights are the base of the next adapter, and its reference."""
    first = make_trainer(tmp_path / "first", "sft", *LORA)
    perturb(first.policy.lm)
    first.save()
    path = os.path.join(first.run_dir, "LATEST", "policy.pt")
    second = make_trainer(tmp_path / "second", "dpo", *LORA, f"model.load_from={path}")
    _, batch = second.forward(second.train_loader.batches[0])
    assert torch.equal(batch.policy.logps, batch.reference_logps)
    assert (moved(state_of(first), state_of(second)) == 0).all()
    assert second.policy.lm.peft_config[adapters.NAME].base_model_name_or_path == os.path.dirname(path)


def started(folder, *words: str):
    loaders = [loader_for("dpo", 12, batch_size=4), loader_for("dpo", 4, seed=9, batch_size=4)]
    config = make_config(folder, "loss=dpo", *SMALL, *words)
    return reference_cache.load(config, tokenizer(), loaders), loaders


def test_cached_is_live_and_shared_with_full_training(tmp_path, capfd):
    """Full training fills the cache; a run with an adapter finds all of it, and the same numbers with its adapter off.

    A base that is rounded to bfloat16 and computes in float32 is another reference.
    """
    started(tmp_path)
    (policy, reference, cache), loaders = started(tmp_path, *LORA)
    assert reference is None and "32 of 32 responses on disk, 4 of them checked" in capfd.readouterr().out
    trainer = make_trainer(tmp_path, "dpo", *LORA)
    perturb(trainer.policy.lm)
    examples = next(iter(loaders[0]))
    live = trainer.reference_logps(examples)
    torch.testing.assert_close(cache.logps(examples), live, rtol=1e-5, atol=1e-5)
    rounded = (*LORA, "model.policy_dtype=bfloat16", "model.fsdp_policy_mp=float32")
    started(tmp_path, *rounded)
    assert "0 of 32 responses on disk" in capfd.readouterr().out


#### CHECKPOINTS


@pytest.fixture
def saved(tmp_path):
    """A trainer with an adapter on a model with a tied head, and its LATEST."""
    trainer = make_trainer(tmp_path, "ppo", *LORA, "++model.architecture.tie_word_embeddings=true")
    perturb(trainer.policy.lm)
    trainer.save()
    return trainer, os.path.join(trainer.run_dir, "LATEST")


def test_a_checkpoint_is_merged_and_has_the_adapter_beside(tmp_path, saved):
    """policy.pt and the export hold the merged model; peft opens the adapter on the base, and merges to the same."""
    trainer, latest = saved
    trainer.policy.use_packing(False)
    examples = trainer.train_loader.batches[0]
    expected = trainer.forward(examples)[1].policy.logps.detach()
    exported = AutoModelForCausalLM.from_pretrained(latest)
    base = loading.load_lm(trainer.config, torch.float32)
    peft = PeftModel.from_pretrained(base, os.path.join(latest, checkpoint.ADAPTER))
    state = checkpoint.load_state(os.path.join(latest, "policy.pt"))
    found, reference = loading.load_policy_and_reference(
        trainer.config, tokenizer(), CPU, os.path.join(latest, "policy.pt")
    )
    assert not adapters.layers(found.lm) and not adapters.layers(reference.lm)
    for one in (exported, peft.merge_and_unload(), found.lm):
        assert one.state_dict().keys() == state.keys()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)
    trainer.policy = found
    torch.testing.assert_close(trainer.forward(examples)[1].policy.logps, expected, rtol=1e-5, atol=1e-5)


def resumable(folder, *words):
    loader = loader_for("ppo", 32, batch_size=8)
    words = (*LORA, "optimizer=AdamW", "lr=0.003", "keep_checkpoints=1", "eval_every=16", *words)
    trainer = make_trainer(folder, "ppo", *words, train_loader=loader, eval_batches=batches_for("ppo", 1, seed=1))
    trainer.save = lambda: None
    return trainer


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Adapter, critic and optimizer are equal bit by bit after 4 batches, of which 2 were seen in another run.

    States hold nothing of the base. Resuming on another base is refused.
    """
    whole = resumable(tmp_path / "whole")
    whole.train()
    first = resumable(tmp_path / "parts")
    first.should_stop = lambda: first.state.examples == 16
    first.train()
    path = states.newest(first.run_dir)
    kept = FileSystemReader(path).read_metadata().state_dict_metadata
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    last = resumable(tmp_path / "parts", "resume=true")
    last.load_state(path)
    last.train()
    ours, theirs = (trainer.policy.state_dict() for trainer in (last, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (trainer.state.optimizer.state_dict()["state"] for trainer in (last, whole))
    assert all(torch.equal(ours[i][key], value) for i, state in theirs.items() for key, value in state.items())
    trained = [name for name, p in whole.policy.named_parameters() if p.requires_grad]
    assert {name for name in kept if name.startswith("policy.")} == {f"policy.{name}" for name in trained}
    other = resumable(tmp_path / "other", "resume=true", "seed=2")
    with pytest.raises(UserError, match="resume=true, but the base has other weights"):
        other.load_state(states.newest(other.run_dir))


def test_the_check_of_packing_reads_the_base(tmp_path, monkeypatch):
    """It compares float32 log-probs of a base that is kept in bfloat16, before there is an adapter to be rounded."""
    seen = []
    in_float32 = packing_check.in_float32
    monkeypatch.setattr(
        packing_check, "in_float32", lambda policy: seen.append(adapters.layers(policy.lm)) or in_float32(policy)
    )
    make_trainer(tmp_path, "sft", *LORA, "model.policy_dtype=bfloat16")
    assert seen == [{}]
