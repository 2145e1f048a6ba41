"""Reference log-probs, computed once for all runs with the same reference model: `{cache_dir}/.logps/{key}`.

Before training, `load` looks up all responses that the run will see. Those that are missing are computed first. The
policy computes them where it is still the reference model, which is so before its first update, so no second model is
loaded. With everything on disk, there are no forward passes of the reference, except for a random 1 %, which are
compared with what is stored. The key is in `halos/reference_key.py`, the files are in `halos/logps_store.py`.
"""

import hashlib
import os
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from halos import distributed, loading, reference_key, sharding
from halos.engine import Forward
from halos.epoch import BLOCK, Row, Rows
from halos.errors import UserError
from halos.loader import DataLoader
from halos.logps_store import ADDRESS, LogpsStore, add_segment, addresses, addresses_of_ids, segments
from halos.models import PolicyModel
from halos.tokens import Role, TokenizedExample

FLUSH_SECONDS = 30.0  # a run that is killed loses at most so much of the pass, and the batch that it is in
PACKS = 4  # forward passes of each rank in one batch of the pass; more: ranks are better balanced
CHECKED, LEAST_CHECKED = 0.01, 4  # share of the entries that is computed again at the start, and their least number

# Largest difference of a log-prob from its stored value, in nats; of a value below -1, relative to it. Batches are
# packed in another way, so that even equal weights differ by rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class ReferenceCache:
    """Log-probs of all responses that a run needs."""

    def __init__(self, store: LogpsStore):
        self.store = store

    def logps(self, examples: list[TokenizedExample]) -> torch.Tensor:
        """(n_tokens,) float32 log-probs of all response tokens of a batch, in nats, on the CPU."""
        wanted = np.frombuffer(b"".join(one for example in examples for one in addresses(example)), ADDRESS)
        entries = self.store.find(wanted)
        if (entries < 0).any():
            raise UserError(
                "a batch has responses that are not in the epochs of the data loader, so their reference log-probs "
                "are not on disk; use cache_reference_logps=false with a loss that changes its examples"
            )
        return torch.from_numpy(np.concatenate([self.store[entry] for entry in entries]))


def load(
    config: DictConfig, tokenizer, loaders: list[DataLoader], policy_pt: str | None = None, needs_model: bool = False
):
    """Return the policy, the reference model, and the cache: one of the last two is None, or both without a reference.

    policy_pt: a checkpoint to load into the policy instead
    needs_model: whether the loss needs more of the reference model than log-probs, so that there is no cache
    """
    device = distributed.default_device()
    directory = _directory(config, device, needs_model)
    if directory is None:
        return *loading.load_policy_and_reference(config, tokenizer, device, policy_pt), None
    responses = Responses(loaders)
    store = _open(directory)
    missing = distributed.from_main(responses.missing(store))
    starts_equal = policy_pt is None and starts_as_reference(config, device)
    policy, reference = loading.load_policy_and_reference(
        config, tokenizer, device, policy_pt, with_reference=bool(len(missing)) and not starts_equal
    )
    model = policy if starts_equal else reference
    said = f"{len(responses) - len(missing):,} of {len(responses):,} responses on disk"
    if model is not None:
        filling = Pass(model, responses, config.model.max_tokens_per_forward)
        tolerance = TOLERANCE[loading.reference_dtype(config, device)]
        checked = filling.check(store, distributed.from_main(responses.sample(missing)), tolerance)
        said += f", {checked:,} of them checked" if checked else ""
        if len(missing):
            started = time.monotonic()
            filling.fill(directory, missing)
            store = _open(directory)
            said += f"; {len(missing):,} computed in {time.monotonic() - started:.1f} s"
    if distributed.is_main():
        print(f"reference log-probs: {said} ({directory})", flush=True)
    return policy, None, ReferenceCache(store)


def _directory(config: DictConfig, device: torch.device, needs_model: bool) -> str | None:
    """Return where the log-probs are of this run's reference model; None if there is none, or no cache is wanted."""
    if not (config.loss.use_reference_model and config.cache_reference_logps):
        return None
    if needs_model:
        if distributed.is_main():
            print(f"reference log-probs: computed in every step, since {config.loss.name} needs the reference model")
        return None
    key = distributed.from_main(distributed.on_main(reference_key.of_run, config, device))
    if key is None and distributed.is_main():
        print("reference log-probs: computed in every step, since the files of its weights are not known", flush=True)
    return os.path.join(reference_key.folder(config), key) if key else None


def starts_as_reference(config: DictConfig, device: torch.device) -> bool:
    """Return whether the policy computes, before its first update, what the reference model does, bit by bit.

    A policy with an adapter is its own reference model, and the adapter starts at 0.
    """
    if config.model.use_peft:
        return True
    dtype = loading.compute_dtype(config, device)
    return loading.reference_dtype(config, device) == dtype and loading.policy_dtype(config) in (torch.float32, dtype)


def _open(directory: str) -> LogpsStore:
    """Open the same segments on all ranks. Others may be added at any time."""
    return LogpsStore(directory, distributed.from_main(distributed.on_main(segments, directory)))


#### THE RESPONSES OF A RUN


class Place(NamedTuple):
    """Where a response is found: the row of a loader, and its number in the row."""

    loader: DataLoader
    row: Row
    number: int

    def example(self) -> TokenizedExample:
        """The response alone after its prompt, as a chosen one, since responses of all roles are computed alike."""
        return self.loader.tokenized(self.row).only([self.number])._replace(roles=(Role.CHOSEN,))


class Responses:
    """All different responses that a run will see, after their prompts, by address."""

    def __init__(self, loaders: list[DataLoader]):
        self.rows = [(loader, rows) for loader in loaders for rows in rows_of(loader)]
        counts = [np.diff(rows.offsets) for _, rows in self.rows]
        self.first_row = np.cumsum([0, *map(len, counts)])  # of each part of `rows`, among all rows
        self.first_of_row = np.concatenate([[0], *counts]).cumsum()
        shown = {"unit": " rows", "delay": 3, "leave": False, "disable": not distributed.is_main()}
        with tqdm(desc="looking up reference log-probs", total=self.first_row[-1], **shown) as bar:
            found = b"".join(part for one in self.rows for part in _addresses_of(*one, bar))
        # first: where each one occurs first
        self.addresses, self.first = np.unique(np.frombuffer(found, ADDRESS), return_index=True)

    def __len__(self) -> int:
        return len(self.addresses)

    def missing(self, store: LogpsStore) -> np.ndarray:
        """Return the responses that are not in the store, in the order of the data."""
        missing = np.flatnonzero(store.find(self.addresses) < 0)
        return missing[np.argsort(self.first[missing])]

    def sample(self, missing: np.ndarray) -> np.ndarray:
        """Draw 1 % of the responses that are not missing. Every start draws others."""
        present = np.setdiff1d(np.arange(len(self)), missing)
        n = min(len(present), max(LEAST_CHECKED, round(CHECKED * len(present))))
        return np.array(sorted(random.SystemRandom().sample(present.tolist(), n)), np.int64)

    def place(self, response: int) -> Place:
        where = self.first[response]
        row = int(np.searchsorted(self.first_of_row, where, side="right")) - 1
        part = int(np.searchsorted(self.first_row, row, side="right")) - 1
        loader, rows = self.rows[part]
        return Place(loader, rows[row - int(self.first_row[part])], int(where - self.first_of_row[row]))

    def by_prompt(self, chosen: np.ndarray) -> np.ndarray:
        """Return the chosen responses in such an order that those of a prompt stand together."""
        prompts = (self.place(one).example().prompt for one in chosen)
        hashes = b"".join(hashlib.blake2b(prompt.tobytes(), digest_size=16).digest() for prompt in prompts)
        _, first, prompt = np.unique(np.frombuffer(hashes, ADDRESS), return_index=True, return_inverse=True)
        return chosen[np.argsort(first[prompt], kind="stable")]


def rows_of(loader: DataLoader) -> Iterator[Rows]:
    """Yield the rows of all epochs of the run, without those that an earlier epoch had."""
    seen = np.empty(0, ADDRESS)
    left, epoch = loader.total_examples, 0
    while left > 0:
        rows = loader.order(epoch)
        rows = rows if left >= len(rows) else rows.take(np.arange(left))
        left, epoch = left - len(rows), epoch + 1
        if left > 0 or len(seen):
            keys = rows.keys()
            new = np.flatnonzero(~np.isin(keys, seen))
            rows, seen = rows.take(new), np.concatenate((seen, keys[new]))
        if len(rows):
            yield rows


def _addresses_of(loader: DataLoader, rows: Rows, bar: tqdm) -> Iterator[bytes]:
    """Yield the addresses of the responses of each row."""
    whole = loader.are_whole(rows)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        for row, is_whole in zip(part, whole[start : start + BLOCK].tolist(), strict=True):
            yield from addresses_of_ids(*loader.whole(row)) if is_whole else addresses(loader.tokenized(row))
        bar.update(len(part))


#### THE PASS


class Pass:
    """Forward passes of the reference model over responses, on all ranks together, without gradient.

    Batches are large, and follow from the responses alone. So a pass that goes on after it was killed has the batches
    that it would have had, and the log-probs that it would have computed, bit by bit.
    """

    def __init__(self, model: PolicyModel, responses: Responses, max_tokens: int):
        self.model = model
        self.responses = responses
        self.max_tokens = max_tokens

    def fill(self, directory: str, missing: np.ndarray) -> None:
        """Compute the missing responses, and add them to the store in segments."""
        main = distributed.is_main()
        started = written_at = time.monotonic()
        os.makedirs(directory, exist_ok=True)
        entries: list[tuple[bytes, np.ndarray]] = []
        shown = {"unit": " responses", "delay": 3, "leave": False, "disable": not main}
        with tqdm(desc="reference log-probs", total=len(missing), **shown) as bar:
            for chosen, logps, n_tokens in self.run(self.responses.by_prompt(missing)):
                if main:
                    entries += zip((self.responses.addresses[one].tobytes() for one in chosen), logps, strict=True)
                if entries and time.monotonic() - written_at >= FLUSH_SECONDS:
                    _add(directory, entries)
                    entries, written_at = [], time.monotonic()
                bar.set_postfix_str(f"{n_tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
                bar.update(len(chosen))
        if entries:
            _add(directory, entries)

    def check(self, store: LogpsStore, sample: np.ndarray, tolerance: float) -> int:
        """Compute a sample again. Raises UserError with the first entry that is not what is stored."""
        for chosen, logps, _ in self.run(self.responses.by_prompt(sample)):
            entries = store.find(self.responses.addresses[chosen])
            for one, entry, computed in zip(chosen, entries, logps, strict=True):
                stored = store[entry]
                allowed = tolerance * np.maximum(1, np.abs(computed))
                wrong = ~(np.abs(stored - computed) <= allowed) & ~(np.isnan(stored) & np.isnan(computed))
                if wrong.any():
                    distributed.on_main(self._differs, store, int(one), stored, computed, int(wrong.argmax()))
        return len(sample)

    def _differs(self, store: LogpsStore, response: int, stored: np.ndarray, computed: np.ndarray, token: int):
        name = self.responses.place(response).example().ids[0]
        address = self.responses.addresses[response].tobytes().hex()
        raise UserError(
            f"the reference log-prob of token {token} of {name} (entry {address}) is stored as {stored[token]:.6g} and "
            f"is now {computed[token]:.6g} nats; remove {store.directory}, and all of them are computed again"
        )

    @torch.no_grad()
    def run(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray], int]]:
        """Yield (responses, the log-probs of each, tokens so far), batch after batch. Prompts stand together."""
        was_training, done = self.model.training, 0
        self.model.eval()
        for start, examples in self._batches(chosen):
            leaf = Forward(self.model, examples, self.max_tokens).tokens.logps.cpu().numpy()
            lengths = [n for example in examples for n in example.n_targets]
            done += sum(example.n_tokens for example in examples)
            yield chosen[start : start + len(lengths)], np.split(leaf, np.cumsum(lengths)[:-1]), done
        self.model.train(was_training)
        sharding.reshard(self.model)

    def _batches(self, chosen: np.ndarray) -> Iterator[tuple[int, list[TokenizedExample]]]:
        """Yield batches of whole groups of responses, and where in `chosen` each batch starts."""
        limit = PACKS * self.max_tokens * distributed.world_size()
        batch: list[TokenizedExample] = []
        start = n_responses = n_tokens = 0
        for example in self._grouped(chosen):
            if batch and n_tokens + example.n_tokens > limit:
                yield start, batch
                batch, start, n_tokens = [], start + n_responses, 0
                n_responses = 0
            batch.append(example)
            n_responses, n_tokens = n_responses + len(example.responses), n_tokens + example.n_tokens
        if batch:
            yield start, batch

    def _grouped(self, chosen: np.ndarray) -> Iterator[TokenizedExample]:
        """Yield examples with all responses of a prompt that fit into one forward pass."""
        together: TokenizedExample | None = None
        for one in chosen:
            example = self.responses.place(one).example()
            if together is None:
                together = example
            elif (joined := _joined(together, example)) and joined.n_tokens <= self.max_tokens:
                together = joined
            else:
                yield together
                together = example
        if together is not None:
            yield together


def _joined(one: TokenizedExample, other: TokenizedExample) -> TokenizedExample | None:
    """Return one example with the responses of two; None if their prompts differ."""
    if not np.array_equal(one.prompt, other.prompt):
        return None
    return TokenizedExample(
        one.prompt, one.responses + other.responses, one.roles + other.roles, trained=one.masks + other.masks
    )


def _add(directory: str, entries: list[tuple[bytes, np.ndarray]]) -> None:
    add_segment(directory, b"".join(address for address, _ in entries), [logps for _, logps in entries])
