"""KL divergence of the policy from the reference model, over the whole vocabulary, at each response token.

KL(reference || policy) = sum_v q_v (log q_v - log p_v), with the distributions q of the reference and p of the policy
that predict the token. `fused` is `plain` in chunks of tokens, as in `halos/logps.py`: the logits of at most one chunk
are in memory, and the backward pass computes them again. Only the policy gets a gradient.

Shapes: N targets, d hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from halos.logps import HeadGradients, chunks, logits_of

ARRAYS = 4  # of the size of a chunk that are in memory at once, beside its logits


class Predictions(NamedTuple):
    """Hidden states and head that give a model's logits of the next token at N positions.

    states: (N, d) hidden states; or (N, V) the logits themselves, where there is no weight
    weight, bias: (V, d) and (V,) of the head
    """

    states: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def logits(self, rows: slice, softcap: float | None, scale: float) -> torch.Tensor:
        """Return (n_rows, V) float32 logits. softcap, scale: as in `logps.plain`"""
        if self.weight is None:
            return self.states[rows].float()
        return logits_of(self.states[rows], self.weight, self.bias, softcap, scale)


def plain(policy: Predictions, reference: Predictions, softcap: float | None = None, scale: float = 1.0):
    """Compute (N,) float32 divergences in nats, by the definition. softcap, scale: as in `logps.plain`, of both"""
    everything = slice(None)
    return _divergence(policy.logits(everything, softcap, scale), reference.logits(everything, softcap, scale))


def fused(policy: Predictions, reference: Predictions, softcap: float | None = None, scale: float = 1.0):
    """Compute the same as `plain`, without (N, V) tensors."""
    return _FusedDivergence.apply(*policy, *reference, softcap, scale)


def _divergence(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    p, q = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)


class _FusedDivergence(torch.autograd.Function):
    """The gradient with respect to the policy's logits is upstream * (p - q)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, reference_hidden, reference_weight, reference_bias, softcap, scale):
        policy = Predictions(hidden, weight, bias)
        reference = Predictions(reference_hidden, reference_weight, reference_bias)
        ctx.save_for_backward(*policy, *reference)
        ctx.options = softcap, scale
        parts = [
            _divergence(policy.logits(rows, softcap, scale), reference.logits(rows, softcap, scale))
            for rows in chunks(hidden, weight, ARRAYS)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, upstream):
        softcap, scale = ctx.options
        policy, reference = Predictions(*ctx.saved_tensors[:3]), Predictions(*ctx.saved_tensors[3:])
        gradients = HeadGradients(*policy, *ctx.needs_input_grad[:3])
        for rows in chunks(policy.states, policy.weight, ARRAYS):
            logits = policy.logits(rows, softcap, scale)
            grad = logits.softmax(-1)
            grad -= reference.logits(rows, softcap, scale).softmax(-1)
            grad *= scale * upstream[rows, None]
            if softcap is not None:
                grad *= 1 - (logits / softcap) ** 2
            del logits
            gradients.add_bias(grad)
            grad = grad.to(policy.states.dtype)
            gradients.add(rows, grad)
            del grad  # else it would be in memory beside the next chunk
        return *gradients.results(), None, None, None, None, None
