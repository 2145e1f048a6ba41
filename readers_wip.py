import random
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from dataloaders import Dataset, Example
from halos import demo
from halos.datafiles import hub_rows, records
from halos.errors import UserError

# ---- Datasets: each `get_{name}(split)` reads 'train' or 'test' into a Dataset

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
