"""Datasets that need code to read, and loaders that turn examples into training rows.

To add a dataset, write `config/dataset/NAME.yaml`; then `datasets=[NAME]` works. If its rows have none of the known
forms (docs/data.md), its YAML names a `reader`: a function below that goes over the rows and calls
`Dataset.add_pair(prompt, chosen, rejected)`, as `get_shp` does. To build training rows in another way, subclass
`DataLoader` (`halos/loader.py`) and override `flatten`.
"""

import math
import os
import random
import sys
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from halos import components, demo, sources
from halos.chat import Renderer
from halos.dataset_specs import base_spec, spec_of
from halos.epoch import ROLES, Row, Rows
from halos.errors import UserError
from halos.example_table import give_back_memory
from halos.examples import Dataset, Example, Text, merge
from halos.hub import hub_rows
from halos.loader import DataLoader
from halos.tokens import Encoder, Role
from halos.turns import messages_of, messages_of_turns, same_but_blanks, split_reply, text_of
from utils import rank0_print

#### DATASETS: each `get_{name}(split, source)` reads 'train' or 'test' into a Dataset

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
            prompt = [{"role": "user", "content": row["history"].strip()}]
            chosen, rejected = ((row[f"human_ref_{one}"] or "").strip() for one in (better, worse))
            scores = row[f"score_{better}"], row[f"score_{worse}"]
            dataset.add_pair(prompt, chosen, rejected, "keep_start", scores=scores)
    for example in dataset.examples.values():
        example.keep(example.best_first())
        if split == "train" and len(example.pairs) > SHP_MAX_PAIRS:
            dataset.dropped[f"more than {SHP_MAX_PAIRS} pairs a prompt"] += len(example.pairs) - SHP_MAX_PAIRS
            rng = random.Random(text_of([("user", example.prompt[0]["content"])]))
            example.pairs = sorted(rng.sample(example.pairs, SHP_MAX_PAIRS))
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
        text, chosen = split_reply(row["chosen"] or "")
        other_text, rejected = split_reply(row["rejected"] or "")
        if text is None or other_text is None or not same_but_blanks(text, other_text):
            dataset.dropped["no common prompt"] += 1
        elif chosen.strip() and same_but_blanks(chosen.strip(), rejected.strip()):
            dataset.dropped["identical responses"] += 1
        else:
            prompt = messages_of_turns(text)
            dataset.add_pair(prompt, _reply(prompt, chosen), _reply(prompt, rejected))
    return dataset.not_empty(split)


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


def _conversations(replies: dict[str | None, list[dict]]) -> Iterator[tuple[Text, list[dict], bool]]:
    """Yield (prompt, the assistant messages that follow it, whether a human spoke last), roots first.

    Messages that are reached are removed from `replies`. Those that remain have no path to a root.
    """
    names = {"prompter": "user", "assistant": "assistant"}
    to_visit: deque = deque((root, ()) for root in replies.pop(None, []))
    while to_visit:
        message, so_far = to_visit.popleft()
        so_far = (*so_far, (names[message["role"]], message["text"].strip()))
        children = replies.pop(message["message_id"], [])
        to_visit.extend((child, so_far) for child in children)
        answers = [child for child in children if child["role"] == "assistant"]
        yield messages_of(so_far) or text_of(so_far), answers, message["role"] == "prompter"


def _add_ranking(dataset: Dataset, prompt: Text, answers: list[dict]) -> bool:
    """Add the answers to one message, the best (rank 0) first. Returns True if any was usable."""
    ranks: dict[str, int] = {}
    for answer in sorted(answers, key=lambda answer: (answer["rank"] is None, answer["rank"], answer["text"])):
        text = _reply(prompt, answer["text"])
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
        prompt = messages_of_turns(item["prompt"])
        example = dataset.example(prompt)
        index = [example.add(_reply(prompt, response)) for response in item["responses"]]
        for i, score in zip(index, item["scores"], strict=True):
            example.add_score(example.generations[i], score)
        example.pairs += [(index[better], index[worse]) for better, worse in item["pairs"]]
        if example.sft_index is None:
            example.sft_index = index[item["sft_index"]]
    return dataset


def get_local(path: str, split: str, strict: bool = False) -> Dataset:
    """Read a file, a folder or a hub dataset whose rows have a known form, without a YAML."""
    return sources.read(path, OmegaConf.create({**base_spec(), "source": path}), split, strict)


#### HELPERS OF READERS


def _reply(prompt: Text, response: str | None) -> str:
    """Return a reply without blanks around it. After a prompt that is text, it begins with one space."""
    return (" " if isinstance(prompt, str) else "") + (response or "").strip()


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


class ScoredPairsDataLoader(PairedPreferenceDataLoader):
    """Every preference pair, for losses that need the scores of both responses: a pair without them is an error."""

    def flatten(self, rng: random.Random) -> list[Row]:
        for example in self.examples:
            scores = example.scores
            if any(not scores or math.isnan(scores[i]) for pair in example.pairs for i in pair):
                raise UserError(
                    f"{example.id} has a pair without scores, and loss.dataloader={type(self).__name__} needs those of "
                    "all pairs; use datasets with scores, or loss=dpo"
                )
        return super().flatten(rng)


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


class ConditionalSFTDataLoader(UnpairedPreferenceDataLoader):
    """Single responses, each with the control text of its kind between prompt and response.

    The control text is read and not trained on. Truncation cuts the prompt before it and the response behind it.
    """

    loss_keys = ("chosen_control", "rejected_control")

    def __init__(self, examples, tokenizer, *, chosen_control: str, rejected_control: str, **settings):
        encoder, texts = Encoder(tokenizer), {Role.CHOSEN: chosen_control, Role.REJECTED: rejected_control}
        limits = settings["max_length"], settings["max_prompt_length"]
        self.control = {
            role: control_ids(encoder, f"loss.{role}_control", text, *limits) for role, text in texts.items()
        }
        super().__init__(examples, tokenizer, **settings)

    def whole(self, row: Row) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        prompt, responses = super().whole(row)
        controls = (~self.control[role] for role in row.roles)  # ~id: context
        return prompt, tuple(map(np.concatenate, zip(controls, responses, strict=True)))

    def are_whole(self, rows: Rows) -> np.ndarray:
        return np.zeros(len(rows), bool)

    def _response_lengths(self, rows: Rows) -> np.ndarray:
        lengths = np.array([len(self.control.get(role, ())) for role in ROLES])
        return super()._response_lengths(rows) + lengths[rows.roles]


def control_ids(encoder: Encoder, key: str, text: str, max_length: int, max_prompt_length: int) -> np.ndarray:
    """Return the (n,) ids of a control text behind a prompt. Raises UserError if no response would fit behind it.

    key: of the text in the config
    """
    ids = encoder.continuation(text)
    if max_prompt_length + len(ids) >= max_length:
        raise UserError(
            f"{key}={text!r} has {len(ids)} tokens, which leave no room for a response behind a prompt of "
            f"model.max_prompt_length={max_prompt_length}; use model.max_prompt_length={max_length - len(ids) - 1} or "
            "less"
        )
    return ids


class MismatchedDataLoader(UnpairedPreferenceDataLoader):
    """Single responses, each with an unrelated one beside it: that of the closest row before it with another prompt.

    The first rows take theirs from the end of the epoch.
    """

    def flatten(self, rng: random.Random) -> list[Row]:
        rows = super().flatten(rng)
        if rows and all(row.example == rows[0].example for row in rows):
            raise UserError(
                f"{type(self).__name__} pairs responses with other prompts, and the data have one; add more prompts"
            )
        return [row.with_unrelated(self._before(rows, position)) for position, row in enumerate(rows)]

    def _before(self, rows: list[Row], position: int) -> Row:
        earlier = (rows[position - step] for step in range(1, len(rows)))
        return next(row for row in earlier if row.example != rows[position].example)


def _merge_at_random(one: list[Row], other: list[Row], rng: random.Random) -> list[Row]:
    """Merge two lists, keeping the order of each. Every interleaving is equally likely."""
    from_one = [True] * len(one) + [False] * len(other)
    rng.shuffle(from_one)
    ones, others = iter(one), iter(other)
    return [next(ones) if first else next(others) for first in from_one]


#### FROM A CONFIG TO A LOADER


def read_dataset(name: str, split: str, spec: DictConfig, strict: bool = False) -> Dataset:
    """Read one of `config.datasets`.

    spec: the keys of its YAML; a function `get_{name}` in this file needs no YAML
    strict: raise at a malformed row
    """
    getter = getattr(sys.modules[__name__], spec.reader or f"get_{name}", None)
    if getter is None or name == "local":
        dataset = sources.read(name, spec, split, strict)
    else:
        dataset = getter(split, spec.source) if spec.source else getter(split)
    if spec["keep"]["n_prompts"]:
        dataset.keep_prompts(spec["keep"]["n_prompts"])
    return dataset


def read_datasets(config, split: str) -> list[Dataset]:
    return [read_dataset(name, split, spec_of(config, name), config.strict_data) for name in config.datasets]


def make_loader(config, tokenizer, split: str, keep_texts: bool = False) -> DataLoader:
    """Build the loader `config.loss.dataloader` over the training or test split of all `config.datasets`.

    Every evaluation uses the same examples: the first `n_eval_examples` of a seeded shuffle. Weights of datasets apply
    to training.
    """
    datasets = read_datasets(config, split)
    training = split == "train"
    loader_class = components.find(sys.modules[__name__], config.loss.dataloader)
    loader = loader_class(
        merge(datasets),
        tokenizer,
        batch_size=config.model.batch_size if training else config.model.eval_batch_size,
        max_length=config.model.max_length,
        max_prompt_length=config.model.max_prompt_length,
        cache_dir=config.cache_dir,
        seed=config.seed,
        n_epochs=config.n_epochs if training else 1,
        n_examples=config.n_examples if training else config.n_eval_examples,
        weights={dataset.name: spec_of(config, dataset.name).weight for dataset in datasets} if training else {},
        group_prompts=training and config.group_prompts,
        keep_texts=keep_texts,
        description=split,
        **{key: config.loss[key] for key in loader_class.loss_keys},
    )
    loader.account = [dataset.account() for dataset in datasets]
    datasets.clear()  # with their texts
    give_back_memory()
    return loader


def describe(loader: DataLoader, split: str) -> dict:
    """Print exact counts of what was read, dropped, and truncated. Returns them for the run directory."""
    for source in loader.account:
        dropped = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items()) or "none"
        rank0_print(
            f"{split} {source['name']}: {source['rows']} rows, {source['examples']} examples, "
            f"{source['pairs']} pairs, {source['feedback']} labelled responses; dropped: {dropped}"
        )
        for note in source["notes"]:
            rank0_print(f"{split} {source['name']}: {note}")
    counts = loader.counts()
    rank0_print(
        f"{split} {type(loader).__name__}: {counts['rows']} rows per epoch, {counts['tokens']} tokens; "
        f"truncated: {counts['truncated_prompts']} prompts, {counts['truncated_responses']} responses (EOS lost)"
    )
    if loader.dropped_rows:
        rank0_print(f"{split}: {loader.dropped_rows} rows per epoch dropped, equal responses after truncation")
    for what, count in loader.renderer.counts.items():
        rank0_print(f"{split}: {count} {what}")
    return {
        "datasets": loader.account,
        "chat": dict(loader.renderer.counts),
        "loader": {"name": type(loader).__name__, **counts},
    }


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
        rows = list(sources.prompt_records(path))[:limit]
        examples = [Example(row["prompt"], [row["chosen"]], sft_index=0, dataset_name=name) for row in rows]
    else:
        examples = merge(read_datasets(config, "test"))
        random.Random(f"{config.seed}-prompts").shuffle(examples)
        limit = limit or config.n_samples
        if len(examples) < limit:
            rank0_print(f"{limit} prompts were asked for; the test split has {len(examples)}, all of which are used")
        examples = examples[:limit]
    renderer = Renderer(tokenizer)
    return [
        Prompt(
            renderer.prompt(example),
            preferred(example, renderer),
            example.truncation_mode,
            example.prompt if isinstance(example.prompt, list) else None,
            example.dataset_name,
        )
        for example in examples
    ]


def sampling_control(config, encoder: Encoder) -> np.ndarray:
    """Return the ids that stand behind each prompt of the policy: with conditional SFT those of desirable responses."""
    text, limits = config.loss.get("chosen_control"), (config.model.max_length, config.model.max_prompt_length)
    if text is None:
        return np.empty(0, np.int32)
    return control_ids(encoder, "loss.chosen_control", text, *limits)


def preferred(example: Example, renderer: Renderer) -> str:
    """Return the chosen response of the first pair, else the response that SFT imitates, else ''."""
    index = example.pairs[0][0] if example.pairs else example.sft_index
    return renderer.text(example, index) if index is not None else ""
