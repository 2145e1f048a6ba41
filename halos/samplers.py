"""The models that eval.py samples from, and where they run: in this process, on a server, or in vLLM.

A `Sampler` is the policy or the reference model of a run. It is loaded only if a sample is missing. To add another
place, write a function like those in halos/serving.py, and name it in `Sampler._served` and in halos/config.py.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from halos import distributed, loading, sampling, secrets, serving
from halos.chat import Renderer
from halos.errors import UserError
from halos.sample_files import keys_of
from halos.tokens import Encoder


def check(config: DictConfig, sample_reference: bool) -> None:
    """Raise UserError, before anything loads, if the run is a reward model, or if `sampler` cannot be used."""
    if config.loss.get("use_reward_head", False):
        raise UserError(
            f"{config.exp_name} is a reward model, which scores responses and samples none; "
            "use -m eval, or sample from another run with --best_of N --reward_model DIR"
        )
    url = config.sampler_url
    secrets.learn_urls(url or "")
    if config.sampler == "server" and not re.match(r"https?://[^/]", url or ""):
        shown = "null" if url is None else url
        raise UserError(
            f"sampler_url={shown} is not an address; start a server on the export of the run, and give "
            "sampler_url=http://HOST:PORT/v1"
        )
    if config.sampler == "vllm" and find_spec("vllm") is None:
        raise UserError("sampler=vllm: the vllm library is not installed; pip install vllm, or use sampler=hf")
    if config.sampler != "hf" and sample_reference:
        raise UserError(
            f"sampler={config.sampler} samples from one model, the policy; add -u false (a command with sampler=hf "
            "samples from both)"
        )


class Sampler:
    """One model to sample from. weights: arguments of `loading.load_lm` that say which one"""

    def __init__(self, config: DictConfig, encoder: Encoder, name: str, **weights):
        self.config, self.encoder, self.name, self.weights = config, encoder, name, weights
        self.device = distributed.default_device()
        self.dtype = loading.compute_dtype(config, self.device)
        self.stop_ids = Renderer(encoder.tokenizer).stop_ids
        self.distribution = {"top_p": config.top_p, "temperature": config.temperature}

    def keys(self, prompts: Sequence[np.ndarray]) -> list[str]:
        """Return a key per prompt, which identifies all that determines its response."""
        what = {
            "weights": loading.identity(self.config, **self.weights),
            "tokenizer": self.encoder.fingerprint,
            "max_length": self.config.model.max_length,
            "stop_ids": self.stop_ids,
            "sampler": [self.config.sampler, self.config.sampler_url],
            "dtype": str(self.dtype),
            **self.distribution,
        }
        return keys_of(what, prompts, sampling.response_seeds(prompts, self.config.seed))

    def sample(
        self, prompts: Sequence[np.ndarray], done: dict[int, str], record: Callable[[dict[int, str]], None]
    ) -> list[str]:
        """Return a response per prompt. `done` and `record` are as in `sampling.sample`."""
        if len(done) == len(prompts):
            return [done[index] for index in range(len(prompts))]
        if self.config.sampler != "hf":
            return self._from_elsewhere(prompts, done, record)
        loading.check_whole_copy(self.config, self.device)
        return sampling.sample(
            loading.load_lm(self.config, self.dtype, **self.weights).to(self.device),
            self.encoder,
            prompts,
            max_length=self.config.model.max_length,
            batch_size=self.config.model.eval_batch_size,
            seed=self.config.seed,
            description=f"sampling {self.name}",
            done=done,
            record=record,
            **self.distribution,
        )

    def _from_elsewhere(self, prompts, done, record) -> list[str]:
        """Sample on a server or with vLLM. Rank 0 asks, and all ranks get the responses."""
        texts = dict(done)
        if distributed.is_main():
            for index, text in tqdm(
                self._served(prompts, done),
                desc=f"sampling {self.name}",
                unit="response",
                total=len(prompts),
                initial=len(done),
            ):
                record({index: text})
                texts[index] = text
        texts = distributed.from_main(texts)
        return [texts[index] for index in range(len(prompts))]

    def _served(self, prompts: Sequence[np.ndarray], done: dict[int, str]) -> Iterator[tuple[int, str]]:
        """Yield (index, response) for the prompts that are not done."""
        max_length, n_at_once = self.config.model.max_length, self.config.model.eval_batch_size
        seeds = sampling.response_seeds(prompts, self.config.seed)
        requests = [
            serving.Request(index, prompt.tolist(), max_length - len(prompt), seed)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            if index not in done
        ]
        if self.config.sampler == "server":
            return serving.from_server(self.config.sampler_url, requests, n_at_once, **self.distribution)
        export = os.path.dirname(self.weights["policy_pt"])
        settings = {**self.distribution, "max_length": max_length, "stop_ids": self.stop_ids}
        return serving.from_vllm(export, self.encoder, requests, n_at_once, **settings)
