"""Datasets of the Hugging Face hub, and local copies of them: made by `save_to_disk`, or the hub's own files.

Whether the hub can be reached is asked once per process, for a few seconds at most. Without it, earlier downloads load.
"""

import functools
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

from halos.datafiles import SECONDS_BEFORE_BAR, SPLIT_NAMES, reason
from halos.errors import UserError, did_you_mean

SECONDS_FOR_THE_HUB = 4.0


def hub_rows(name: str, source: str, split: str, columns: list[str], subset: str | None = None) -> Iterator[dict]:
    """Yield the rows of one split, `columns` only.

    name: our name for the dataset, as in dataset.{name}.source
    source: a hub name, a directory made by `save_to_disk`, or a directory with the hub's own files
    subset: a directory of the hub's repository; a local copy may contain it, or be that subset itself
    """
    splits = load_splits(name, source, subset)
    if split not in splits:
        found = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{source} has no split {split!r} (it has: {found}); {local_copy(name)}")
    table = splits[split]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(
            f"{source} has no column {missing[0]!r} (it has: {', '.join(table.column_names)}); "
            f"give a source with the hub's own columns: {local_copy(name)}"
        )
    yield from rows_of_table(name, table.select_columns(columns))


def rows_of_table(name: str, table) -> Iterator[dict]:
    """Yield the rows of a datasets.Dataset."""
    columns = table.column_names
    with tqdm(total=len(table), desc=f"reading {name}", unit="row", delay=SECONDS_BEFORE_BAR, leave=False) as bar:
        for batch in table.iter(batch_size=1000):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield dict(zip(columns, values, strict=True))
            bar.update(len(batch[columns[0]]))


def load_splits(name: str, source: str, subset: str | None = None, config: str | None = None) -> dict:
    """Load all splits: name -> memory-mapped datasets.Dataset."""
    import datasets

    directory = os.path.expanduser(source)
    if os.path.exists(directory) or source.startswith(("/", ".", "~")):
        if not os.path.isdir(directory):
            problem = "not a directory" if os.path.exists(directory) else "no such directory"
            raise UserError(f"dataset.{name}.source={source}: {problem}; {local_copy(name)}")
        if subset and os.path.isdir(os.path.join(directory, subset)):
            directory = os.path.join(directory, subset)
    elif not datasets.config.HF_HUB_OFFLINE and not hub_answers():
        # Same as HF_HUB_OFFLINE=1: earlier downloads still load, and the hub client does not retry for half a minute.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        if not os.path.isdir(directory):
            return datasets.load_dataset(source, config, data_dir=subset)
        if any(os.path.isfile(os.path.join(directory, file)) for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(directory)
            return saved if isinstance(saved, dict) else {str(saved.split): saved}
        return datasets.load_dataset(directory, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in str(error):
            problem = "the hub cannot be reached, and no download of it is cached"
            raise UserError(
                f"{name}: cannot load {source} ({problem}); without internet, {local_copy(name)}"
            ) from error
        raise UserError(f"{name}: cannot load {source} ({reason(error)}); {local_copy(name)}") from error


def choose_split(source: str, found: list[str], split: str, wanted: str | None) -> str | None:
    """Return the source's name for a split; None if it has no such split.

    found: names of the splits that the source has
    wanted: the configured name; None: found by its name: train, or else train_prefs, or else the first of train_*
    """
    if wanted is not None:
        if wanted not in found:
            raise UserError(f"{source} has no split {wanted!r}; {did_you_mean(wanted, found)}")
        return wanted
    names = [name for name, ours in SPLIT_NAMES.items() if ours == split]
    for name in names:
        ranked = sorted(
            (one for one in found if one == name or one.startswith(f"{name}_")),
            key=lambda one: (one != name, not one.endswith("_prefs")),  # noqa: B023
        )
        if ranked:
            return ranked[0]
    return found[0] if split == "train" and len(found) == 1 and found[0] not in SPLIT_NAMES else None


@functools.cache
def hub_answers(seconds: float = SECONDS_FOR_THE_HUB) -> bool:
    """Return True if any server answers at the hub's address, even a proxy or with an error page.

    A thread asks, since looking up a name has no limit of time of its own.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_answers(seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _answers(seconds: float) -> bool:
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # a server answers; the hub client deals with its certificate
    except OSError:
        return False
    return True


def local_copy(name: str) -> str:
    if "/" in name:  # not a name of ours, but a source that stands in `datasets` itself
        return "give the path of a local copy in datasets=[...] (made by save_to_disk, or the hub's own files)"
    return f"dataset.{name}.source=DIR reads a local copy (made by save_to_disk, or the hub's own files)"
