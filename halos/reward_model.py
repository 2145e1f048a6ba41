"""A reward model: a language model without its own head, and a linear head that scores a conversation.

The score is read at the last token of a response that is trained on: its end of turn, or the last one that truncation
has left. `RewardModel` is what trains; `classifier` is the form in which transformers opens it. `halos/scoring.py`
scores texts with a trained one.
"""

import copy
import math

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from halos import chat
from halos.errors import UserError
from halos.models import PerToken, PolicyModel
from halos.packing import Inputs, pack, pad
from halos.tokens import TokenizedExample

SCORE = "score.weight"  # the head's name in transformers' models and in v_head.pt
ZERO_BYTE = "\u0100"  # the token of byte 0 in byte-level vocabularies, which no text has


class RewardHead(nn.Module):
    """From the hidden state at a token to the score of the conversation up to there, in float32.

    Unlike `models.ValueHead`, it trains the language model too. It starts with the variance of
    https://arxiv.org/abs/2009.01325, so that the first scores are about as large as the entries of a hidden state.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(hidden_size + 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute scores: (N, d) hidden states -> (N,) float32."""
        return self.score(hidden.float()).sum(-1)  # over 1 entry: FSDP forbids views


class RewardModel(PolicyModel):
    """A language model whose forward pass returns a score for each response token, as `PerToken.values`.

    v_head: a RewardHead
    """

    v_head: nn.Module

    def __init__(self, lm: PreTrainedModel, *args, **kwargs):
        super().__init__(lm, *args, **kwargs)
        head, table = lm.get_output_embeddings(), lm.get_input_embeddings()
        if head is not None and head.weight is not table.weight:
            head.requires_grad_(False)  # never used, and without a gradient

    def inputs(self, examples: list[TokenizedExample]) -> Inputs:
        """Return model inputs with all tokens of the responses: the last one is where the score is read."""
        laid_out = pack(examples, at_targets=True) if self.packs else pad(examples, self.pad_token_id, at_targets=True)
        return laid_out.to(self.device)

    def forward(self, inputs: Inputs, *args, **kwargs) -> PerToken:
        """Return the score of the conversation up to and including each of `inputs.targets`, and nothing else."""
        way = {"attention_mask": inputs.attention_mask} if inputs.layout is None else {"layout": inputs.layout}
        output = self.lm.base_model(inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **way)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, inputs.target_positions)
        return PerToken(torch.empty(0, device=hidden.device), self.v_head(hidden), None)


#### THE EXPORT


def classifier(lm_config: PreTrainedConfig, pad_token_id: int | None = None) -> PreTrainedModel:
    """Build transformers' sequence classifier of an architecture, with one label, on the meta device.

    pad_token_id: it reads the score at the last token that is another one
    Raises UserError if transformers has none, or one whose head is more than a matrix.
    """
    settings = copy.deepcopy(lm_config)
    for one in (settings, settings.get_text_config()):
        one.num_labels, one.pad_token_id = 1, pad_token_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False)
        is_linear = isinstance(model.score, nn.Linear) and model.score.bias is None
    except (ValueError, AttributeError):  # not in transformers' list, or a head of another name
        is_linear = False
    if not is_linear:
        raise UserError(
            f"loss.use_reward_head=true: transformers has no sequence classifier with a linear score for "
            f"{lm_config.model_type}, so the reward model could not be opened; use a model of another architecture, "
            "such as llama, qwen2, mistral, gemma2, gpt_neox or gpt2"
        )
    return model


def pad_token_id(tokenizer) -> int:
    """Return a token to pad with that ends no response: transformers reads the score at the last other token."""
    stops = chat.stop_token_ids(tokenizer)
    special = sorted(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    zero_byte = tokenizer.get_vocab().get(ZERO_BYTE)
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special, zero_byte):
        if token is not None and token not in stops:
            return token
    raise UserError(
        "the tokenizer has no token to pad with but those that end a response, where the score is read; "
        "set model.tokenizer_name_or_path to one with a pad token of its own"
    )
