"""Global batches of tokenized examples, as a pure function of (seed, epoch): the same on every rank.

`DataLoader` is what the loaders in `dataloaders.py` inherit. A loader says in `flatten` which rows an epoch has and in
which order; everything else about batches is here. Tokens are in `halos/tokens.py`.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from halos.chat import Renderer
from halos.epoch import CODES, Row, Rows, by_prompt
from halos.errors import UserError
from halos.example_table import ExampleTable, TextsDropped, without_texts
from halos.examples import Example
from halos.thinning import repeated
from halos.token_store import tokenize
from halos.tokens import Encoder, Role, TokenizedExample, truncate


class DataLoader:
    """Global batches of tokenized examples: a pure function of (seed, epoch), the same on every rank.

    A subclass says in `flatten` which rows an epoch has and in which order. A batch is a list of `TokenizedExample`;
    the last one of an epoch may be smaller. Iteration goes on from the position of `state_dict()`.

    batch_size: rows per batch over all GPUs
    n_epochs, n_examples: stop after so many, whichever comes first; None for no limit
    weights: name of a dataset -> times that its rows are seen per epoch; 1 where it is not named (halos/thinning.py)
    group_prompts: put the rows of a prompt into one batch, where their prompt runs once
    keep_texts: whether the examples keep their texts in memory; without, they do if `flatten` reads them
    """

    data_format: str | None = None  # what a trainer's data_format is compared with: sft, unpaired, paired
    loss_keys: tuple[str, ...] = ()  # keys of the loss's YAML that the loader takes as arguments

    def __init__(
        self,
        examples: list[Example],
        tokenizer,
        *,
        batch_size: int,
        max_length: int,
        max_prompt_length: int,
        cache_dir: str,
        seed: int = 1,
        n_epochs: int | None = 1,
        n_examples: int | None = None,
        weights: dict[str, float] | None = None,
        group_prompts: bool = False,
        keep_texts: bool = True,
        description: str = "",
    ):
        self.seed = seed
        self.examples: Any  # a list of Example, or what reads as one
        self.examples, self.thinned = with_texts = repeated(examples, weights or {})
        self.encoder = Encoder(tokenizer)
        self.renderer = Renderer(tokenizer)
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.n_epochs = n_epochs
        self.n_examples = n_examples
        self.group_prompts = group_prompts
        self.epoch = 0
        self.position = 0  # rows of this epoch already given out
        self.examples_seen = 0
        self.account: list[dict[str, Any]] = []  # of each dataset: what was read and dropped
        self._tokenize(tokenizer, cache_dir, description)
        self.prompt_lengths = self.prompt_ids.lengths
        self.response_lengths = self.response_ids.lengths
        self.dropped_rows = 0  # of one epoch, since their responses are equal after truncation
        self.ordered: tuple[int, Rows] | None = None  # the epoch that was asked for last
        if not keep_texts:
            self._drop_texts()
        try:
            self.rows_per_epoch = len(self.order(0))
        except TextsDropped:
            self.examples, self.thinned = with_texts
            self.rows_per_epoch = len(self.order(0))
        if not self.rows_per_epoch:
            raise UserError(self._no_rows())

    def flatten(self, rng: random.Random) -> list[Row]:
        """All rows of one epoch, in training order."""
        raise NotImplementedError(f"{type(self).__name__} does not say which rows it trains on; define flatten()")

    def _tokenize(self, tokenizer, cache_dir: str, description: str) -> None:
        prompts: list[str] = []
        responses: list[str] = []
        first_response = []
        for example in self.examples:
            prompts.append(self.renderer.prompt(example))
            first_response.append(len(responses))
            responses.extend(self.renderer.responses(example))
        self.first_response = np.array(first_response)  # index of an example's first generation among all of them
        self.prompt_ids = tokenize(prompts, self.encoder, "prompts", cache_dir, f"{description} prompts")
        self.response_ids = tokenize(responses, self.encoder, "responses", cache_dir, f"{description} responses")

    def _drop_texts(self) -> None:
        self.examples = ExampleTable(self.examples)
        self.thinned = [
            replace(one, originals={index: without_texts(example) for index, example in one.originals.items()})
            for one in self.thinned
        ]

    def _no_rows(self) -> str:
        if self.dropped_rows:
            return (
                f"all {self.dropped_rows} rows have equal responses after truncation to model.max_length="
                f"{self.max_length}: there is nothing to prefer; raise model.max_length, or lower "
                f"model.max_prompt_length={self.max_prompt_length}"
            )
        have = Counter(
            kind
            for example in self.examples
            for kind in (["pairs"] * bool(example.pairs) + ["binary feedback"] * bool(example.feedback))
        )
        found = ", ".join(f"{count} examples with {kind}" for kind, count in have.items()) or "no usable example"
        names = ", ".join(sorted({example.dataset_name for example in self.examples})) or "the datasets"
        return f"{names}: no row for {type(self).__name__} ({found}); use data of the form it needs, or another loss"

    def order(self, epoch: int) -> Rows:
        """The rows of an epoch in the order in which they are trained on."""
        if self.ordered is None or self.ordered[0] != epoch:
            self.ordered = None  # two epochs need not be in memory
            self.ordered = epoch, self._order(epoch)
        return self.ordered[1]

    def _order(self, epoch: int) -> Rows:
        for thinned in self.thinned:
            thinned.take(self.examples, self.seed, epoch)
        rows = Rows.of(self.flatten(random.Random(f"{self.seed}-{epoch}")))
        cut = np.flatnonzero(self._prompt_lengths(rows) + rows.largest(self._response_lengths(rows)) > self.max_length)
        dropped = [position for position in cut.tolist() if self.is_one_response(rows[position])]
        self.dropped_rows = len(dropped)
        rows = rows.take(np.delete(np.arange(len(rows)), dropped)) if dropped else rows
        return by_prompt(rows, self.batch_size) if self.group_prompts else rows

    def is_one_response(self, row: Row) -> bool:
        """Return whether truncation leaves the same of all of a row's trained responses: there is nothing to prefer."""
        trained = [i for i, role in enumerate(row.roles) if role is not Role.UNRELATED]
        lengths = [self.response_lengths[self.first_response[index] + i] for index, i in row.responses]
        if len(trained) < 2 or self.prompt_lengths[row.example] + max(lengths) <= self.max_length:
            return False
        responses = self.tokenized(row).responses
        return len({responses[i].tobytes() for i in trained}) < len(trained)

    def _prompt_lengths(self, rows: Rows) -> np.ndarray:
        """(n_rows,) tokens of the prompt of each row."""
        return self.prompt_lengths[rows.examples]

    def _response_lengths(self, rows: Rows) -> np.ndarray:
        """(n_responses,) tokens of each response of all rows."""
        return self.response_lengths[self.first_response[rows.responses[:, 0]] + rows.responses[:, 1]]

    def __len__(self) -> int:
        """Batches from the start to the end of training."""
        whole, rest = divmod(self.total_examples, self.rows_per_epoch)
        return whole * -(-self.rows_per_epoch // self.batch_size) + -(-rest // self.batch_size)

    @property
    def total_examples(self) -> int:
        """Rows from the start to the end of training."""
        limits = [self.n_examples] if self.n_examples is not None else []
        limits += [self.n_epochs * self.rows_per_epoch] if self.n_epochs is not None else []
        return min(limits)

    def restart(self) -> None:
        """Back to the first row of the first epoch."""
        self.load_state_dict({"epoch": 0, "position": 0, "examples_seen": 0})

    def __iter__(self) -> Iterator[list[TokenizedExample]]:
        while self.examples_seen < self.total_examples:
            rows = self.order(self.epoch)
            while self.position < len(rows) and self.examples_seen < self.total_examples:
                size = min(self.batch_size, self.total_examples - self.examples_seen)
                batch = rows[self.position : self.position + size]
                # Counted before the batch is used: a state saved after its update points to the next one.
                self.position += len(batch)
                self.examples_seen += len(batch)
                yield [self.tokenized(row) for row in batch]
            if self.position >= len(rows):
                self.epoch, self.position = self.epoch + 1, 0

    def tokenized(self, row: Row) -> TokenizedExample:
        """The tokens of a row, cut to length, with what its examples know of it."""
        prompt, responses = self._cut(row, *self.whole(row))
        known = [(self.examples[index], generation) for index, generation in row.responses]
        has_scores = any(example.scores for example, _ in known)
        has_context = any(len(response) and response.min() < 0 for response in responses)  # stored as ~id
        return TokenizedExample(
            prompt,
            tuple(np.where(response < 0, ~response, response) for response in responses) if has_context else responses,
            row.roles,
            scores=tuple(e.scores[i] if e.scores else math.nan for e, i in known) if has_scores else (),
            ids=tuple(f"{example.id}/{generation}" for example, generation in known),
            dataset=self.examples[row.example].dataset_name,
            trained=tuple(response >= 0 for response in responses) if has_context else (),
        )

    def whole(self, row: Row) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The ids of a row's prompt and responses before truncation. Context in a response is stored as ~id."""
        responses = (self.response_ids[self.first_response[index] + i] for index, i in row.responses)
        return self.prompt_ids[row.example], tuple(responses)

    def are_whole(self, rows: Rows) -> np.ndarray:
        """(n_rows,) bool: truncation cuts nothing, and all tokens of the responses are trained on."""
        fits = self._prompt_lengths(rows) + rows.largest(self._response_lengths(rows)) <= self.max_length
        return fits & (not getattr(self.response_ids, "has_context", True))

    def positions_kept(self, row: Row) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The positions in `whole(row)` of the tokens that truncation leaves."""
        prompt, responses = self.whole(row)
        return self._cut(row, np.arange(len(prompt)), tuple(np.arange(len(response)) for response in responses))

    def _cut(self, row: Row, prompt: np.ndarray, responses: tuple[np.ndarray, ...]):
        return truncate(
            prompt,
            responses,
            row.roles,
            self.max_length,
            self.max_prompt_length,
            self.examples[row.example].truncation_mode,
            len(self.encoder.bos),
        )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "examples_seen": self.examples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.examples_seen = state["examples_seen"]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the lengths of all texts and of the rows of the first epoch: a resumed run knows its data by it."""
        lengths = np.concatenate((self.prompt_lengths, self.response_lengths)).astype(np.int64)
        digest = hashlib.blake2b(lengths.tobytes(), digest_size=16)
        for row in self.order(0):
            digest.update(repr(row[:2]).encode())
        return digest.hexdigest()

    def class_counts(self) -> tuple[int, int]:
        """Return how many responses of one epoch are chosen (or desirable), and how many rejected."""
        counts = np.bincount(self.order(0).roles, minlength=len(CODES))
        return int(counts[CODES[Role.CHOSEN]]), int(counts[CODES[Role.REJECTED]])

    def counts(self) -> dict[str, int]:
        """Exact counts of one epoch: rows, tokens, and what truncation did to them."""
        rows = self.order(0)
        prompts, responses = self._prompt_lengths(rows), self._response_lengths(rows)
        longest = rows.largest(np.where(rows.roles == CODES[Role.UNRELATED], 0, responses))
        is_cut = (prompts > self.max_prompt_length) & (prompts + longest > self.max_length)
        prompts = np.where(is_cut, self.max_prompt_length, prompts)
        kept = np.minimum(responses, self.max_length - prompts[rows.row_of_response])
        return {
            "examples": len(self.examples),
            "rows": len(rows),
            "tokens": int(prompts.sum() + kept.sum()),
            "truncated_prompts": int(is_cut.sum()),
            "truncated_responses": int((kept < responses).sum()),
        }
