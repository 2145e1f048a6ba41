"""Batched generation. The text depends on the seed and the prompt, not on the batch.

The next token is argmax(log p + Gumbel noise), which is a sample from p. The noise of a response comes from a generator
seeded by (seed, prompt ids, copy number) and advances with the position. So a batch of another size or in another order
gives the same text in float32. In bfloat16 the shape of a batch changes the rounding of log p, and so, occasionally, a
token.

Prompts of a batch are padded at the left. A model that ignores the attention mask, as RWKV does, would read the
padding. It samples one response at a time: in transformers 5.23 RWKV is wrong in batches of equal lengths, too.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from halos import distributed
from halos.chat import stop_token_ids
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
    description: str = "sampling",
    done: Mapping[int, str] | None = None,
    record: Callable[[dict[int, str]], None] = lambda texts: None,
) -> list[str]:
    """Sample one response per prompt, in the prompts' order. It ends at a token of `chat.stop_token_ids`, or when the
    sequence reaches max_length.

    Each rank has a whole `lm`, samples for its part of the prompts, and returns all responses. A prompt may come
    several times; its responses differ.

    prompts: n arrays of ids, with BOS, shorter than max_length
    done: index -> response of an earlier call; these are not sampled again
    record: called on every rank after each batch, with index -> response of the batches of all ranks
    """
    lm.eval()
    stops = stop_token_ids(encoder.tokenizer, lm.generation_config.eos_token_id)
    # The checkpoint's own settings (a repetition penalty, for example) would change the distribution.
    lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id)
    seeds = response_seeds(prompts, seed)
    texts = dict(done or {})
    todo = [i for i in range(len(prompts)) if i not in texts]
    if batch_size > 1 and len(todo) > 1 and ignores_attention_mask(lm, prompts[todo[0]]):
        batch_size = 1
        if distributed.is_main():
            print(f"{type(lm).__name__} ignores the attention mask, so it samples one response at a time")

    def responses_to(rows: list[int]) -> dict[int, str]:
        limits = [max_length - len(prompts[i]) for i in rows]
        sampler = GumbelSampler([seeds[i] for i in rows], top_p, temperature)
        generated = _generate(lm, encoder, [prompts[i] for i in rows], limits, sampler, stops)
        return {i: encoder.decode_response(ids, stops) for i, ids in zip(rows, generated, strict=True)}

    everyone = {"total": len(prompts), "initial": len(texts), "disable": not distributed.is_main()}
    with tqdm(desc=description, unit="response", **everyone) as bar:
        for rows in _batches(todo, prompts, batch_size):
            new: dict[int, str] = {}
            for theirs in distributed.gather_objects(responses_to(rows) if rows else {}):
                new |= theirs
            record(new)
            texts |= new
            bar.update(len(new))
    return [texts[i] for i in range(len(prompts))]


def _batches(todo: list[int], prompts: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
    """Divide the indices `todo` among the ranks, longest prompts first, and return this rank's batches.

    All ranks have equally many, since they exchange their responses after each. The last one may be empty.
    """
    by_length = sorted(todo, key=lambda i: len(prompts[i]), reverse=True)
    n, own = distributed.world_size(), by_length[distributed.rank() :: distributed.world_size()]
    return [own[start : start + batch_size] for start in range(0, len(by_length[::n]), batch_size)]


def ignores_attention_mask(lm, prompt: np.ndarray) -> bool:
    """Return True if the tokens of the padding change the logits after a padded prompt.

    prompt: an array of ids; its first 16 are used
    """
    ids = torch.as_tensor(prompt[:16].astype(np.int64))

    def logits(padding: int) -> torch.Tensor:
        input_ids = torch.cat((torch.full((4,), padding), ids))[None].to(lm.device)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, :4] = 0
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        return lm.generate(input_ids, attention_mask=attention_mask, generation_config=settings).logits[0].float()

    one, other = logits(0), logits(1)
    return bool((one - other).abs().max() > 0.01 * one.std())


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
