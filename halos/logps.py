"""Per-token log-probs of the targets from hidden states: a plain reference and a fused version with one signature.

Both return float32. `fused` computes logits in chunks of tokens and keeps at most one chunk of logits. The backward
pass recomputes the logits of every chunk but the last, so a batch of one chunk recomputes nothing. Inputs may be
bfloat16; the logits and everything after them are float32. If entropy is requested, it is computed from the same
chunks. Change this file to add a kernel.

Shapes: N targets, d hidden size, V vocabulary.
"""

import torch

# Elements in one chunk of logits, 512 MiB of float32: 4096 tokens at V = 32k, enough to keep a GPU busy. On a CPU most
# batches are one chunk, which is not recomputed.
CHUNK_ELEMENTS = {"cuda": 2**27, "cpu": 2**27}
# Elements that are read several times in a row. On a CPU they stay in its caches; on a GPU there is one block.
BLOCK_ELEMENTS = {"cuda": 2**62, "cpu": 2**20}


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    entropy: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Compute log p(target) for each entry of `hidden`, by the definition.

    hidden: (N, d); weight: (V, d); targets: (N,); bias: (V,)
    softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2
    entropy: (N,) float32, filled with the entropy of each entry's distribution in nats, without gradient
    scale: factor of the logits, before the soft cap, as in Cohere
    """
    return from_logits(logits_of(hidden, weight, bias, softcap, scale), targets, entropy)


def from_logits(logits: torch.Tensor, targets: torch.Tensor, entropy: torch.Tensor | None = None) -> torch.Tensor:
    """Compute log-probs: (N, V) logits and (N,) targets -> (N,) float32. `entropy` is as in `plain`."""
    logits = logits.float()
    if entropy is not None:
        entropy.copy_(entropy_of(logits, logits.logsumexp(-1)))
    return logits.log_softmax(-1).gather(-1, targets[:, None]).sum(-1)  # over 1 entry: FSDP forbids views


@torch.no_grad()
def entropy_of(logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Compute entropies in nats, lse - sum p z. logits: (N, V) float32; lse: (N,) their logsumexp; returns (N,)."""
    p = logits.sub(lse[:, None]).exp_()
    return lse - torch.einsum("nv,nv->n", p, logits)  # does not store the (N, V) products


def fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    entropy: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Compute the same as `plain`, without (N, V) tensors."""
    return _FusedLogps.apply(hidden, weight, targets, bias, softcap, entropy, scale)


class _FusedLogps(torch.autograd.Function):
    """log p_t = z_t - logsumexp(z).

    Its gradient with respect to the logits z is upstream * (onehot(t) - softmax(z)).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, softcap, entropy, scale):
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logps)
        logits = None
        for rows in chunks(hidden, weight):
            del logits  # else two chunks would be in memory while the next one is computed
            logits = logits_of(hidden[rows], weight, bias, softcap, scale)
            torch.cat([block.logsumexp(-1) for block in _blocks(logits)], out=lse[rows])
            logps[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            if entropy is not None:
                entropy[rows] = entropy_of(logits, lse[rows])
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.softcap, ctx.scale = softcap, scale
        ctx.last_logits = logits
        return logps

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        wants_hidden, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad
        gradients = HeadGradients(hidden, weight, bias, wants_hidden, wants_weight, wants_bias)
        for rows in reversed(chunks(hidden, weight)):
            logits, ctx.last_logits = ctx.last_logits, None
            if logits is None:
                logits = logits_of(hidden[rows], weight, bias, ctx.softcap, ctx.scale)
            grad = _grad_logits(logits, lse[rows], targets[rows], upstream[rows], ctx.softcap, ctx.scale)
            del logits
            gradients.add_bias(grad)
            grad = grad.to(hidden.dtype)
            gradients.add(rows, grad)
            del grad  # else it would be in memory beside the next chunk
        grad_hidden, grad_weight, grad_bias = gradients.results()
        return grad_hidden, grad_weight, None, grad_bias, None, None, None


class HeadGradients:
    """Gradients of hidden states, and of the head's weights and bias, from those of logits, chunk after chunk.

    Sums over chunks are float32: a bfloat16 sum would round once per chunk.
    """

    def __init__(self, hidden, weight, bias, wants_hidden: bool, wants_weight: bool, wants_bias: bool):
        self.inputs = hidden, weight, bias
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None

    def add_bias(self, grad: torch.Tensor) -> None:
        """grad: (rows, V) float32 gradient of logits"""
        if self.bias is not None:
            self.bias += grad.sum(0)

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """grad: as in `add_bias`, in the dtype of the hidden states"""
        hidden, weight, _ = self.inputs
        if self.hidden is not None:
            torch.mm(grad, weight, out=self.hidden[rows])
        if self.weight is None:
            return
        if grad.dtype == torch.float32:
            self.weight.addmm_(grad.T, hidden[rows])
        elif grad.is_cuda:  # else each chunk would be rounded before the sum
            self.weight += torch.mm(grad.T, hidden[rows], out_dtype=torch.float32)
        else:
            self.weight += grad.T @ hidden[rows]

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden states, weights and bias, in their dtypes; None for those not wanted."""
        _, weight, bias = self.inputs
        return (
            self.hidden,
            self.weight.to(weight.dtype) if self.weight is not None else None,
            self.bias.to(bias.dtype) if self.bias is not None else None,
        )


def _grad_logits(logits, lse, targets, upstream, softcap, scale) -> torch.Tensor:
    """Turn logits into the gradient of the loss with respect to them, before scale and soft cap. In place."""
    split = (x.split(len(block)) for block in _blocks(logits)[:1] for x in (lse, targets, upstream))
    for block, *of_block in zip(_blocks(logits), *split, strict=True):
        own_lse, own_targets, own_upstream = (x[:, None] for x in of_block)
        slope = None if softcap is None else 1 - (block / softcap) ** 2  # d tanh
        block.sub_(own_lse).exp_().neg_()
        block.scatter_add_(1, own_targets, torch.ones_like(block[:, :1]))
        block *= own_upstream if scale == 1 else own_upstream * scale
        if slope is not None:
            block *= slope
    return logits


def _blocks(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of some rows each, small enough for the caches."""
    n, vocab = logits.shape
    return logits.split(max(1, BLOCK_ELEMENTS[_kind(logits)] // vocab)) if n else ()


def chunks(hidden: torch.Tensor, weight: torch.Tensor, arrays: int = 1) -> list[slice]:
    """Return equal slices of the entries of `hidden`, each with at most CHUNK_ELEMENTS logits.

    arrays: number of arrays of logits that share the memory of one
    """
    n = len(hidden)
    elements = CHUNK_ELEMENTS[_kind(hidden)] // arrays
    most = max(1, elements // len(weight))
    size = -(-n // max(1, -(-n // most)))
    return [slice(start, min(start + size, n)) for start in range(0, n, max(1, size))]


def logits_of(hidden, weight, bias, softcap, scale) -> torch.Tensor:
    """Compute float32 logits.

    Half-precision inputs are multiplied exactly. Rounding the logits to bfloat16 would cost 0.1 nat over a 512-token
    response.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    if bias is not None:
        logits = logits + bias
    if scale != 1:
        logits *= scale  # in place: else two chunks would be in memory
    return softcap * torch.tanh(logits / softcap) if softcap is not None else logits


def _kind(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"
