"""The data: what an example is, the datasets that can be named in `datasets=[...]`, and the loaders that make batches.

To add a dataset, write `get_{name}(split)` below; it returns a `Dataset`. To add a way of making training rows from
examples, subclass `DataLoader` and override `flatten`. Everything about tokens is in `halos/tokens.py`.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from halos.errors import UserError
from halos.tokens import Encoder, TokenizedExample, tokenize, truncate


@dataclass
class Example:
    """One prompt, its distinct responses, and what people thought of them."""

    prompt: str | list[dict]  # text, or chat messages that the loader renders with the tokenizer's template
    generations: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # one per generation where the source has scores, else empty
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices into generations
    feedback: list[tuple[int, bool]] = field(default_factory=list)  # (generation, desirable), for binary feedback
    sft_index: int | None = None  # the generation that SFT imitates
    truncation_mode: str = "keep_end"  # which end of a prompt survives when it is too long: keep_start or keep_end
    dataset_name: str = ""

    def add(self, generation: str) -> int:
        """The index of a generation, which is stored once however often it comes."""
        if generation not in self.generations:
            self.generations.append(generation)
        return self.generations.index(generation)


class Dataset:
    """The examples of one source, one per prompt, with an exact account of the rows that were read and dropped."""

    def __init__(self, name: str):
        self.name = name
        self.examples: dict[str, Example] = {}
        self.rows = 0
        self.dropped: Counter[str] = Counter()  # reason -> rows

    def example(self, prompt: str | list[dict], truncation_mode: str = "keep_end") -> Example:
        """The example of this prompt, made when the prompt is new."""
        key = prompt if isinstance(prompt, str) else repr(prompt)
        if key not in self.examples:
            self.examples[key] = Example(prompt, truncation_mode=truncation_mode, dataset_name=self.name)
        return self.examples[key]


def render_prompt(prompt: str | list[dict], tokenizer) -> str:
    """Text as it is; chat messages through the tokenizer's chat template, or in the Human / Assistant form."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"\n\n{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt]
    return "".join(turns) + "\n\nAssistant:"


def render_responses(example: Example, tokenizer) -> list[str]:
    """Text as it is; after chat messages in the Human / Assistant form, one space before each response."""
    if isinstance(example.prompt, str) or tokenizer.chat_template:
        return example.generations
    return [f" {generation.lstrip(' ')}" for generation in example.generations]


class Row(NamedTuple):
    """What is trained on together: some responses to one prompt. A pair has two, chosen first; else there is one."""

    example: int  # index into DataLoader.examples
    generations: tuple[int, ...]
    chosen: tuple[bool, ...]


class DataLoader:
    """Global batches of tokenized examples: a pure function of (seed, epoch), the same on every rank.

    A subclass says in `flatten` which rows an epoch has and in which order. A batch is a list of `TokenizedExample`;
    the last one of an epoch may be smaller. Iteration goes on from the position of `state_dict()`.

    batch_size: rows per batch over all GPUs
    n_epochs, n_examples: stop after so many, whichever comes first; None for no limit
    """

    data_format: str | None = None  # what a trainer's data_format is compared with: sft, unpaired, paired

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
        description: str = "",
    ):
        self.examples = examples
        self.encoder = Encoder(tokenizer)
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.n_epochs = n_epochs
        self.n_examples = n_examples
        self.epoch = 0
        self.position = 0  # rows of this epoch already given out
        self.examples_seen = 0
        self._tokenize(tokenizer, cache_dir, description)
        self.rows_per_epoch = len(self.flatten(random.Random(0)))
        if not self.rows_per_epoch:
            raise UserError(self._no_rows())

    def flatten(self, rng: random.Random) -> list[Row]:
        """All rows of one epoch, in training order."""
        raise NotImplementedError(f"{type(self).__name__} does not say which rows it trains on; define flatten()")

    def _tokenize(self, tokenizer, cache_dir: str, description: str) -> None:
        prompts, responses = [], []
        self.first_response = []  # index of an example's first generation among all of them
        for example in self.examples:
            prompts.append(render_prompt(example.prompt, tokenizer))
            self.first_response.append(len(responses))
            responses.extend(render_responses(example, tokenizer))
        self.prompt_texts = prompts
        self.prompt_ids = tokenize(prompts, self.encoder, "prompts", cache_dir, f"{description} prompts")
        self.response_ids = tokenize(responses, self.encoder, "responses", cache_dir, f"{description} responses")

    def _no_rows(self) -> str:
        have = Counter(
            kind
            for example in self.examples
            for kind in (["pairs"] * bool(example.pairs) + ["binary feedback"] * bool(example.feedback))
        )
        found = ", ".join(f"{count} examples with {kind}" for kind, count in have.items()) or "no usable example"
        names = ", ".join(sorted({example.dataset_name for example in self.examples})) or "the datasets"
        return (
            f"{names}: no row for {type(self).__name__} ({found}); use data of the form it needs, or another loss"
        )

    def order(self, epoch: int) -> list[Row]:
        """The rows of an epoch in the order in which they are trained on."""
        return self.flatten(random.Random(f"{self.seed}-{epoch}"))

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
        first = self.first_response[row.example]
        prompt, responses = truncate(
            self.prompt_ids[row.example],
            tuple(self.response_ids[first + generation] for generation in row.generations),
            self.max_length,
            self.max_prompt_length,
            self.examples[row.example].truncation_mode,
            len(self.encoder.bos),
        )
        return TokenizedExample(prompt, responses, row.chosen)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "examples_seen": self.examples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.examples_seen = state["examples_seen"]

    def counts(self) -> dict[str, int]:
        """Exact counts of one epoch: rows, tokens, and what truncation did to them."""
        prompt_lengths, response_lengths = self.prompt_ids.lengths, self.response_ids.lengths
        counts = Counter(rows=0, tokens=0, truncated_prompts=0, truncated_responses=0)
        for row in self.order(0):
            first, prompt = self.first_response[row.example], prompt_lengths[row.example]
            responses = [response_lengths[first + generation] for generation in row.generations]
            if prompt > self.max_prompt_length and prompt + max(responses) > self.max_length:
                prompt = self.max_prompt_length
                counts["truncated_prompts"] += 1
            kept = [min(response, self.max_length - prompt) for response in responses]
            counts["truncated_responses"] += sum(k < r for k, r in zip(kept, responses, strict=True))
            counts["tokens"] += int(prompt + sum(kept))
            counts["rows"] += 1
        return {"examples": len(self.examples), **counts}


class SFTDataLoader(DataLoader):
    """The response to imitate of every example that has one."""

    data_format = "sft"

    def flatten(self, rng: random.Random) -> list[Row]:
        rows = [
            Row(index, (example.sft_index,), (True,))
            for index, example in enumerate(self.examples)
            if example.sft_index is not None
        ]
        rng.shuffle(rows)
        return rows


class PairedPreferenceDataLoader(DataLoader):
    """Every preference pair, the chosen response first."""

    data_format = "paired"

    def flatten(self, rng: random.Random) -> list[Row]:
        rows = [
            Row(index, pair, (True, False)) for index, example in enumerate(self.examples) for pair in example.pairs
        ]
        rng.shuffle(rows)
        return rows


class UnpairedPreferenceDataLoader(DataLoader):
    """Single responses marked chosen or rejected: the halves of every pair, and binary feedback as it is.

    Chosen and rejected halves alternate, so that a batch from paired data has as many of one as of the other. The
    rejected halves run half an epoch behind the chosen ones, which keeps the halves of a pair out of one batch unless
    an epoch is hardly longer than a batch. Binary feedback is mixed in at random, in its natural proportions.
    """

    data_format = "unpaired"

    def flatten(self, rng: random.Random) -> list[Row]:
        pairs = [(index, pair) for index, example in enumerate(self.examples) for pair in example.pairs]
        rng.shuffle(pairs)
        lag = len(pairs) // 2
        halves = []
        for (index, (better, _)), (other, (_, worse)) in zip(pairs, pairs[lag:] + pairs[:lag], strict=True):
            halves += [Row(index, (better,), (True,)), Row(other, (worse,), (False,))]
        feedback = [
            Row(index, (generation,), (desirable,))
            for index, example in enumerate(self.examples)
            for generation, desirable in example.feedback
        ]
        rng.shuffle(feedback)
        return _merge_at_random(halves, feedback, rng)


def _merge_at_random(one: list[Row], other: list[Row], rng: random.Random) -> list[Row]:
    """Both lists in one, each in its own order, every interleaving equally likely."""
    from_one = [True] * len(one) + [False] * len(other)
    rng.shuffle(from_one)
    ones, others = iter(one), iter(other)
    return [next(ones) if first else next(others) for first in from_one]
