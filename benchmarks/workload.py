"""The workload of the benchmarks: Llamas with random weights, and preference pairs with the lengths of real ones."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halos import logps
from halos.models import PolicyModel
from halos.tokens import Role, TokenizedExample


def llama(hidden_size: int = 384, layers: int = 6, vocab_size: int = 32000, seed: int = 0) -> PolicyModel:
    """A Llama with 35M parameters by default: 10.6M in the body, 12.3M each in the embedding and in the head."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * 8 / 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
    )
    torch.manual_seed(seed)
    return PolicyModel(LlamaForCausalLM(config), logps.fused)


def body_parameters(policy: PolicyModel) -> int:
    """Number of weights that every token is multiplied with: all matrices except for the embedding and the head."""
    ends = {id(policy.lm.get_input_embeddings().weight), id(policy.lm.get_output_embeddings().weight)}
    return sum(p.numel() for p in policy.parameters() if p.ndim == 2 and id(p) not in ends)


class Shape(NamedTuple):
    """Log-normal lengths in tokens: a median and the standard deviation of its logarithm each."""

    prompt: tuple[float, float]
    response: tuple[float, float]
    longest_response: int = 500


SHAPES = {
    "shp": Shape((180, 0.95), (70, 0.9)),  # a tenth of the prompts have over 600 tokens
    "hh": Shape((130, 0.8), (40, 0.9)),  # dialogues, and short replies
    "ultrafeedback": Shape((90, 1.1), (260, 0.7), 1024),  # instructions, and long answers
}


def pairs_like(shape: str, n: int, vocab_size: int, seed: int = 0, max_length: int = 2048) -> list[TokenizedExample]:
    """Return pairs of random tokens with the lengths of `SHAPES[shape]`."""
    rng = np.random.default_rng(seed)
    lengths = SHAPES[shape]

    def ids(median: float, sigma: float, most: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(np.log(median), sigma), 8, most))
        return rng.integers(0, vocab_size, length).astype(np.int32)

    def response() -> np.ndarray:
        return ids(*lengths.response, lengths.longest_response)

    roles = (Role.CHOSEN, Role.REJECTED)
    return [TokenizedExample(ids(*lengths.prompt, max_length // 2), (response(), response()), roles) for _ in range(n)]


def shp_like_pairs(n: int, vocab_size: int, seed: int = 0, max_length: int = 2048) -> list[TokenizedExample]:
    return pairs_like("shp", n, vocab_size, seed, max_length)


def dpo_backward(policy: PolicyModel, examples: list[TokenizedExample]) -> torch.Tensor:
    """Run the forward and backward pass of DPO (beta 0.1) with a reference of 0. Returns the loss."""
    inputs = policy.inputs(examples)
    summed = inputs.sum_by_row(policy(inputs).logps)
    loss = -torch.nn.functional.logsigmoid(0.1 * (summed[0::2] - summed[1::2])).mean()
    loss.backward()
    return loss.detach()
