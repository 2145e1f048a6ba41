"""Datasets that can be named in `datasets=[...]`, and loaders that turn their examples into training rows.

To add a dataset, write `get_{name}(split)` below. It returns a `Dataset` of `Example`s (`halos/examples.py`). To build
training rows in another way, subclass `DataLoader` (`halos/loader.py`) and override `flatten`.
"""

import os
import random
import re
import sys
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from halos import demo
from halos.chat import ASSISTANT, HUMAN, render_prompt, render_responses
from halos.datafiles import hub_rows, prompt_records, records
from halos.examples import Dataset, Example, merge
from halos.loader import DataLoader, Row
from utils import rank0_print

#### DATASETS: each `get_{name}(split)` reads 'train' or 'test' into a Dataset

SHP_MIN_SCORE_RATIO = 2  # for training pairs only; the test split keeps all pairs
SHP_MAX_PAIRS = 5  # per training prompt, so that popular posts do not outweigh the others


def get_shp(split: str, source: str = "stanfordnlp/SHP") -> Dataset:
    """Read Stanford Human Preferences: two comments on one post; the one with the higher score is chosen."""
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
            if example := dataset.add_pair(prompt, chosen, rejected, "keep_start"):
                example.add_score(chosen, row[f"score_{better}"])
                example.add_score(rejected, row[f"score_{worse}"])
    for example in dataset.examples.values():
        example.keep(example.best_first())
        if split == "train" and len(example.pairs) > SHP_MAX_PAIRS:
            dataset.dropped[f"more than {SHP_MAX_PAIRS} pairs a prompt"] += len(example.pairs) - SHP_MAX_PAIRS
            example.pairs = sorted(random.Random(example.prompt).sample(example.pairs, SHP_MAX_PAIRS))
            example.keep(sorted({0}.union(*example.pairs)))
        example.sft_index = 0
    return dataset.not_empty(split)


def get_hh(split: str, source: str = "Anthropic/hh-rlhf") -> Dataset:
    """Read Anthropic's helpful and harmless dialogues, all subsets: two final replies to the same conversation."""
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
        elif example := dataset.add_pair(prompt, _response(chosen), _response(rejected)):
            if example.sft_index is None:
                example.sft_index = example.generations.index(_response(chosen))
    return dataset.not_empty(split)


def _last_reply(conversation: str) -> tuple[str | None, str]:
    """Split a conversation into (prompt, reply) after its last `\\n\\nAssistant:`. The prompt is None without a reply.

    Repeated blanks inside a line become one, because the conversations of a pair may differ in those alone.
    """
    before, marker, reply = re.sub(r"(?<=\S)[ \t]{2,}", " ", conversation).rpartition(ASSISTANT)
    if not marker or HUMAN in reply:
        return None, reply
    return before + marker, reply


def get_oasst(split: str, source: str = "OpenAssistant/oasst1") -> Dataset:
    """Read Open Assistant's message trees, English only: ranked replies to the path from the root.

    A ranking a > b > c becomes the pairs (a, b) and (b, c). A message counts as dropped if it is not in a ranking and
    no ranking answers it, even if it is part of a prompt.
    """
    dataset = Dataset("oasst")
    columns = ["message_id", "parent_id", "text", "role", "lang", "rank", "deleted"]
    messages, replies = set(), {}  # ids of all messages; id of a parent -> its usable replies
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
    return dataset.not_empty(split)


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
    """Yield (prompt, the assistant messages that follow it, whether a human spoke last), roots first.

    Messages that are reached are removed from `replies`. Those that remain have no path to a root.
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
    """Add the answers to one message, the best (rank 0) first. Returns True if any was usable."""
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
    """Read the embedded dataset: questions whose answers can be checked."""
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
    """Read a user's own file or folder: pairs or binary feedback, in the forms that `halos/datafiles.py` describes.

    SFT imitates the first chosen or the first desirable response to a prompt.
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
            example = dataset.add_pair(record["prompt"], best, record["rejected"])
        else:
            best, desirable = record["response"], record["desirable"]
            example = dataset.add_feedback(record["prompt"], best, desirable)
        if example and desirable and example.sft_index is None:
            example.sft_index = example.generations.index(best)
    return dataset.not_empty(split)


#### HELPERS OF READERS


def _response(text: str | None) -> str:
    """Format a response: after `Assistant:` it begins with one space."""
    return " " + (text or "").strip()


def _is_unicode(record: dict) -> bool:
    """Return False if a text has half a surrogate pair. JSON can write one (\\ud83d), but no tokenizer accepts it."""
    prompt = record["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    texts += [record[column] for column in ("chosen", "rejected", "response") if column in record]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


#### LOADERS


class SFTDataLoader(DataLoader):
    """For every example that has one, the response to imitate."""

    data_format = "sft"

    def flatten(self, rng: random.Random) -> list[Row]:
        rows = [
            Row.of(index, chosen=example.sft_index)
            for index, example in enumerate(self.examples)
            if example.sft_index is not None
        ]
        rng.shuffle(rows)
        return rows


class PairedPreferenceDataLoader(DataLoader):
    """Every preference pair, chosen response first."""

    data_format = "paired"

    def flatten(self, rng: random.Random) -> list[Row]:
        rows = [
            Row.of(index, chosen=better, rejected=worse)
            for index, example in enumerate(self.examples)
            for better, worse in example.pairs
        ]
        rng.shuffle(rows)
        return rows


class UnpairedPreferenceDataLoader(DataLoader):
    """Single responses marked chosen or rejected: both halves of every pair, and binary feedback as it is.

    Chosen and rejected halves alternate, so that a batch of paired data has equally many of both. The rejected halves
    come half an epoch after the chosen ones. This keeps the halves of a pair out of the same batch, unless an epoch is
    hardly longer than a batch. Binary feedback is mixed in at random, in its natural proportions.
    """

    data_format = "unpaired"

    def flatten(self, rng: random.Random) -> list[Row]:
        pairs = [(index, pair) for index, example in enumerate(self.examples) for pair in example.pairs]
        rng.shuffle(pairs)
        lag = len(pairs) // 2
        halves = []
        for (index, (better, _)), (other, (_, worse)) in zip(pairs, pairs[lag:] + pairs[:lag], strict=True):
            halves += [Row.of(index, chosen=better), Row.of(other, rejected=worse)]
        feedback = [
            Row.of(index, **{"chosen" if desirable else "rejected": generation})
            for index, example in enumerate(self.examples)
            for generation, desirable in example.feedback
        ]
        rng.shuffle(feedback)
        return _merge_at_random(halves, feedback, rng)


def _merge_at_random(one: list[Row], other: list[Row], rng: random.Random) -> list[Row]:
    """Merge two lists, keeping the order of each. Every interleaving is equally likely."""
    from_one = [True] * len(one) + [False] * len(other)
    rng.shuffle(from_one)
    ones, others = iter(one), iter(other)
    return [next(ones) if first else next(others) for first in from_one]


#### FROM A CONFIG TO A LOADER


def read_dataset(name: str, split: str, source: str | None = None) -> Dataset:
    """Read the dataset `name`: the name of a `get_{name}` function in this file, or a local path.

    source: where to read a named dataset from, instead of the hub
    """
    getter = getattr(sys.modules[__name__], f"get_{name}", None)
    if getter is None:
        return get_local(name, split)
    return getter(split, source) if source else getter(split)


def make_loader(config, tokenizer, split: str) -> DataLoader:
    """Build the loader `config.loss.dataloader` over the training or test split of all `config.datasets`.

    Every evaluation uses the same examples: the first `n_eval_examples` of a seeded shuffle.
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
    """Print exact counts of what was read, dropped, and truncated. Returns them for the run directory."""
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
    """A prompt to sample for, and the response that people preferred ('' if unknown).

    text: as the model reads it; messages: the conversation that it was rendered from, or None
    dataset: the name of the dataset or of the file that it is from
    """

    text: str
    chosen: str
    truncation_mode: str
    messages: list[dict] | None = None
    dataset: str = ""


def read_prompts(config, tokenizer, path: str | None = None, limit: int | None = None) -> list[Prompt]:
    """Return the first prompts of a seeded shuffle of the test split, or the prompts of a file, in its order.

    limit: number of prompts; None means `config.n_samples` of the test split, or all of the file
    """
    if path:
        name = os.path.splitext(os.path.basename(path))[0]
        rows = list(prompt_records(path))[:limit]
        examples = [Example(row["prompt"], [row["chosen"]], sft_index=0, dataset_name=name) for row in rows]
    else:
        examples = merge([read_dataset(name, "test", config.dataset_paths.get(name)) for name in config.datasets])
        random.Random(f"{config.seed}-prompts").shuffle(examples)
        limit = limit or config.n_samples
        if len(examples) < limit:
            rank0_print(f"{limit} prompts were asked for; the test split has {len(examples)}, all of which are used")
        examples = examples[:limit]
    return [
        Prompt(
            render_prompt(example.prompt, tokenizer),
            preferred(example, tokenizer),
            example.truncation_mode,
            example.prompt if isinstance(example.prompt, list) else None,
            example.dataset_name,
        )
        for example in examples
    ]


def preferred(example: Example, tokenizer) -> str:
    """Return the chosen response of the first pair, else the response that SFT imitates, else ''."""
    index = example.pairs[0][0] if example.pairs else example.sft_index
    return render_responses(example, tokenizer)[index] if index is not None else ""
