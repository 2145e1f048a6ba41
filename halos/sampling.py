"""Batched generation. The text depends on the seed and the prompt, not on the batch.

The next token is argmax(log p + Gumbel noise), which is a sample from p. The noise of a response comes from a generator
seeded by (seed, prompt ids, copy number) and advances with the position. So a batch of another size or in another order
gives the same text in float32. In bfloat16 the shape of a batch changes the rounding of log p, and so, occasionally, a
token.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from halos import distributed
from halos.tokens import Encoder


class GumbelSampler(LogitsProcessor):
    """Scores whose argmax is a sample from the model's distribution.

    The distribution has the given `temperature` and is restricted to its `top_p` mass.
    """

    def __init__(self, seeds: Sequence[int], top_p: float, temperature: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.top_p = top_p
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return noisy scores of the same shape. scores: (batch, vocabulary)"""
        if self.temperature == 0:
            return scores
        scores = keep_top_p(scores.float() / self.temperature, self.top_p)
        # -log of an exponential variable is a Gumbel variable. Drawn on the CPU, so it is the same for every device.
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores - noise.log().to(scores.device)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set all scores to -inf but those of the likeliest tokens whose total probability reaches `top_p`."""
    if top_p >= 1:
        return scores
    ordered, index = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total of all likelier tokens
    dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, before >= top_p)
    return scores.masked_fill(dropped, -torch.inf)


class OwnLimits(StoppingCriteria):
    """A stopping criterion with one limit per response, in tokens."""

    def __init__(self, prompt_width: int, limits: list[int], device: torch.device):
        self.prompt_width = prompt_width
        self.limits = torch.tensor(limits, device=device)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_width >= self.limits


@torch.inference_mode()
def sample(
    lm: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[np.ndarray],
    *,
    max_length: int,
    batch_size: int,
    top_p: float,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int] = (),
    description: str = "sampling",
) -> list[str]:
    """Sample one response per prompt, in the prompts' order. It ends at EOS, at another stop token, or when the
    sequence reaches max_length.

    Each rank has a whole `lm`, samples for its part of the prompts, and returns all responses.

    prompts: n arrays of ids, with BOS, shorter than max_length
    stop_ids: more tokens that end a response, such as a chat template's end of turn; those that the checkpoint's own
        generation settings name do so, too
    """
    lm.eval()
    stops = stop_token_ids([*stop_ids, encoder.eos_token_id], lm.generation_config)
    # The checkpoint's own settings (a repetition penalty, for example) would change the distribution.
    lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id)
    seeds = response_seeds(prompts, seed)
    texts: dict[int, str] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    own = by_length[distributed.rank() :: distributed.world_size()]
    with tqdm(total=len(own), desc=description, unit="response", disable=not distributed.is_main()) as bar:
        for start in range(0, len(own), batch_size):
            rows = own[start : start + batch_size]
            limits = [max_length - len(prompts[i]) for i in rows]
            sampler = GumbelSampler([seeds[i] for i in rows], top_p, temperature)
            for i, ids in zip(
                rows, _generate(lm, encoder, [prompts[i] for i in rows], limits, sampler, stops), strict=True
            ):
                texts[i] = encoder.decode_response(ids, stops)
            bar.update(len(rows))
    everyone = {i: text for texts in distributed.gather_objects(texts) for i, text in texts.items()}
    return [everyone[i] for i in range(len(prompts))]


def stop_token_ids(stop_ids: Sequence[int], generation_config: GenerationConfig) -> list[int]:
    """Return the given ids and those that end a generation by a checkpoint's own settings, each once."""
    own = generation_config.eos_token_id
    return list(dict.fromkeys([*stop_ids, *(own if isinstance(own, list) else [] if own is None else [own])]))


def _generate(
    lm, encoder: Encoder, prompts: list[np.ndarray], limits: list[int], sampler, stops: list[int]
) -> list[list[int]]:
    """Generate the response ids of one batch, which is padded at the left."""
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    input_ids = torch.full((len(prompts), width), pad, device=lm.device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt.astype(np.int64), device=lm.device)
        attention_mask[row, width - len(prompt) :] = 1
    output = lm.generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max(limits), eos_token_id=stops, pad_token_id=pad
        ),
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([OwnLimits(width, limits, lm.device)]),
    )
    return [ids[:limit] for ids, limit in zip(output[:, width:].tolist(), limits, strict=True)]


def response_seeds(prompts: Sequence[np.ndarray], seed: int) -> list[int]:
    """Return a seed per response, from the run's seed, the prompt's ids, and how often that prompt came before."""
    copies: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        ids = prompt.astype(np.int32).tobytes()
        digest = hashlib.blake2b(ids, digest_size=8, salt=f"{seed % 10**9}-{copies[ids]}".encode()[:16])
        seeds.append(int.from_bytes(digest.digest(), "little") >> 1)
        copies[ids] += 1
    return seeds
