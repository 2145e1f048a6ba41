"""The network: a causal language model, an optional value head, and the forward pass to log-probs of response tokens.

Change this file to change what a model computes. `halos/loading.py` loads the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from halos import distributed, logps, reference_kl
from halos.packing import ATTENTION, Inputs, pack, pad
from halos.reference_kl import Predictions
from halos.tokens import TokenizedExample


class PerToken(NamedTuple):
    """Outputs of a forward pass for each response token: (n_targets,) float32 each, but for `states`."""

    logps: torch.Tensor  # in nats; (0,) of a reward model, which predicts no token
    values: torch.Tensor | None  # value of the state before the token, or score up to it; None without such a head
    entropy: torch.Tensor | None  # of the distribution that predicts the token, in nats, detached; None if not wanted
    kl: torch.Tensor | None = None  # KL(reference || this model) of these distributions, in nats; None if not wanted
    states: torch.Tensor | None = None  # `reference_kl.Predictions.states`; None if not wanted


def logit_scale(lm_config: PreTrainedConfig) -> float:
    """Return the factor by which a model multiplies its logits after the head.

    A model with a factor that is not found here fails the check of packing, and runs on padded batches.
    """
    config = lm_config.get_text_config()
    if isinstance(factor := getattr(config, "logit_scale", None), float | int):  # Cohere
        return float(factor)
    if isinstance(factor := getattr(config, "logits_scaling", None), float | int):  # Granite; HyperCLOVA X multiplies
        return float(factor) if config.model_type == "hyperclovax" else 1 / factor
    return 1.0


class ValueHead(nn.Module):
    """A critic: from the hidden state that predicts a token to the expected return from there.

    It reads detached hidden states, so it never changes the language model. It computes in float32. Its value is 0
    everywhere at the start.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute values: (N, d) hidden states -> (N,) float32."""
        return self.value(torch.relu(self.hidden(hidden.detach().float()))).sum(-1)  # over 1 entry: FSDP forbids views


class PolicyModel(nn.Module):
    """A causal language model whose forward pass returns log-probs of response tokens, and values if it has a critic.

    This is the root module for FSDP: body, head, and log-probs are computed inside one forward pass. The head reads
    response positions only.

    lm: a transformers causal LM with all dropout at 0
    token_logps: a function of `halos.logps`
    v_head: the critic, for losses that have one, or the head of a reward model
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        token_logps: Callable = logps.fused,
        pad_token_id: int = 0,
        v_head: nn.Module | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.v_head = v_head
        self.token_logps = token_logps
        self.pad_token_id = pad_token_id
        self.packs = False
        self.plain_attention = lm.config._attn_implementation  # private: transformers has a public setter only
        self.description = ""  # a line for the terminal: packed or padded, and the compute dtype
        self.export_dtype: torch.dtype = lm.dtype

    @property
    def vocab_size(self) -> int:
        return len(cast(torch.Tensor, self.lm.get_input_embeddings().weight))

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def inputs(self, examples: list[TokenizedExample]) -> Inputs:
        """Return model inputs on the model's device: packed if `use_packing(True)` was called, else padded."""
        inputs = pack(examples) if self.packs else pad(examples, self.pad_token_id)
        return inputs.to(self.device)

    def forward(
        self,
        inputs: Inputs,
        with_entropy: bool = False,
        reference: Predictions | None = None,
        with_states: bool = False,
    ) -> PerToken:
        """Return the log-probs of `inputs.targets`, the values if there is a value head, and what else is wanted.

        reference: what the reference model predicts for the same inputs, for the KL divergence from it
        """
        device = inputs.targets.device
        entropy = torch.empty(len(inputs.targets), dtype=torch.float32, device=device) if with_entropy else None
        way = self._plain_forward if inputs.layout is None else self._packed_forward
        token_logps, hidden, predictions = way(inputs, entropy)
        values = self.v_head(hidden) if self.v_head is not None else None
        kl = self._kl(predictions, reference) if reference is not None else None
        return PerToken(token_logps, values, entropy, kl, predictions.states if with_states else None)

    @contextmanager
    def keeping_hidden(self) -> Iterator[list[torch.Tensor]]:
        """Inside, each forward pass appends the hidden states that the head reads: (batch * seq_len, d)."""
        kept: list[torch.Tensor] = []
        body = self.lm.base_model
        hook = body.register_forward_hook(lambda body, args, output: kept.append(output[0].flatten(0, 1)))
        try:
            yield kept
        finally:
            hook.remove()

    def whole_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (V, d) weights and (V,) bias of the head, without gradient. Of a sharded model they are gathered, in
        which all ranks take part."""
        head = self.lm.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return distributed.whole(head.weight.detach()), None if bias is None else distributed.whole(bias.detach())

    def _kl(self, predictions: Predictions, reference: Predictions) -> torch.Tensor:
        is_fused = self.token_logps is logps.fused and predictions.weight is not None
        divergence = reference_kl.fused if is_fused else reference_kl.plain
        return divergence(predictions, reference, self._softcap, logit_scale(self.lm.config))

    def _packed_forward(
        self, inputs: Inputs, entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Predictions]:
        """Return log-probs, and the hidden states that predict the targets, alone and with the head. Fills in
        `entropy`."""
        body = self.lm.base_model
        output = body(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, layout=inputs.layout, use_cache=False
        )
        hidden = output.last_hidden_state[0].index_select(0, inputs.target_positions)
        head = self.lm.get_output_embeddings()
        bias, scale = getattr(head, "bias", None), logit_scale(self.lm.config)
        token_logps = self.token_logps(hidden, head.weight, inputs.targets, bias, self._softcap, entropy, scale)
        return token_logps, hidden, Predictions(hidden, head.weight, bias)

    def _plain_forward(
        self, inputs: Inputs, entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Predictions]:
        """Return the same as `_packed_forward`, from the model's own logits of a padded batch.

        This is the reference for every faster implementation.
        """
        output = self.lm(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            output_hidden_states=self.v_head is not None,
        )

        def at_targets(states: torch.Tensor) -> torch.Tensor:
            return states.flatten(0, 1).index_select(0, inputs.target_positions)

        hidden = at_targets(output.hidden_states[-1]) if self.v_head is not None else None
        logits = at_targets(output.logits)
        return logps.from_logits(logits, inputs.targets, entropy), hidden, Predictions(logits)

    @property
    def _softcap(self) -> float | None:
        return getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)

    def use_packing(self, packs: bool) -> None:
        """Switch between packed inputs and padded inputs. Padded inputs use the attention that the model came with."""
        self.lm.set_attn_implementation(ATTENTION if packs else self.plain_attention)
        self.packs = packs
