"""The data: what an example is, the datasets that can be named in `datasets=[...]`, and the loaders that make batches.

To add a dataset, write `get_{name}(split)` below; it returns a `Dataset`. To add a way of making training rows from
examples, subclass `DataLoader` and override `flatten`. Everything about tokens is in `halos/tokens.py`.
"""

import operator
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from halos import demo
from halos.datafiles import hub_rows, prompt_records, records
from halos.errors import UserError
from halos.tokens import Encoder, TokenizedExample, tokenize, truncate
from utils import rank0_print


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

    def account(self) -> dict:
        """Exact counts of what was read and dropped."""
        examples = self.examples.values()
        return {
            "name": self.name,
            "rows": self.rows,
            "examples": len(examples),
            "pairs": sum(len(example.pairs) for example in examples),
            "feedback": sum(len(example.feedback) for example in examples),
            "dropped": dict(self.dropped),
        }


#### DATASETS: each `get_{name}(split)` reads 'train' or 'test' into a Dataset

SHP_MIN_SCORE_RATIO = 2  # of training pairs; all pairs are tested on
SHP_MAX_PAIRS = 5  # per training prompt, so that popular posts do not outweigh the others
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def get_shp(split: str, source: str = "stanfordnlp/SHP") -> Dataset:
    """Stanford Human Preferences: two comments on one post, and which one got the higher score."""
    dataset = Dataset("shp")
    columns = ["history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "score_ratio"]
    for row in hub_rows("shp", source, split, columns):
        dataset.rows += 1
        better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
        if not (row["history"] or "").strip():
            dataset.dropped["empty prompt"] += 1
        elif row["score_A"] == row["score_B"]:
            dataset.dropped["equal scores"] += 1
        elif split == "train" and row["score_ratio"] < SHP_MIN_SCORE_RATIO:
            dataset.dropped[f"score ratio below {SHP_MIN_SCORE_RATIO}"] += 1
        else:
            prompt = f"{HUMAN} {row['history'].strip()}{ASSISTANT}"
            chosen, rejected = _response(row[f"human_ref_{better}"]), _response(row[f"human_ref_{worse}"])
            if example := _add_pair(dataset, prompt, chosen, rejected, "keep_start"):
                _add_score(example, chosen, row[f"score_{better}"])
                _add_score(example, rejected, row[f"score_{worse}"])
    for example in dataset.examples.values():
        _keep_generations(example, _best_first(example))
        if split == "train" and len(example.pairs) > SHP_MAX_PAIRS:
            dataset.dropped[f"more than {SHP_MAX_PAIRS} pairs a prompt"] += len(example.pairs) - SHP_MAX_PAIRS
            example.pairs = sorted(random.Random(example.prompt).sample(example.pairs, SHP_MAX_PAIRS))
            _keep_generations(example, sorted({0}.union(*example.pairs)))
        example.sft_index = 0
    return _with_examples(dataset, split)


def get_hh(split: str, source: str = "Anthropic/hh-rlhf") -> Dataset:
    """Anthropic's dialogues about being helpful and harmless: all subsets, two last replies to one conversation."""
    return _read_hh("hh", split, source)


def get_hh_helpful(split: str, source: str = "Anthropic/hh-rlhf") -> Dataset:
    return _read_hh("hh_helpful", split, source, "helpful-base")


def get_hh_harmless(split: str, source: str = "Anthropic/hh-rlhf") -> Dataset:
    return _read_hh("hh_harmless", split, source, "harmless-base")


def _read_hh(name: str, split: str, source: str, subset: str | None = None) -> Dataset:
    dataset = Dataset(name)
    for row in hub_rows(name, source, split, ["chosen", "rejected"], subset):
        dataset.rows += 1
        prompt, chosen = _last_reply(row["chosen"] or "")
        other_prompt, rejected = _last_reply(row["rejected"] or "")
        if prompt is None or prompt != other_prompt:
            dataset.dropped["no common prompt"] += 1
        elif example := _add_pair(dataset, prompt, _response(chosen), _response(rejected)):
            if example.sft_index is None:
                example.sft_index = example.generations.index(_response(chosen))
    return _with_examples(dataset, split)


def _last_reply(conversation: str) -> tuple[str | None, str]:
    """A conversation up to its last `\\n\\nAssistant:`, and the reply; None if it does not end in a reply.

    Runs of blanks inside a line become one, so that the conversations of a pair do not differ in nothing but those.
    """
    before, marker, reply = re.sub(r"(?<=\S)[ \t]{2,}", " ", conversation).rpartition(ASSISTANT)
    if not marker or HUMAN in reply:
        return None, reply
    return before + marker, reply


def get_oasst(split: str, source: str = "OpenAssistant/oasst1") -> Dataset:
    """Open Assistant's trees of messages, English only: the ranked replies to the path from the root.

    A ranking a > b > c becomes the pairs (a, b) and (b, c). A message counts as dropped if it is neither a reply in a
    ranking nor answered by one, also where it is part of a prompt.
    """
    dataset = Dataset("oasst")
    columns = ["message_id", "parent_id", "text", "role", "lang", "rank", "deleted"]
    messages, replies = set(), {}  # ids; parent's id -> the messages that can be used
    for row in hub_rows("oasst", source, {"train": "train", "test": "validation"}[split], columns):
        dataset.rows += 1
        messages.add(row["message_id"])
        if reason := _why_unusable(row):
            dataset.dropped[reason] += 1
        else:
            replies.setdefault(row["parent_id"], []).append(row)
    for prompt, answers, is_question in _conversations(replies):
        ranked = _add_ranking(dataset, prompt, answers)
        if is_question and not ranked:
            dataset.dropped["prompt without a usable reply"] += 1
    for parent, orphans in replies.items():
        dataset.dropped["dropped parent" if parent in messages else "missing parent"] += len(orphans)
    return _with_examples(dataset, split)


def _why_unusable(message: dict) -> str | None:
    if message["lang"] != "en":
        return "not English"
    if message["deleted"]:
        return "deleted"
    if not (message["text"] or "").strip():
        return "empty text"
    if message["parent_id"] is None and message["role"] != "prompter":
        return "missing parent"
    return None


def _conversations(replies: dict[str | None, list[dict]]) -> Iterator[tuple[str, list[dict], bool]]:
    """(prompt, the assistant's messages that follow it, whether a human spoke last), roots first.

    Takes what it reaches out of `replies`; what stays there hangs on no root.
    """
    names = {"prompter": HUMAN, "assistant": ASSISTANT}
    to_visit = deque((root, "") for root in replies.pop(None, []))
    while to_visit:
        message, so_far = to_visit.popleft()
        so_far += f"{names[message['role']]} {message['text'].strip()}"
        children = replies.pop(message["message_id"], [])
        to_visit.extend((child, so_far) for child in children)
        answers = [child for child in children if child["role"] == "assistant"]
        yield so_far + ASSISTANT, answers, message["role"] == "prompter"


def _add_ranking(dataset: Dataset, prompt: str, answers: list[dict]) -> bool:
    """Add the answers to one message, the best (rank 0) first; whether any could be used."""
    ranks: dict[str, int] = {}
    for answer in sorted(answers, key=lambda answer: (answer["rank"] is None, answer["rank"], answer["text"])):
        text = _response(answer["text"])
        if answer["rank"] is None:
            dataset.dropped["no rank"] += 1
        elif text in ranks:
            dataset.dropped["duplicate response"] += 1
        elif answer["rank"] in ranks.values():
            dataset.dropped["equal ranks"] += 1
        else:
            ranks[text] = answer["rank"]
    if ranks:
        example = dataset.example(prompt)
        ranking = [example.add(text) for text in ranks]
        example.pairs += [pair for pair in pairwise(ranking) if pair not in example.pairs]
        if example.sft_index is None:
            example.sft_index = ranking[0]
    return bool(ranks)


def get_demo(split: str) -> Dataset:
    """The embedded dataset: questions whose answers can be checked."""
    dataset = Dataset("demo")
    for item in demo.generate(split):
        dataset.rows += 1
        example = dataset.example(item["prompt"])
        index = [example.add(response) for response in item["responses"]]
        example.pairs += [(index[better], index[worse]) for better, worse in item["pairs"]]
        if example.sft_index is None:
            example.sft_index = index[item["sft_index"]]
    return dataset


def get_local(path: str, split: str) -> Dataset:
    """A user's own file, or folder of two: pairs or binary feedback, as `halos/datafiles.py` describes them.

    SFT imitates the first chosen, or the first desirable, response to a prompt.
    """
    dataset = Dataset(path)
    for record in records(path, split):
        dataset.rows += 1
        if not record["prompt"]:
            dataset.dropped["empty prompt"] += 1
            continue
        if not _is_unicode(record):
            dataset.dropped["invalid Unicode"] += 1
            continue
        if "chosen" in record:
            best, desirable = record["chosen"], True
            example = _add_pair(dataset, record["prompt"], best, record["rejected"])
        else:
            best, desirable = record["response"], record["desirable"]
            example = _add_feedback(dataset, record["prompt"], best, desirable)
        if example and desirable and example.sft_index is None:
            example.sft_index = example.generations.index(best)
    return _with_examples(dataset, split)


# ---- What the readers share


def _response(text: str | None) -> str:
    """A response after `Assistant:` begins with one space."""
    return " " + (text or "").strip()


def _add_pair(
    dataset: Dataset, prompt: str | list[dict], chosen: str, rejected: str, truncation_mode: str = "keep_end"
) -> Example | None:
    """Add a pair and return its example; or count why it is dropped."""
    if not chosen.strip() or not rejected.strip():
        dataset.dropped["empty response"] += 1
    elif chosen == rejected:
        dataset.dropped["identical responses"] += 1
    else:
        example = dataset.example(prompt, truncation_mode)
        pair = (example.add(chosen), example.add(rejected))
        if pair not in example.pairs:
            example.pairs.append(pair)
            return example
        dataset.dropped["duplicate pair"] += 1
    return None


def _add_feedback(dataset: Dataset, prompt: str | list[dict], response: str, desirable: bool) -> Example | None:
    """Add a judged response and return its example; or count why it is dropped."""
    if not response.strip():
        dataset.dropped["empty response"] += 1
        return None
    example = dataset.example(prompt)
    judged = (example.add(response), desirable)
    if judged in example.feedback:
        dataset.dropped["duplicate feedback"] += 1
        return None
    example.feedback.append(judged)
    return example


def _is_unicode(record: dict) -> bool:
    """False if a text has half a surrogate pair, which JSON can write (\\ud83d) and no tokenizer takes."""
    prompt = record["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    texts += [record[column] for column in ("chosen", "rejected", "response") if column in record]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _add_score(example: Example, generation: str, score: float) -> None:
    """Score a generation, added in turn; a text that came with several scores has the highest."""
    index = example.generations.index(generation)
    if index == len(example.scores):
        example.scores.append(score)
    example.scores[index] = max(example.scores[index], score)


def _best_first(example: Example) -> list[int]:
    """Indices of the generations by falling score; equal scores by their texts."""
    return sorted(range(len(example.scores)), key=lambda i: (-example.scores[i], example.generations[i]))


def _keep_generations(example: Example, kept: list[int]) -> None:
    """Keep these generations, in this order, and the pairs, sorted; so that the order of rows changes nothing."""
    new = {old: index for index, old in enumerate(kept)}
    example.generations = [example.generations[index] for index in kept]
    example.scores = [example.scores[index] for index in kept]
    example.pairs = sorted((new[better], new[worse]) for better, worse in example.pairs)


def _with_examples(dataset: Dataset, split: str) -> Dataset:
    if not dataset.examples:
        dropped = ", ".join(f"{rows} {reason}" for reason, rows in dataset.dropped.most_common()) or "none"
        raise UserError(
            f"{dataset.name}: no usable row in split {split!r} ({dataset.rows} read; dropped: {dropped}); "
            "check the source, or leave this dataset out"
        )
    return dataset


def merge(datasets: list[Dataset]) -> list[Example]:
    """The examples of all datasets, one per prompt: in the order given, and nothing of a later one lost."""
    merged: dict[str, Example] = {}
    for dataset in datasets:
        for key, example in dataset.examples.items():
            merged[key] = _merged(merged[key], example) if key in merged else example
    return list(merged.values())


def _merged(first: Example, second: Example) -> Example:
    """Both examples of one prompt in one. `first` decides about SFT and truncation."""
    both = replace(first, generations=list(first.generations))
    index = [both.add(generation) for generation in second.generations]
    pairs = [(index[better], index[worse]) for better, worse in second.pairs]
    feedback = [(index[generation], desirable) for generation, desirable in second.feedback]
    both.pairs = list(dict.fromkeys(first.pairs + pairs))
    both.feedback = list(dict.fromkeys(first.feedback + feedback))
    both.scores = []
    if first.scores and second.scores:
        new = [score for i, score in zip(index, second.scores, strict=True) if i >= len(first.generations)]
        both.scores = first.scores + new
    if both.sft_index is None and second.sft_index is not None:
        both.sft_index = index[second.sft_index]
    return both


#### LOADERS


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
        return f"{names}: no row for {type(self).__name__} ({found}); use data of the form it needs, or another loss"

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
        prompt_lengths, response_lengths = self.prompt_ids.lengths.tolist(), self.response_ids.lengths.tolist()
        counts = Counter(rows=0, tokens=0, truncated_prompts=0, truncated_responses=0)
        for row in self.order(0):
            first, prompt = self.first_response[row.example], prompt_lengths[row.example]
            responses = [response_lengths[first + generation] for generation in row.generations]
            if prompt > self.max_prompt_length and prompt + max(responses) > self.max_length:
                prompt = self.max_prompt_length
                counts["truncated_prompts"] += 1
            kept = [min(response, self.max_length - prompt) for response in responses]
            counts["truncated_responses"] += sum(map(operator.lt, kept, responses))
            counts["tokens"] += prompt + sum(kept)
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


#### FROM NAMES IN A CONFIG TO A LOADER


def read_dataset(name: str, split: str, source: str | None = None) -> Dataset:
    """The dataset `name`: a `get_{name}` of this file, or the path of a local one.

    source: where a named dataset is read from instead of the hub
    """
    getter = getattr(sys.modules[__name__], f"get_{name}", None)
    if getter is None:
        return get_local(name, split)
    return getter(split, source) if source else getter(split)


def make_loader(config, tokenizer, split: str) -> DataLoader:
    """The loader that `config.loss.dataloader` names, over the training or the test split of all `config.datasets`.

    In evaluation the examples are the same ones every time: the first `n_eval_examples` of a seeded shuffle.
    """
    datasets = [read_dataset(name, split, config.dataset_paths.get(name)) for name in config.datasets]
    training = split == "train"
    loader = getattr(sys.modules[__name__], config.loss.dataloader)(
        merge(datasets),
        tokenizer,
        batch_size=config.model.batch_size if training else config.model.eval_batch_size,
        max_length=config.model.max_length,
        max_prompt_length=config.model.max_prompt_length,
        cache_dir=config.cache_dir,
        seed=config.seed,
        n_epochs=config.n_epochs if training else 1,
        n_examples=config.n_examples if training else config.n_eval_examples,
        description=split,
    )
    loader.account = [dataset.account() for dataset in datasets]
    return loader


def describe(loader: DataLoader, split: str) -> dict:
    """Exact counts of what was read, dropped, and cut: printed, and returned for the run directory."""
    for source in loader.account:
        dropped = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items()) or "none"
        rank0_print(
            f"{split} {source['name']}: {source['rows']} rows, {source['examples']} examples, "
            f"{source['pairs']} pairs, {source['feedback']} labelled responses; dropped: {dropped}"
        )
    counts = loader.counts()
    rank0_print(
        f"{split} {type(loader).__name__}: {counts['rows']} rows per epoch, {counts['tokens']} tokens; "
        f"truncated: {counts['truncated_prompts']} prompts, {counts['truncated_responses']} responses (EOS lost)"
    )
    return {"datasets": loader.account, "loader": {"name": type(loader).__name__, **counts}}


class Prompt(NamedTuple):
    """What a model is sampled for, and the response that people preferred ('' where none is known)."""

    text: str
    chosen: str
    truncation_mode: str


def read_prompts(config, tokenizer, path: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The first prompts of a seeded shuffle of the test split; or those of a file, in its order.

    limit: how many; None: `config.n_samples` of the test split, or all of the file
    """
    if path:
        examples = [Example(row["prompt"], [row["chosen"]], sft_index=0) for row in prompt_records(path)][:limit]
    else:
        examples = merge([read_dataset(name, "test", config.dataset_paths.get(name)) for name in config.datasets])
        random.Random(f"{config.seed}-prompts").shuffle(examples)
        limit = limit or config.n_samples
        if len(examples) < limit:
            rank0_print(f"{limit} prompts were asked for; the test split has {len(examples)}, all of which are used")
        examples = examples[:limit]
    return [
        Prompt(render_prompt(example.prompt, tokenizer), preferred(example, tokenizer), example.truncation_mode)
        for example in examples
    ]


def preferred(example: Example, tokenizer) -> str:
    """The chosen response of the first pair, else the one that SFT imitates, else ''."""
    index = example.pairs[0][0] if example.pairs else example.sft_index
    return render_responses(example, tokenizer)[index] if index is not None else ""
