"""The network: a causal language model, a value head where a loss wants a critic, and the one forward pass from inputs
to log-probs of response tokens.

Change this file to change what a model computes. Where its weights come from is in `halos/loading.py`.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from halos import logps
from halos.packing import ATTENTION, Inputs, pack, pad
from halos.tokens import TokenizedExample


class PerToken(NamedTuple):
    """What a forward says of each response token: (n_targets,) float32 each."""

    logps: torch.Tensor  # in nats
    values: torch.Tensor | None  # of the state that the token was chosen in; None without a value head
    entropy: torch.Tensor | None  # of the distribution that it was chosen from, in nats, detached; None if not wanted


class ValueHead(nn.Module):
    """A critic: from the hidden state that predicts a token to the return expected from there.

    It reads detached hidden states, so that it never moves the language model, and computes in float32. It starts at
    a value of 0 everywhere.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, d) hidden states -> (N,) float32 values."""
        return self.value(torch.relu(self.hidden(hidden.detach().float()))).sum(-1)  # over one: FSDP wants no view


class PolicyModel(nn.Module):
    """A causal language model whose one forward gives the log-probs of response tokens, and their values.

    It is the root that is sharded: body, head, and log-probs run inside one forward, and the head sees response
    positions only.

    lm: a transformers causal LM with all dropout at 0
    token_logps: one of the functions of `halos.logps`
    v_head: the critic of losses that have one
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        token_logps: Callable = logps.fused,
        pad_token_id: int = 0,
        v_head: ValueHead | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.v_head = v_head
        self.token_logps = token_logps
        self.pad_token_id = pad_token_id
        self.packs = False
        self.plain_attention = lm.config._attn_implementation  # private: transformers has a public setter only
        self.description = ""  # how it runs, for people
        self.export_dtype: torch.dtype = lm.dtype

    @property
    def vocab_size(self) -> int:
        return len(cast(torch.Tensor, self.lm.get_input_embeddings().weight))

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def inputs(self, examples: list[TokenizedExample]) -> Inputs:
        """Packed if this model reads packs, else padded; on the model's device."""
        inputs = pack(examples) if self.packs else pad(examples, self.pad_token_id)
        return inputs.to(self.device)

    def forward(self, inputs: Inputs, with_entropy: bool = False) -> PerToken:
        """The log-probs of `inputs.targets` and, where there is a value head, the values of where they were chosen."""
        device = inputs.targets.device
        entropy = torch.empty(len(inputs.targets), dtype=torch.float32, device=device) if with_entropy else None
        way = self._plain_forward if inputs.layout is None else self._packed_forward
        token_logps, hidden = way(inputs, entropy)
        return PerToken(token_logps, self.v_head(hidden) if self.v_head is not None else None, entropy)

    def _packed_forward(self, inputs: Inputs, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, the hidden states that they were computed from); `entropy` is filled in."""
        body = self.lm.base_model
        output = body(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, layout=inputs.layout, use_cache=False
        )
        hidden = output.last_hidden_state[0].index_select(0, inputs.target_positions)
        head = self.lm.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return self.token_logps(hidden, head.weight, inputs.targets, bias, self._softcap, entropy), hidden

    def _plain_forward(self, inputs: Inputs, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same from the model's own logits of a padded batch: what every faster way is compared with."""
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
        return logps.from_logits(at_targets(output.logits), inputs.targets, entropy), hidden

    @property
    def _softcap(self) -> float | None:
        return getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)

    def use_packing(self, packs: bool) -> None:
        """Read packs, or padded batches with the attention that the model came with."""
        self.lm.set_attn_implementation(ATTENTION if packs else self.plain_attention)
        self.packs = packs
