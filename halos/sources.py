"""Read a source of rows in a known form into a `Dataset`: files, folders, `save_to_disk` folders, and hub datasets.

`read` finds out where the rows are, which of them belong to the split, and what form they have (`halos/forms.py`). A
malformed row among good ones is dropped and counted, and the first few are shown; with `strict` it is an error.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from halos import datafiles, hub
from halos.datafiles import SPLIT_NAMES, OnBad
from halos.errors import UserError, did_you_mean
from halos.examples import Dataset, Example, key_of
from halos.forms import Record, pairs_of_scores, record_of
from halos.rows import FORMS_IN_WORDS, Row, Text, prompt_in, response_in, shown

TEST_SHARE = 0.05  # share of prompts held out for testing, if a source defines no splits
N_SHOWN = 3  # malformed rows that are shown

Rows = Iterable[tuple[str, dict[str, Any]]]  # (place, row)
ReadRows = Callable[[OnBad], Rows]  # told whom to tell of a malformed row


def read(name: str, spec: Any, split: str, strict: bool = False) -> Dataset:
    """Read one split, 'train' or 'test', of `spec.source`.

    spec: the keys of config/dataset/base_dataset.yaml
    strict: raise at the first malformed row
    """
    dataset = Dataset(name)
    bad = _Malformed(dataset, strict)
    reader = _Reader(spec)
    rows, is_split = find_rows(name, spec, split)
    rankings: dict[str, Example] = {}
    for record in _records_of_split(rows, is_split, split, reader, spec.source, bad):
        dataset.rows += 1
        example = add_record(dataset, record)
        if example and record.rank:
            rankings[key_of(record.prompt, record.tools)] = example
    for example in rankings.values():
        _rank(dataset, example, spec)
    bad.report()
    reader.report(dataset)
    return dataset.not_empty(split)


def _rank(dataset: Dataset, example: Example, spec: Any) -> None:
    """Make pairs of the scored responses to one prompt."""
    pairs = pairs_of_scores(example.scores, spec.pairs, spec.margin)
    example.pairs += [pair for pair in pairs if pair not in example.pairs]
    if not pairs and len(example.generations) > 1:
        dataset.notes["prompts with responses of equal scores, or a smaller difference than margin"] += 1
    if example.sft_index is None:
        example.sft_index = max(range(len(example.scores)), key=lambda i: example.scores[i])


def add_record(dataset: Dataset, record: Record) -> Example | None:
    """Add what a row says to a dataset. Returns its example, or None if the row is dropped and counted."""
    if not record.prompt:
        dataset.dropped["empty prompt"] += 1
        return None
    if not _is_unicode([record.prompt, *record.responses, record.tools]):
        dataset.dropped["invalid Unicode"] += 1
        return None
    known: dict[str, Any] = {"tools": record.tools}
    if record.pairs:
        ((better, worse),) = record.pairs
        scores = (record.scores[better], record.scores[worse]) if record.scores else None
        return dataset.add_pair(
            record.prompt, record.responses[better], record.responses[worse], scores=scores, **known
        )
    if record.rank:
        return dataset.add_scored(record.prompt, list(zip(record.responses, record.scores, strict=True)), **known)
    (response,) = record.responses
    if record.desirable is not None:
        score = record.scores[0] if record.scores else None
        return dataset.add_feedback(record.prompt, response, record.desirable, score=score, **known)
    return dataset.add_imitated(record.prompt, response, key=record.whole, **known)


def _is_unicode(texts: list) -> bool:
    """Return False if a text has half a surrogate pair. JSON can write one (\\ud83d), but no tokenizer accepts it."""
    try:
        for text in texts:
            (text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Malformed:
    """Counts malformed rows, and keeps the first few messages."""

    def __init__(self, dataset: Dataset, strict: bool):
        self.dataset = dataset
        self.strict = strict
        self.errors: list[UserError] = []
        self.count = 0

    def __call__(self, error: UserError) -> None:
        if self.strict:
            raise UserError(f"{error} (strict_data=false drops such rows)")
        self.count += 1
        self.errors = [*self.errors, error][:N_SHOWN]

    def report(self) -> None:
        """Put the count into the dataset's account. Raises the first error if there was no good row."""
        if not self.count:
            return
        if not self.dataset.rows:
            raise self.errors[0]
        self.dataset.rows += self.count
        self.dataset.dropped["malformed row"] += self.count
        self.dataset.lines += [str(error) for error in self.errors]


class _Reader:
    """Makes records of rows, as the YAML says: renames columns, leaves rows out, and notes what is never read."""

    def __init__(self, spec: Any):
        self.form = spec.form
        self.prompt_as = spec.prompt_as
        self.columns = dict(spec["columns"])  # our name -> the source's
        self.where = {column: _values(value) for column, value in spec["keep"]["where"].items()}
        self.left_out = 0
        self.seen: set[str] = set()
        self.read: set[str] = {"split", "type", *self.where}

    def wants(self, where: str, row: dict) -> bool:
        """Return True if keep.where has nothing against a row."""
        for column, values in self.where.items():
            if column not in row:
                raise UserError(f"{where}: no column {column!r}, which keep.where names; {did_you_mean(column, row)}")
            if row[column] not in values:
                return False
        return True

    def record(self, where: str, row: dict) -> Record:
        columns = dict(row)
        for ours, theirs in self.columns.items():
            if theirs not in row:
                raise UserError(
                    f"{where}: no column {theirs!r}, which columns.{ours} names; {did_you_mean(theirs, row)}"
                )
            columns.pop(theirs, None)
        columns |= {ours: row[theirs] for ours, theirs in self.columns.items()}
        named = Row(where, columns, self.prompt_as)
        record = record_of(named, self.form)
        self.seen.update(name for name in columns if named.has(name))
        self.read |= named.read
        return record

    def report(self, dataset: Dataset) -> None:
        if self.left_out:
            dataset.rows += self.left_out
            dataset.dropped["not in keep.where"] += self.left_out
        if unread := sorted(self.seen - self.read):
            dataset.lines.append(f"columns that are not read: {', '.join(unread)}")


def _values(value: Any) -> list:
    return list(value) if not isinstance(value, str | int | float | bool) and value is not None else [value]


#### WHERE THE ROWS ARE


def find_rows(name: str, spec: Any, split: str) -> tuple[ReadRows, bool]:
    """Return a function that reads the rows, and whether they are those of this split only."""
    source = os.path.expanduser(spec.source)
    is_folder = os.path.isdir(source)
    if datafiles.is_glob(source) or (os.path.exists(source) and not is_folder) or datafiles.is_data_file(source):
        files, is_split = datafiles.split_files(source, split)
    elif is_folder and datafiles.has_splits(source) and not any(spec.splits.values()):
        files, is_split = datafiles.split_files(source, split)
    else:
        return _table_rows(name, source, spec, split)
    return lambda on_bad: (row for file in files for row in datafiles.read_rows(file, FORMS_IN_WORDS, on_bad)), is_split


def _table_rows(name: str, source: str, spec: Any, split: str) -> tuple[ReadRows, bool]:
    """Read a folder in the hub's layout, one made by `save_to_disk`, or a hub dataset."""
    repository, _, config = (source, "", "") if os.path.exists(source) else source.partition(":")
    tables = hub.load_splits(name, repository, config=config or None)
    chosen = {ours: hub.choose_split(source, list(tables), ours, spec.splits[ours]) for ours in ("train", "test")}
    if chosen["train"] is None:
        raise UserError(
            f"{source} has no split to train on (it has: {', '.join(tables)}); set {_key(name)}.splits.train"
        )
    is_split = chosen["test"] not in (None, chosen["train"])
    theirs = chosen[split] if is_split else chosen["train"]

    def rows(on_bad: OnBad) -> Iterator[tuple[str, dict]]:
        for number, row in enumerate(hub.rows_of_table(name, tables[theirs]), 1):
            yield f"{source}, {theirs} row {number}", row

    return rows, is_split


def _key(name: str) -> str:
    return f"dataset.{name}"


#### WHICH ROWS BELONG TO A SPLIT


def _records_of_split(
    rows: ReadRows, is_split: bool, split: str, reader: _Reader, source: str, bad: _Malformed
) -> Iterator[Record]:
    found, held_out_below, has_column = False, None, None
    for where, row in rows(bad):
        if has_column is None and not is_split:
            has_column = "split" in row
            held_out_below = None if has_column else _held_out_below(rows, reader, source)
        try:
            if not reader.wants(where, row):
                reader.left_out += 1
                continue
            belongs_to = _split_of(where, row) if has_column else split
            record = reader.record(where, row)
        except UserError as error:
            bad(error)
            continue
        if held_out_below is not None:
            belongs_to = "test" if prompt_hash(_hashed(record)) < held_out_below else "train"
        if belongs_to == split:
            found = True
            yield record
    if not found and not bad.count:
        raise UserError(f"{source}: no row of split {split!r}; {_split_remedy()}")


def _hashed(record: Record) -> Text:
    return record.prompt if record.whole is None else record.whole


def _split_of(where: str, row: dict) -> str:
    value = row.get("split")
    if not isinstance(value, str) or value not in SPLIT_NAMES:
        raise UserError(f"{where}: column 'split' is {shown(value)}; give one of: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[value]


def prompt_hash(prompt: Text) -> float:
    """Return a number in [0, 1) that depends on the prompt only."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _held_out_below(rows: ReadRows, reader: _Reader, source: str) -> float:
    """Return a limit: prompts with a smaller hash form the test split.

    They are TEST_SHARE of all prompts, at least one. Reading stops once there is a prompt on both sides, after about 1
    / TEST_SHARE rows.
    """
    hashes: set[float] = set()
    errors: list[UserError] = []  # reported when the rows are read for good
    for where, row in rows(errors.append):
        try:
            if not reader.wants(where, row):
                continue
            hashes.add(prompt_hash(_hashed(reader.record(where, row))))
        except UserError as error:
            errors.append(error)
        if hashes and min(hashes) < TEST_SHARE <= max(hashes):
            return TEST_SHARE
    if len(hashes) == 1 and errors:
        raise errors[0]
    if len(hashes) == 1:
        raise UserError(f"{source}: one prompt alone cannot be divided into train and test; {_split_remedy()}")
    return sorted(hashes)[1] if hashes else TEST_SHARE


def _split_remedy() -> str:
    return "add rows, give them a column 'split' (train or test), or give a folder with train.* and test.*"


#### PROMPTS ALONE


def prompt_records(path: str) -> Iterator[dict]:
    """Yield a user's own prompts to sample for: the column `prompt`, and `chosen` if a row has it."""
    files, _ = datafiles.split_files(path, "test")
    for file in files:
        for where, columns in datafiles.read_rows(file, "prompt (and chosen)"):
            row = Row(where, {"chosen": "", **columns})
            yield {"prompt": prompt_in(row), "chosen": response_in(row, "chosen")}
