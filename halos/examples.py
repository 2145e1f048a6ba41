"""Examples, as every dataset is read into them: a prompt, its responses, and what is known of the responses.

`Dataset` collects the examples of one source and counts what it drops; `merge` joins several. Readers of datasets are
in `dataloaders.py`; how examples become training rows is in `halos/loader.py`.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from halos.errors import UserError


@dataclass
class Example:
    """One prompt, its distinct responses, and what people thought of them."""

    prompt: str | list[dict]  # text, or chat messages that are rendered with the tokenizer's template
    generations: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # one per generation where the source has scores, else empty
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices into generations
    feedback: list[tuple[int, bool]] = field(default_factory=list)  # (generation, desirable), for binary feedback
    sft_index: int | None = None  # the generation that SFT imitates
    truncation_mode: str = "keep_end"  # which end of a prompt survives when it is too long: keep_start or keep_end
    dataset_name: str = ""
    id: str = field(default="", compare=False)  # dataset/hash of the prompt: the same in every run and order

    def add(self, generation: str) -> int:
        """Return the index of a generation, which is stored once however often it comes."""
        if generation not in self.generations:
            self.generations.append(generation)
        return self.generations.index(generation)

    def add_score(self, generation: str, score: float) -> None:
        """Score the generation that was added last; a text that comes with several scores keeps the highest."""
        index = self.generations.index(generation)
        if index == len(self.scores):
            self.scores.append(score)
        self.scores[index] = max(self.scores[index], score)

    def best_first(self) -> list[int]:
        """Return the indices of the generations by falling score; equal scores by their texts."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], self.generations[i]))

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

    def example(self, prompt: str | list[dict], truncation_mode: str = "keep_end") -> Example:
        """Return the example of this prompt, which is made when the prompt is new."""
        key = prompt if isinstance(prompt, str) else repr(prompt)
        if key not in self.examples:
            self.examples[key] = Example(
                prompt,
                truncation_mode=truncation_mode,
                dataset_name=self.name,
                id=f"{self.name}/{blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}",
            )
        return self.examples[key]

    def add_pair(
        self, prompt: str | list[dict], chosen: str, rejected: str, truncation_mode: str = "keep_end"
    ) -> Example | None:
        """Add a preference pair and return its example; or count why it is dropped, and return None."""
        if not chosen.strip() or not rejected.strip():
            self.dropped["empty response"] += 1
        elif chosen == rejected:
            self.dropped["identical responses"] += 1
        else:
            example = self.example(prompt, truncation_mode)
            pair = (example.add(chosen), example.add(rejected))
            if pair not in example.pairs:
                example.pairs.append(pair)
                return example
            self.dropped["duplicate pair"] += 1
        return None

    def add_feedback(self, prompt: str | list[dict], response: str, desirable: bool) -> Example | None:
        """Add a judged response and return its example; or count why it is dropped, and return None."""
        if not response.strip():
            self.dropped["empty response"] += 1
            return None
        example = self.example(prompt)
        judged = (example.add(response), desirable)
        if judged in example.feedback:
            self.dropped["duplicate feedback"] += 1
            return None
        example.feedback.append(judged)
        return example

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
        }

    def not_empty(self, split: str) -> "Dataset":
        """Return the dataset itself. Raises UserError if no row of the split could be used."""
        if not self.examples:
            dropped = ", ".join(f"{rows} {reason}" for reason, rows in self.dropped.most_common()) or "none"
            raise UserError(
                f"{self.name}: no usable row in split {split!r} ({self.rows} read; dropped: {dropped}); "
                "check the source, or leave this dataset out"
            )
        return self


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
        new = [score for i, score in zip(index, second.scores, strict=True) if i >= len(first.generations)]
        both.scores = first.scores + new
    if both.sft_index is None and second.sft_index is not None:
        both.sft_index = index[second.sft_index]
    return both
