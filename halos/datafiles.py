"""Read rows of preference data, from hub datasets (or local copies of them) and from a user's own files.

`hub_rows` yields rows with the hub's own columns. `records` yields the rows of a `.json`, `.jsonl` or `.parquet` file,
checked and in one of two forms: {prompt, chosen, rejected} or {prompt, response, desirable}. Every problem with a
source raises a UserError that names the place. `dataloaders.py` turns the rows into examples.
"""

import codecs
import difflib
import hashlib
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

from halos.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet")
FORMS = "prompt, chosen, rejected (pairs) or prompt, response, desirable (binary feedback)"
SPLIT_NAMES = {"train": "train", "test": "test", "validation": "test", "eval": "test"}
LABELS = {1: True, 0: False, -1: False}  # the keys 1 and 0 match True and False too
TEST_SHARE = 0.05  # share of prompts held out for testing, if a file defines no splits
SECONDS_BEFORE_BAR = 3
NOT_BLANK = re.compile(r"[^ \t\r\n]|\Z")


#### HUB DATASETS AND LOCAL COPIES


def hub_rows(name: str, source: str, split: str, columns: list[str], subset: str | None = None) -> Iterator[dict]:
    """Yield the rows of one split, `columns` only.

    name: our name for the dataset, as in dataset_paths.{name}
    source: a hub name, a directory made by `save_to_disk`, or a directory with the hub's own files
    subset: a directory of the hub's repository; a local copy may contain it, or be that subset itself
    """
    splits = _load_splits(name, source, subset)
    if split not in splits:
        found = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{source} has no split {split!r} (it has: {found}); {_local_copy(name)}")
    table = splits[split]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(
            f"{source} has no column {missing[0]!r} (it has: {', '.join(table.column_names)}); "
            f"give a source with the hub's own columns: {_local_copy(name)}"
        )
    with tqdm(total=len(table), desc=f"reading {name}", unit="row", delay=SECONDS_BEFORE_BAR, leave=False) as bar:
        for batch in table.select_columns(columns).iter(batch_size=1000):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield dict(zip(columns, values, strict=True))
            bar.update(len(batch[columns[0]]))


def _load_splits(name: str, source: str, subset: str | None) -> dict:
    """Load all splits: name -> memory-mapped datasets.Dataset."""
    import datasets

    directory = os.path.expanduser(source)
    if os.path.exists(directory) or source.startswith(("/", ".", "~")):
        if not os.path.isdir(directory):
            reason = "not a directory" if os.path.exists(directory) else "no such directory"
            raise UserError(f"dataset_paths.{name}={source}: {reason}; {_local_copy(name)}")
        if subset and os.path.isdir(os.path.join(directory, subset)):
            directory = os.path.join(directory, subset)
    elif not datasets.config.HF_HUB_OFFLINE and not _hub_answers():
        # Same as HF_HUB_OFFLINE=1: earlier downloads still load, and the hub client does not retry for half a minute.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        if not os.path.isdir(directory):
            return datasets.load_dataset(source, data_dir=subset)
        if any(os.path.isfile(os.path.join(directory, file)) for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(directory)
            return saved if isinstance(saved, dict) else {str(saved.split): saved}
        return datasets.load_dataset(directory)
    except ConnectionError as error:
        reason = "the hub cannot be reached, and no download of it is cached"
        raise UserError(f"{name}: cannot load {source} ({reason}); without internet, {_local_copy(name)}") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: cannot load {source} ({_reason(error)}); {_local_copy(name)}") from error


def _hub_answers(seconds: float = 5.0) -> bool:
    """Return True if any server answers at the hub's address, even a proxy or with an error page."""
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


def _reason(error: BaseException) -> str:
    """Return the first line of the error at the root of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _local_copy(name: str) -> str:
    return f"dataset_paths.{name}=DIR reads a local copy (made by save_to_disk, or the hub's own files)"


#### A USER'S OWN FILES


def records(path: str, split: str) -> Iterator[dict]:
    """Yield the checked rows of one split, 'train' or 'test', of a file, or of a folder with train.* and test.*.

    A prompt is text or a list of {role, content}. `desirable` is a bool. Everything else is text.
    """
    file, is_split = split_file(path, split)
    found, held_out_below = False, None
    for number, (where, row) in enumerate(read_rows(file)):
        if number == 0 and not is_split and "split" not in row:
            held_out_below = _held_out_below(file)
        record = _record(where, row)
        if is_split:
            belongs_to = split
        elif held_out_below is None:
            belongs_to = _split_of(where, row)
        else:
            belongs_to = "test" if prompt_hash(record["prompt"]) < held_out_below else "train"
        if belongs_to == split:
            found = True
            yield record
    if not found:
        raise UserError(f"{file}: no row of split {split!r}; {_split_remedy()}")


def prompt_records(path: str) -> Iterator[dict]:
    """Yield a user's own prompts to sample for: the column `prompt`, and `chosen` if a row has it."""
    file, _ = split_file(path, "test")
    for where, row in read_rows(file):
        _require(where, row, "prompt")
        yield {"prompt": _prompt(where, row["prompt"]), "chosen": _response(where, {"chosen": "", **row}, "chosen")}


def split_file(path: str, split: str) -> tuple[str, bool]:
    """Return the file that contains a split, and whether the file contains this split only."""
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file or folder; give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, "
            "or a folder with train.* and test.*"
        )
    if not os.path.isdir(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: not a data file; give one that ends in {', '.join(SUFFIXES)}")
        return path, False
    files = [os.path.join(path, split + suffix) for suffix in SUFFIXES]
    found = [file for file in files if os.path.isfile(file)]
    if not found:
        raise UserError(f"{path}: no {split} file in this folder; add {split}.json, {split}.jsonl or {split}.parquet")
    if len(found) > 1:
        raise UserError(f"{path}: both {' and '.join(map(os.path.basename, found))}; keep one")
    return found[0], True


def read_rows(file: str, forms: str = FORMS) -> Iterator[tuple[str, dict]]:
    """Yield the unchanged rows, each with its place: FILE:LINE, or 'FILE, row N' for parquet.

    forms: the columns that a row should have, for error messages
    """
    reader = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[os.path.splitext(file)[1]]
    empty = True
    try:
        if os.path.getsize(file):
            for where, row in reader(file):
                if not isinstance(row, dict):
                    raise UserError(f"{where}: a row is an object with {forms}, not {_shown(row)}")
                empty = False
                yield where, row
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the file") from error
    if empty:
        raise UserError(f"{file}: no rows; a row has {forms}")


def _jsonl_rows(file: str) -> Iterator[tuple[str, object]]:
    with open(file, "rb") as lines, _bar(file, os.path.getsize(file)) as bar:
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            text = _decoded(line, f"{file}:{number}")
            if text.strip():
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise _malformed(file, number, error) from error
                yield f"{file}:{number}", row


def _json_rows(file: str) -> Iterator[tuple[str, object]]:
    """Yield the items of a list. Decoding one at a time gives each a line number, and saves memory."""
    with open(file, "rb") as whole:
        text = _decoded(whole.read(), file)
    try:
        with _bar(file, len(text)) as bar:
            for start, line, item in _items(text):
                bar.update(start - bar.n)
                yield f"{file}:{line}", item
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            raise UserError(f"{file}: not a list of objects; name a file with one object per line .jsonl") from error
        raise _malformed(file, error.lineno, error) from error


def _items(text: str) -> Iterator[tuple[int, int, object]]:
    """Yield (offset, line, item) for every item of a JSON list."""
    decode = json.JSONDecoder().raw_decode

    def after_blanks(position: int) -> int:
        found = NOT_BLANK.search(text, position)
        return found.start() if found else len(text)

    def token(position: int, expected: str) -> tuple[str, int]:
        """Return the next character, which must be in `expected`, and the offset of what follows it."""
        position = after_blanks(position)
        character = text[position : position + 1]
        if not character or character not in expected:
            raise json.JSONDecodeError(f"Expecting {' or '.join(expected)}", text, position)
        return character, after_blanks(position + 1)

    if not text.strip():
        return
    mark, position = token(0, "[")
    if text[position : position + 1] == "]":
        mark, position = token(position, "]")
    line, counted = 1, 0
    while mark != "]":
        line, counted = line + text.count("\n", counted, position), position
        item, end = decode(text, position)
        yield position, line, item
        mark, position = token(end, ",]")
    if position < len(text):
        raise json.JSONDecodeError("Expecting the end of the file", text, position)


def _parquet_rows(file: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table, _bar(file, table.metadata.num_rows, "row") as bar:
            rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                bar.update()
                yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable parquet file ({_reason(error)}); write it again") from error


def _bar(file: str, total: int, unit: str = "B") -> tqdm:
    description = f"reading {os.path.basename(file)}"
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", delay=SECONDS_BEFORE_BAR, leave=False)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _malformed(file: str, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{file}:{line}: malformed JSON ({error.msg} at column {error.colno}); correct or remove it")


#### ONE ROW


def _record(where: str, row: dict) -> dict:
    if "chosen" in row or "rejected" in row:
        _require(where, row, "prompt", "chosen", "rejected")
        texts = {column: _response(where, row, column) for column in ("chosen", "rejected")}
        return {"prompt": _prompt(where, row["prompt"]), **texts}
    response = "completion" if "completion" in row and "response" not in row else "response"
    label = "label" if "label" in row and "desirable" not in row else "desirable"
    _require(where, row, "prompt", response, label)
    desirable = _label(where, row, label)
    return {
        "prompt": _prompt(where, row["prompt"]),
        "response": _response(where, row, response),
        "desirable": desirable,
    }


def _require(where: str, row: dict, *columns: str) -> None:
    for column in columns:
        if column not in row:
            others = sorted(set(row) - set(columns))
            nearest = difflib.get_close_matches(column, others, n=1, cutoff=0.6)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"a row has {FORMS}"
            raise UserError(f"{where}: no column {column!r} (it has: {', '.join(sorted(row))}); {remedy}")


def _prompt(where: str, value: object) -> str | list[dict]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise UserError(
            f"{where}: column 'prompt' is {_shown(value)}; give text, or a list of messages "
            '{"role": ..., "content": ...}'
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response(where: str, row: dict, column: str) -> str:
    """Return the text of a response; null counts as empty text."""
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list) or not all(map(is_message, value)):
        raise UserError(f"{where}: column {column!r} is {_shown(value)}; give text, or a list with one message")
    roles = [message["role"] for message in value]
    if roles != ["assistant"]:
        raise UserError(
            f"{where}: column {column!r} has the messages [{', '.join(roles)}]; give one assistant message, "
            "and put the turns before it in 'prompt'"
        )
    return value[0]["content"]


def is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _label(where: str, row: dict, column: str) -> bool:
    value = row[column]
    if not isinstance(value, bool | int | float) or value not in LABELS:
        raise UserError(f"{where}: column {column!r} is {_shown(value)}; give true or false, 1 or 0, or 1 or -1")
    return LABELS[int(value)]


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


#### SPLITS


def _split_of(where: str, row: dict) -> str:
    value = row.get("split")
    if not isinstance(value, str) or value not in SPLIT_NAMES:
        raise UserError(f"{where}: column 'split' is {_shown(value)}; give one of: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[value]


def prompt_hash(prompt: str | list[dict]) -> float:
    """Return a number in [0, 1) that depends on the prompt only."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _held_out_below(file: str) -> float:
    """Return a limit: prompts with a smaller hash form the test split.

    They are TEST_SHARE of all prompts, at least one. Reading stops once there is a prompt on both sides, after about 1
    / TEST_SHARE rows.
    """
    hashes = set()
    for where, row in read_rows(file):
        hashes.add(prompt_hash(_record(where, row)["prompt"]))
        if min(hashes) < TEST_SHARE <= max(hashes):
            return TEST_SHARE
    if len(hashes) == 1:
        raise UserError(f"{file}: one prompt alone cannot be divided into train and test; {_split_remedy()}")
    return sorted(hashes)[1]


def _split_remedy() -> str:
    return "add rows, give them a column 'split' (train or test), or give a folder with train.* and test.*"
