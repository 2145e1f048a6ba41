"""Scores of a trained reward model for responses, with the rendering and the truncation that it was trained with.

`Scorer` opens the export of a run with loss=reward, or another sequence classifier of transformers with one label and a
linear `score`. The judge `reward:DIR` of compare.py and best-of-n sampling of eval.py use it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from halos import base, distributed, manifest, packing_check, positions, run_dir
from halos.chat import Renderer
from halos.checkpoint import LATEST
from halos.errors import UserError
from halos.examples import Example, Text
from halos.packing import schedule
from halos.reward_model import SCORE, RewardHead, RewardModel
from halos.tokens import Encoder, Role, TokenizedExample, truncate

# Of the run that trained the model, or these for a model from elsewhere.
LIMITS = {"max_length": 2048, "max_prompt_length": 1024, "max_tokens_per_forward": 16384}


class Conversation(NamedTuple):
    """A prompt, text or messages, and a response to it. keep: which end of a prompt survives when it is too long"""

    prompt: Text
    response: str
    keep: str = "keep_end"


class Scorer:
    """A reward model that scores conversations. Its weights are loaded at the first score.

    directory: an export, or the directory of a run, whose LATEST is then used
    flag: what stands before the directory in the command, for errors
    truncated: how many prompts and responses were cut so far
    Raises UserError if there is no reward model.
    """

    def __init__(self, directory: str, flag: str):
        latest = os.path.join(directory, LATEST)
        self.directory = latest if os.path.isdir(latest) else directory
        self.flag, self.given = flag, directory
        self.limits = self._check_and_read_limits()
        self.truncated: Counter[str] = Counter()

    def _check_and_read_limits(self) -> dict[str, int]:
        if not os.path.isfile(os.path.join(self.directory, "config.json")):
            raise UserError(f"{self.flag}{self.given}: no reward model is there; give the directory of a reward run")
        with self._reading():
            lm_config = AutoConfig.from_pretrained(self.directory)
        kinds = lm_config.architectures or ["unknown"]
        if lm_config.num_labels != 1 or not kinds[0].endswith("ForSequenceClassification"):
            raise UserError(
                f"{self.flag}{self.given}: {kinds[0]} with {lm_config.num_labels} labels is no reward model; "
                "give the directory of a run with loss=reward"
            )
        of_run = os.path.join(self.directory, run_dir.CONFIG)
        if os.path.isfile(of_run):
            config: Any = OmegaConf.load(of_run)
            return {name: config.model[name] for name in LIMITS}
        longest = getattr(lm_config.get_text_config(), "max_position_embeddings", None) or LIMITS["max_length"]
        return {name: min(limit, longest) if "length" in name else limit for name, limit in LIMITS.items()}

    def _reading(self):
        return base.reading(self.flag.rstrip("=:"), self.directory)

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides a score: the contents of the files, and the limits of lengths."""
        files = manifest.contents(self.directory, _decides_scores)
        return hashlib.blake2b(json.dumps([files, self.limits]).encode(), digest_size=16).hexdigest()

    @cached_property
    def tokenizer(self):
        with self._reading():
            return AutoTokenizer.from_pretrained(self.directory)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def model(self) -> RewardModel:
        """Load the model, in float32 on a CPU and in bfloat16 on a GPU, packed if packing is exact for it."""
        if manifest.is_complete(self.directory):
            manifest.check(self.directory, _decides_scores)
        device = distributed.default_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with self._reading():
            load: Any = AutoModelForSequenceClassification.from_pretrained
            lm, info = load(self.directory, dtype=dtype, output_loading_info=True)
            if info["missing_keys"]:  # which would be random
                raise UserError(f"{self.flag}{self.given} lacks the weight {min(info['missing_keys'])}; give another")
            head = RewardHead(lm.score.in_features)
            head.load_state_dict({SCORE: lm.score.weight})
        positions.fix_rotary(lm, self.limits["max_length"])
        model = RewardModel(lm, pad_token_id=lm.config.pad_token_id or 0, v_head=head).to(device).eval()
        packs, _ = packing_check.choose(model, "auto", dtype, packing_check.in_float32(model))
        model.use_packing(packs)
        return model

    @torch.inference_mode()
    def scores(self, conversations: Sequence[tuple], show: Callable[[int], Any] = lambda n_scores: None) -> list[float]:
        """Return a score for each (prompt, response) or Conversation. show: called after each forward pass"""
        examples = self._encoded([Conversation(*one) for one in conversations])
        scores = [0.0] * len(examples)
        for group in schedule(examples, 1, self.limits["max_tokens_per_forward"])[0] if examples else []:
            lengths = torch.tensor([len(examples[i].responses[0]) for i in group])
            values = self.model(self.model.inputs([examples[i] for i in group])).values
            last = values[lengths.cumsum(0).to(values.device) - 1].tolist()
            for index, score in zip(group, last, strict=True):
                scores[index] = score
            show(len(group))
        if not np.isfinite(scores).all():
            raise UserError(f"{self.flag}{self.given}: its scores are not finite; use another checkpoint")
        return scores

    def _encoded(self, conversations: list[Conversation]) -> list[TokenizedExample]:
        """Render, encode and truncate as for training. Counts what is cut."""
        renderer, n_bos = Renderer(self.tokenizer), len(self.encoder.bos)
        examples = [Example(one.prompt, [one.response]) for one in conversations]
        texts = [(renderer.prompt(example), renderer.responses(example)[0]) for example in examples]
        prompts = self.encoder.prompt_arrays([prompt for prompt, _ in texts])
        responses = [np.array(ids, np.int32) for ids in self.encoder.responses([response for _, response in texts])]
        lengths, encoded = (self.limits["max_length"], self.limits["max_prompt_length"]), []
        for prompt, response, one in zip(prompts, responses, conversations, strict=True):
            cut, (rest,) = truncate(prompt, (response,), (Role.CHOSEN,), *lengths, one.keep, n_bos)
            self.truncated["prompts"] += len(cut) < len(prompt)
            self.truncated["responses"] += len(rest) < len(response)
            encoded.append(TokenizedExample(cut, (rest,), (Role.CHOSEN,)))
        return encoded

    def describe(self) -> str:
        """Say how many texts were cut so far, in one line; empty if none were."""
        cut = " and ".join(f"{n} {what}" for what, n in self.truncated.items() if n)
        return f"the reward model read {cut} cut to {self.limits['max_length']} tokens" if cut else ""


def _decides_scores(name: str) -> bool:
    """Return whether a file of an export can change a score."""
    return name.endswith((".safetensors", ".jinja")) or name == "config.json" or name.startswith("tokenizer")


def best_of(scorer: Scorer, prompts: list, texts: list[str]) -> tuple[list[str], list[list[float]]]:
    """Choose the response with the highest score for each prompt, the first one if several have it.

    prompts: of `dataloaders.read_prompts`
    texts: the first sample of every prompt, then the second of every prompt, and so on
    Returns the best text and the scores of all samples of each prompt. Each rank scores a part of the prompts.
    """
    _ = scorer.model  # all ranks take part in its check, also one without a prompt
    n, n_ranks = len(prompts), distributed.world_size()
    own = [i for i in range(len(texts)) if i % n % n_ranks == distributed.rank()]
    conversations = [
        Conversation(prompt.messages or prompt.text, text, prompt.truncation_mode)
        for prompt, text in zip(cycle(prompts), texts, strict=False)
    ]
    with tqdm(total=len(own), desc="scoring", unit="response", disable=not distributed.is_main()) as bar:
        found = dict(zip(own, scorer.scores([conversations[i] for i in own], bar.update), strict=True))
    parts = distributed.gather_objects((found, scorer.truncated))
    scores = {index: score for part, _ in parts for index, score in part.items()}
    scorer.truncated = sum((cut for _, cut in parts), Counter())
    if distributed.is_main() and (line := scorer.describe()):
        print(line)
    of_prompt = [[scores[i] for i in range(index, len(texts), n)] for index in range(n)]
    best = [texts[index + n * int(np.argmax(own_scores))] for index, own_scores in enumerate(of_prompt)]
    return best, of_prompt
