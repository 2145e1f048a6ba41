"""Bytes that each rank sends per update. A rank receives as many.

In a ring of n ranks each passes on (n - 1) / n of what is gathered or reduced, and twice that in an all-reduce.
"""

from halos.plan.activations import FLOAT32
from halos.plan.setup import Setup
from halos.plan.sizes import ModelSizes


def bytes_sent(model: ModelSizes, setup: Setup) -> dict[str, float]:
    """Bytes that each rank sends per update, by purpose."""
    n, replicas = setup.shards, setup.replicas
    blocks = sum(block.gathered(n) for block in model.blocks)
    root, critic = model.root.gathered(n), model.critic.gathered(n)
    # Blocks are gathered for the forward pass and for the backward pass, the root once for both. If a microbatch takes
    # several forward passes, each runs without gradient first.
    times = 2 if setup.forwards == 1 else 3
    weights = (times * blocks + root) * setup.compute.itemsize + times * critic * FLOAT32
    reference = 0
    if setup.reference:  # without its adapter the policy is the reference, and its root is there
        reference = (blocks + root * (not setup.adapter)) * setup.reference.itemsize
    gradients = sum(group.trained.gathered(n) for group in model.groups) * FLOAT32
    ring, all_reduce = (n - 1) / n, 2 * (replicas - 1) / replicas
    per_forward = {
        "weights": weights * ring,
        "reference weights": reference * ring,
        "gradients": gradients * ring,
        "gradients among replicas": gradients / n * all_reduce,
    }
    return {purpose: setup.forwards * setup.microbatches * sent for purpose, sent in per_forward.items()}
