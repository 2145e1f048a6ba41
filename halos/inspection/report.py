"""The whole report on the loaders of a run: numbers of each split, common prompts, warnings, and rows to look at."""

from dataclasses import dataclass

from halos.inspection import alarms, numbers, pairs, spans
from halos.loader import DataLoader


@dataclass(frozen=True)
class Report:
    splits: dict[str, numbers.Split]
    common: pairs.CommonPrompts | None  # None if only one split was read
    alarms: list[str]
    shown: list[spans.Shown]


def make_report(
    loaders: dict[str, DataLoader], weights: dict[str, float], n_shown: int = 8, wanted: str = ""
) -> Report:
    """Inspect the loaders of the splits.

    weights: of the datasets, in training
    n_shown: rows of the first split to show
    wanted: show the rows of this example instead: its id, or the number of a row
    """
    splits = {
        name: numbers.inspect(loader, name, weights if name == "train" else {}) for name, loader in loaders.items()
    }
    examples = [numbers.distinct_examples(loader).values() for loader in loaders.values()]
    common = pairs.common_prompts(*examples) if list(loaders) == ["train", "test"] else None
    first = next(iter(splits))
    chosen = spans.find(splits, wanted) if wanted else {first: spans.choose(splits[first], n_shown)}
    return Report(
        splits,
        common,
        alarms.alarms(splits, common),
        [spans.show(splits[name], row, why) for name, rows in chosen.items() for row, why in rows.items()],
    )
