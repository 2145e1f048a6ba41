"""Optimizers: which kernel and which parameters; Muon against torch's; optimizers that another library has."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from halos import muon, optimizers
from halos.errors import UserError
from helpers import tiny_policy
from small_runs import make_trainer

MATRIX = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def moved(name: str, *words: str, tmp_path) -> dict[str, torch.Tensor]:
    """The way of each parameter in three steps with gradients of 0.1, 0.2 and -0.1 times a random tensor."""
    trainer = make_trainer(tmp_path / name, "sft", f"optimizer={name}", "lr=0.01", *words)
    before = {key: p.detach().clone() for key, p in trainer.policy.named_parameters()}
    optimizer = trainer.make_optimizer()
    for factor in (0.1, 0.2, -0.1):
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.policy.parameters():
            parameter.grad = factor * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {key: p.detach() - before[key] for key, p in trainer.policy.named_parameters()}


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_the_fused_kernel_is_used_and_steps_as_the_plain_loop(tmp_path, name):
    trainer = make_trainer(tmp_path, "sft", f"optimizer={name}")
    assert all(group["fused"] for group in trainer.make_optimizer().param_groups)
    fused, loop = (
        moved(name, *words, tmp_path=tmp_path / str(len(words)))
        for words in ((), ("++optimizer_kwargs.foreach=false",))
    )
    for key in fused:
        torch.testing.assert_close(fused[key], loop[key], rtol=1e-4, atol=1e-7)


def test_a_kernel_that_the_user_chose_stays():
    assert optimizers.with_kernel(torch.optim.AdamW, {"foreach": True}, False) == {"foreach": True}
    assert optimizers.with_kernel(torch.optim.RMSprop, {}, False) == {}  # has no fused kernel
    assert optimizers.with_kernel(torch.optim.SGD, {}, True) == {}  # has none for shards
    assert optimizers.with_kernel(torch.optim.AdamW, {}, True) == {"fused": True}


#### MUON


def test_orthogonal_keeps_singular_vectors():
    """After 5 steps singular values are between 0.6 and 1.3, and U^T X V is diagonal."""
    for matrix in (MATRIX, MATRIX.T):
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        turned = u.T @ muon.orthogonal(matrix, 5) @ vt.T
        values = turned.diagonal()
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(turned, torch.diag(values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adjust_lr_fn", muon.ADJUSTMENTS)
def test_a_step_of_muon_is_that_of_torch_in_float32(adjust_lr_fn):
    """torch.optim.Muon orthogonalizes in bfloat16: 8 bits, so updates agree to about a hundredth of their size."""
    ours, theirs = (nn.Parameter(MATRIX.clone()) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": adjust_lr_fn}
    optimizer = muon.Muon([{"params": [ours], "hidden": True}], **settings)
    reference = torch.optim.Muon([theirs], **settings)
    for seed in range(3):
        gradient = torch.randn(MATRIX.shape, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - MATRIX).norm()


def test_muon_moves_hidden_matrices_and_adamw_the_rest(tmp_path):
    """With adamw_lr_ratio=0 only hidden matrices move; everything else moves as under AdamW with the same decay."""
    hidden_only = moved("Muon", "++optimizer_kwargs.adamw_lr_ratio=0.0", tmp_path=tmp_path / "a")
    still = {key for key, way in hidden_only.items() if not way.any()}
    assert still == {key for key in hidden_only if "proj" not in key} and len(still) < len(hidden_only)
    both = moved("Muon", tmp_path=tmp_path / "b")
    adamw = moved("AdamW", "++optimizer_kwargs.weight_decay=0.1", tmp_path=tmp_path / "c")
    assert all(torch.equal(both[key], adamw[key]) for key in still)


@pytest.mark.parametrize("model_type, tables", [("llama", 2), ("gpt2", 2), ("gpt_neox", 2)])
def test_tables_and_heads_are_not_hidden(model_type, tables):
    """A llama and a GPT-NeoX have an embedding and a head, a GPT-2 a table of positions beside its tied embedding."""
    policy = tiny_policy(model_type)
    matrices = [p for p in policy.parameters() if p.ndim == 2]
    assert len(matrices) - len(optimizers.hidden_matrices(policy)) == tables


#### TORCHAO


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer=AdamW8bit is in torchao, which is not installed; pip install"):
        optimizers.class_of("AdamW8bit")


def test_a_library_that_is_installed_is_used(monkeypatch):
    package = type(sys)("torchao.optim")
    package.AdamW8bit = torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "torchao", type(sys)("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", package)
    sys.modules["torchao"].optim = package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert optimizers.class_of("AdamW8bit") is torch.optim.AdamW
