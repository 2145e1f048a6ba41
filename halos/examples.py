"""Examples, as every dataset is read into them: a prompt, its responses, and what is known of the responses.

`Dataset` collects the examples of one source and counts what it drops; `merge` joins several. Readers of datasets are
in `dataloaders.py`; how examples become training rows is in `halos/loader.py`.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import nan
from typing import Any

from halos.errors import UserError

Text = str | list[dict]  # text, or chat messages: {role, content, ...}


def is_empty(response: Text) -> bool:
    """Return True for a response without text and tool calls."""
    if isinstance(response, str):
        return not response.strip()
    return not any(m["content"].strip() or m.get("tool_calls") for m in response if m["role"] == "assistant")


def key_of(prompt: Text, tools: list[dict] | None = None) -> str:
    """Return what two prompts have in common if they are the same: their texts, or messages and tools."""
    if tools:
        return repr((prompt, tools))
    return prompt if isinstance(prompt, str) else repr(prompt)


@dataclass(slots=True)
class Example:
    """One prompt, its distinct responses, and what people thought of them."""

    prompt: Text  # text, or chat messages that are rendered with the tokenizer's template
    generations: list[Any] = field(default_factory=list)  # Text: messages for several turns, or for more than content
    scores: list[float] = field(default_factory=list)  # one per generation where the source has scores, else empty
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices into generations
    feedback: list[tuple[int, bool]] = field(default_factory=list)  # (generation, desirable), for binary feedback
    sft_index: int | None = None  # the generation that SFT imitates
    truncation_mode: str = "keep_end"  # which end of a prompt survives when it is too long: keep_start or keep_end
    dataset_name: str = ""
    tools: list[dict] | None = None  # descriptions of the tools that the prompt offers, for the chat template
    id: str = field(default="", compare=False)  # dataset/hash of the prompt: the same in every run and order

    def add(self, generation: Text) -> int:
        """Return the index of a generation, which is stored once however often it comes."""
        if generation not in self.generations:
            self.generations.append(generation)
        return self.generations.index(generation)

    def add_score(self, generation: Text, score: float) -> None:
        """Score a generation. One that comes with several scores keeps the highest; those without a score have NaN."""
        index = self.generations.index(generation)
        self.scores += [nan] * (len(self.generations) - len(self.scores))
        known = self.scores[index]
        self.scores[index] = score if known != known else max(known, score)

    def best_first(self) -> list[int]:
        """Return the indices of the generations by falling score; equal scores by their texts."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], str(self.generations[i])))

    def keep(self, kept: list[int]) -> None:
        """Keep these generations, in this order, and sort the pairs, so that the order of rows changes nothing."""
        new = {old: index for index, old in enumerate(kept)}
        self.generations = [self.generations[index] for index in kept]
        self.scores = [self.scores[index] for index in kept]
        self.pairs = sorted((new[better], new[worse]) for better, worse in self.pairs)


class Dataset:
    """The examples of one source, one per prompt, with an exact account of the rows that were read and dropped."""

    def __init__(self, name: str):
        self.name = name
        self.examples: dict[str, Example] = {}
        self.rows = 0
        self.dropped: Counter[str] = Counter()  # reason -> rows
        self.notes: Counter[str] = Counter()  # what is worth knowing, and is not a dropped row -> how often
        self.lines: list[str] = []  # the same, in words

    def example(
        self,
        prompt: Text,
        truncation_mode: str = "keep_end",
        *,
        tools: list[dict] | None = None,
        key: str | None = None,
    ) -> Example:
        """Return the example of this prompt, which is made when the prompt is new.

        key: what tells prompts apart, if the prompt alone does not
        """
        key = key_of(prompt, tools) if key is None else key
        if key not in self.examples:
            self.examples[key] = Example(
                prompt,
                truncation_mode=truncation_mode,
                dataset_name=self.name,
                tools=tools,
                id=f"{self.name}/{blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}",
            )
        return self.examples[key]

    def add_pair(
        self,
        prompt: Text,
        chosen: Text,
        rejected: Text,
        truncation_mode: str = "keep_end",
        *,
        scores: tuple[float, float] | None = None,
        tools: list[dict] | None = None,
    ) -> Example | None:
        """Add a preference pair and return its example; or count why it is dropped, and return None.

        scores: of the chosen and the rejected response
        SFT imitates the first chosen response to a prompt.
        """
        if is_empty(chosen) or is_empty(rejected):
            self.dropped["empty response"] += 1
        elif chosen == rejected:
            self.dropped["identical responses"] += 1
        else:
            example = self.example(prompt, truncation_mode, tools=tools)
            pair = (example.add(chosen), example.add(rejected))
            for response, score in zip((chosen, rejected), scores or (), strict=False):
                example.add_score(response, score)
            if pair not in example.pairs:
                example.pairs.append(pair)
                return _imitating(example, pair[0])
            self.dropped["duplicate pair"] += 1
        return None

    def add_feedback(
        self,
        prompt: Text,
        response: Text,
        desirable: bool,
        *,
        score: float | None = None,
        tools: list[dict] | None = None,
    ) -> Example | None:
        """Add a judged response and return its example; or count why it is dropped, and return None.

        SFT imitates the first desirable response to a prompt.
        """
        if is_empty(response):
            self.dropped["empty response"] += 1
            return None
        example = self.example(prompt, tools=tools)
        judged = (example.add(response), desirable)
        if score is not None:
            example.add_score(response, score)
        if judged in example.feedback:
            self.dropped["duplicate feedback"] += 1
            return None
        example.feedback.append(judged)
        return _imitating(example, judged[0]) if desirable else example

    def add_scored(
        self, prompt: Text, scored: list[tuple[Text, float]], *, tools: list[dict] | None = None
    ) -> Example | None:
        """Add responses with scores (higher is better), without pairs; return the example, or None if all are empty."""
        scored = [(response, score) for response, score in scored if not is_empty(response)]
        if not scored:
            self.dropped["empty response"] += 1
            return None
        example = self.example(prompt, tools=tools)
        for response, score in scored:
            example.add(response)
            example.add_score(response, score)
        return example

    def add_imitated(
        self, prompt: Text, response: Text, *, tools: list[dict] | None = None, key: str | None = None
    ) -> Example | None:
        """Add a response for SFT and return its example; or count why it is dropped, and return None."""
        if is_empty(response):
            self.dropped["empty response"] += 1
            return None
        example = self.example(prompt, tools=tools, key=key)
        if example.sft_index is not None:
            self.dropped["SFT has a response to this prompt"] += 1
            return None
        return _imitating(example, example.add(response))

    def keep_prompts(self, n: int) -> None:
        """Keep the n prompts with the smallest hashes, whatever the order of the rows."""
        kept = set(sorted(self.examples, key=lambda key: (self.examples[key].id.rpartition("/")[2], key))[:n])
        if len(kept) < len(self.examples):
            self.dropped["prompts over keep.n_prompts"] += len(self.examples) - len(kept)
            self.examples = {key: example for key, example in self.examples.items() if key in kept}

    def account(self) -> dict:
        """Return exact counts of what was read and dropped."""
        examples = self.examples.values()
        return {
            "name": self.name,
            "rows": self.rows,
            "examples": len(examples),
            "pairs": sum(len(example.pairs) for example in examples),
            "feedback": sum(len(example.feedback) for example in examples),
            "dropped": dict(self.dropped),
            "notes": [f"{count} {what}" for what, count in self.notes.items()] + self.lines,
        }

    def not_empty(self, split: str) -> "Dataset":
        """Return the dataset itself. Raises UserError if no row of the split could be used."""
        if not self.examples:
            dropped = ", ".join(f"{rows} {reason}" for reason, rows in self.dropped.most_common()) or "none"
            raise UserError(
                f"{self.name}: no usable row in split {split!r} ({self.rows} read; dropped: {dropped}); "
                "check the source, or leave this dataset out"
            )
        for example in self.examples.values():
            if example.scores:
                example.scores += [nan] * (len(example.generations) - len(example.scores))
        return self


def _imitating(example: Example, index: int) -> Example:
    """Return the example; SFT imitates this generation unless it has another one."""
    if example.sft_index is None:
        example.sft_index = index
    return example


def merge(datasets: list[Dataset]) -> list[Example]:
    """Join the examples of all datasets, in the order given. If two share a prompt, its responses are merged."""
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
        new = dict(zip(index, second.scores, strict=False))
        n_first = len(first.generations)
        both.scores = first.scores + [new.get(i, nan) for i in range(n_first, len(both.generations))]
    if both.sft_index is None and second.sft_index is not None:
        both.sft_index = index[second.sft_index]
    return both
