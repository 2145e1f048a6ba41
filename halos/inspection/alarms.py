"""Warnings about the data, in words. Each function below yields the lines of one matter."""

from collections.abc import Iterator

from halos.inspection.numbers import DatasetNumbers, Split
from halos.inspection.pairs import CommonPrompts

# Shares above which a matter is worth a line.
DROPPED = 0.05  # rows that were read
TRUNCATED = 0.05  # prompts or responses
EMPTY = 0.01  # responses
REPEATED = 0.01  # duplicates, contradictions, pairs that are equal after truncation
WRITTEN = 0.05  # examples in which control tokens are written as text
LONGER = 0.6  # pairs in which the chosen response is the longer one, or the shorter one


def alarms(splits: dict[str, Split], common: CommonPrompts | None) -> list[str]:
    """Return the warnings, the most important first. common: None if only one split was read"""
    lines = list(_contamination(common)) if common else []
    for split in splits.values():
        matters = (_equal(split), _untrained(split), _truncation(split), _bias(split), _repetition(split), _data(split))
        lines += [f"{split.name}: {line}" for matter in matters for line in matter]
    return lines


def _contamination(common: CommonPrompts) -> Iterator[str]:
    if common.near:
        yield (
            f"the test split is contaminated: {common.near:,} of its {common.test_prompts:,} prompts "
            f"({percent(common.near, common.test_prompts)}) are also training prompts, {common.exact:,} of them "
            f"exactly, the others but for case and white space; for example {', '.join(common.ids)}"
        )


def _equal(split: Split) -> Iterator[str]:
    equal, pairs = split.equal_after_truncation, split.bias.pairs if split.bias else 0
    if equal and equal >= REPEATED * pairs:
        what = "every pair has" if equal == pairs else f"{equal:,} pairs ({percent(equal, pairs)}) have"
        dropped = (
            "they are dropped" if split.loader.dropped_rows else "the loss sees one text as chosen and as rejected"
        )
        yield f"{what} equal responses after truncation: {dropped}; raise model.max_length={split.loader.max_length}"


def _untrained(split: Split) -> Iterator[str]:
    if split.untrained:
        yield f"{split.untrained:,} responses have no token to train on after truncation; raise model.max_length"


def _truncation(split: Split) -> Iterator[str]:
    loader = split.loader
    for dataset in split.datasets:
        if dataset.truncated_responses > TRUNCATED * dataset.responses:
            yield (
                f"{dataset.name}: {percent(dataset.truncated_responses, dataset.responses)} of the responses lose "
                f"their end, and with it their end of turn, at model.max_length={loader.max_length}: on them the model "
                "is not taught to stop; raise it, or leave long responses out"
            )
        if dataset.truncated_prompts > TRUNCATED * dataset.rows:
            yield (
                f"{dataset.name}: {percent(dataset.truncated_prompts, dataset.rows)} of the training rows have their "
                f"prompt cut to model.max_prompt_length={loader.max_prompt_length}; raise it, and model.max_length"
            )


def _bias(split: Split) -> Iterator[str]:
    bias = split.bias
    if bias is None or bias.share is None or not bias.is_sure or 1 - LONGER < bias.share < LONGER:
        return
    which, share = ("longer", bias.share) if bias.share > 0.5 else ("shorter", 1 - bias.share)
    means = f"mean {bias.mean_chosen:,.0f} tokens against {bias.mean_rejected:,.0f}"
    yield (
        f"strong length bias: chosen is the {which} one in {100 * share:.1f} % of the pairs (ties apart; {means}): a "
        "loss can learn length for quality; compare models by length-controlled win rates, or balance the data"
    )


def _repetition(split: Split) -> Iterator[str]:
    found = split.repetition
    if found.near_contradictions > REPEATED * found.judgments:
        yield (
            f"{found.near_contradictions:,} pairs or labels are contradicted by another one of the same prompt "
            f"({percent(found.near_contradictions, found.judgments)})"
            + (f"; for example {', '.join(found.contradicting)}" if found.contradicting else "")
        )
    if found.near > REPEATED * found.judgments:
        yield (
            f"{found.near:,} pairs or labels ({percent(found.near, found.judgments)}) repeat another one but for case "
            "and white space"
        )


def _data(split: Split) -> Iterator[str]:
    responses = len(split.responses.row)
    if split.empty > EMPTY * responses:
        yield f"{split.empty:,} responses or rows with a response are empty ({percent(split.empty, responses)})"
    for dataset in split.datasets:
        yield from _dataset(dataset)


def _dataset(dataset: DatasetNumbers) -> Iterator[str]:
    dropped = sum(dataset.dropped.values())
    if dropped > DROPPED * dataset.rows_read:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dataset.dropped.items())
        yield f"{dataset.name}: {dropped:,} of {dataset.rows_read:,} rows are dropped ({reasons})"
    if dataset.control > WRITTEN * dataset.examples:
        yield (
            f"{dataset.name}: {percent(dataset.control, dataset.examples)} of the examples have control tokens written "
            "in their texts, which are encoded as characters; is a chat template already in the data?"
        )


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"
