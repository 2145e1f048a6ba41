"""The data: the datasets that can be named in `datasets=[...]`, and the loaders that make training rows of them.

To add a dataset, write `get_{name}(split)` below; it returns a `Dataset` of `Example`s (`halos/examples.py`). To add a
way of making training rows from examples, subclass `DataLoader` (`halos/loader.py`) and override `flatten`.
"""

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

SHP_MIN_SCORE_RATIO = 2  # of training pairs; all pairs are tested on
SHP_MAX_PAIRS = 5  # per training prompt, so that popular posts do not outweigh the others


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
        elif example := dataset.add_pair(prompt, _response(chosen), _response(rejected)):
            if example.sft_index is None:
                example.sft_index = example.generations.index(_response(chosen))
    return dataset.not_empty(split)


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
            example = dataset.add_pair(record["prompt"], best, record["rejected"])
        else:
            best, desirable = record["response"], record["desirable"]
            example = dataset.add_feedback(record["prompt"], best, desirable)
        if example and desirable and example.sft_index is None:
            example.sft_index = example.generations.index(best)
    return dataset.not_empty(split)


#### WHAT READERS SHARE


def _response(text: str | None) -> str:
    """A response after `Assistant:` begins with one space."""
    return " " + (text or "").strip()


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


#### LOADERS


class SFTDataLoader(DataLoader):
    """The response to imitate of every example that has one."""

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
    """Every preference pair, the chosen response first."""

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
            halves += [Row.of(index, chosen=better), Row.of(other, rejected=worse)]
        feedback = [
            Row.of(index, **{"chosen" if desirable else "rejected": generation})
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
