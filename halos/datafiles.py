"""Read rows from files: JSON, JSON lines, CSV and parquet, plain or compressed, one file or several.

Every problem with a file raises a UserError that names the place. `halos/sources.py` makes examples of the rows.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from tqdm import tqdm

from halos.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
PACKED = (".gz", ".zst")  # any of these may follow a suffix
SPLIT_NAMES = {"train": "train", "test": "test", "validation": "test", "eval": "test"}
SECONDS_BEFORE_BAR = 3
DEEPEST = 100  # levels of nesting in a row
NOT_BLANK = re.compile(r"[^ \t\r\n]|\Z")

OnBad = Callable[[UserError], None] | None  # told of a malformed row, which is then left out; None: it is raised


#### WHICH FILES


def suffix_of(path: str) -> str:
    """Return the suffix that says what a file holds, without that of its compression; '' if it is no data file."""
    suffix = os.path.splitext(unpacked_name(path))[1]
    return suffix if suffix in SUFFIXES else ""


def unpacked_name(path: str) -> str:
    return os.path.splitext(path)[0] if path.endswith(PACKED) else path


def is_data_file(path: str) -> bool:
    return bool(suffix_of(path))


def is_glob(path: str) -> bool:
    return glob.has_magic(path)


def split_files(path: str, split: str) -> tuple[list[str], bool]:
    """Return the files that contain a split, and whether they contain this split only.

    path: a file, a glob, or a folder with train.* and test.* (or train-*.*, as in train-00000-of-00002.parquet)
    """
    path = os.path.expanduser(path)
    if is_glob(path) and not os.path.exists(path):
        found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            raise UserError(f"{path}: no file matches; correct the pattern")
        return [_data_file(file) for file in found], False
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file or folder; give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, "
            "or a folder with train.* and test.*"
        )
    if not os.path.isdir(path):
        return [_data_file(path)], False
    return _files_of_folder(path, split), True


def _data_file(path: str) -> str:
    if not is_data_file(path):
        raise UserError(
            f"{path}: not a data file; give one that ends in {', '.join(SUFFIXES)}, or in one of these and .gz or .zst"
        )
    return path


def _files_of_folder(folder: str, split: str) -> list[str]:
    parts = _parts(folder, split)
    if not parts:
        raise UserError(f"{folder}: no {split} file in this folder; add {split}.json, {split}.jsonl or {split}.parquet")
    if len({suffix_of(file) for file in parts}) > 1 or len({_stem(file) for file in parts}) < len(parts):
        raise UserError(f"{folder}: both {' and '.join(map(os.path.basename, parts[:2]))}; keep one")
    return parts


def _parts(folder: str, split: str) -> list[str]:
    """Return the files of a split, under the first of its names that has any."""
    for name in [name for name, ours in SPLIT_NAMES.items() if ours == split]:
        files = [os.path.join(folder, file) for file in sorted(os.listdir(folder)) if is_data_file(file)]
        found = [file for file in files if re.fullmatch(rf"{name}([-_.]\d.*)?", _stem(file)) and os.path.isfile(file)]
        if found:
            return found
    return []


def _stem(file: str) -> str:
    return os.path.basename(os.path.splitext(unpacked_name(file))[0])


def has_splits(folder: str) -> bool:
    """Return True for a folder with train.* or test.*."""
    return any(_parts(folder, split) for split in ("train", "test"))


#### ROWS


def read_rows(file: str, forms: str = "columns", on_bad: OnBad = None) -> Iterator[tuple[str, dict]]:
    """Yield the unchanged rows, each with its place: FILE:LINE, or 'FILE, row N' for parquet.

    forms: the columns that a row should have, for error messages
    """
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    empty = True
    try:
        if os.path.getsize(file):
            for where, row in readers[suffix_of(file)](file, on_bad):
                empty = False
                if isinstance(row, dict):
                    yield where, row
                else:
                    bad(UserError(f"{where}: a row is an object with {forms}, not {_shown(row)}"), on_bad)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); check the file") from (
            error
        )
    if empty:
        raise UserError(f"{file}: no rows; a row has {forms}")


def bad(error: UserError, on_bad: OnBad) -> None:
    """Report a malformed row, or raise the error."""
    if on_bad is None:
        raise error
    on_bad(error)


def _open(file: str) -> IO[bytes]:
    """Open a file, and unpack it while reading."""
    if file.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    if file.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))  # type: ignore[arg-type]
    return open(file, "rb")


def _csv_rows(file: str, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    """Yield the rows of a table whose first line names the columns. A cell with a JSON list becomes the list."""
    csv.field_size_limit(2**31 - 1)
    with _open(file) as whole:
        text = _decoded(whole.read(), file)
    table = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    line = 2
    try:
        for row in table:
            where, line = f"{file}:{line}", table.line_num + 1
            columns = len(table.fieldnames or ())
            if "" in row or None in row.values():
                found = columns + len(row.get("", ())) if "" in row else sum(v is not None for v in row.values())
                bad(UserError(f"{where}: {found} cells in {columns} columns; quote cells that hold a comma"), on_bad)
            else:
                yield where, {name: _cell(value) for name, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{file}:{line}: malformed CSV ({error}); correct it") from error


def _cell(value: str) -> object:
    if value.startswith(("[{", "[")) and value.endswith("]"):
        try:
            return from_json(value)
        except json.JSONDecodeError:
            return value
    return value or None


def from_json(text: str) -> Any:
    """Return what JSON text means. Raises JSONDecodeError as `json.loads` does, and for what `item_at` refuses."""
    value, end = item_at(text, _after_blanks(text, 0))
    if _after_blanks(text, end) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def item_at(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value at an offset, and the offset behind it.

    Raises JSONDecodeError also for values that Python cannot hold or walk through: too deep, or too many digits.
    """
    try:
        value, end = json.JSONDecoder().raw_decode(text, position)
    except RecursionError:
        raise json.JSONDecodeError(f"More than {DEEPEST} levels of nesting", text, position) from None
    except ValueError as error:  # JSONDecodeError is one, too
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(":")[0]
        raise json.JSONDecodeError(reason, text, getattr(error, "pos", position)) from None
    if text.count("[", position, end) + text.count("{", position, end) > DEEPEST and _is_deep(value):
        raise json.JSONDecodeError(f"More than {DEEPEST} levels of nesting", text, position)
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        parts = [one for part in level for one in (part.values() if isinstance(part, dict) else part)]
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _after_blanks(text: str, position: int) -> int:
    found = NOT_BLANK.search(text, position)
    return found.start() if found else len(text)


def _jsonl_rows(file: str, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    with _open(file) as lines, _bar(file, None if file.endswith(PACKED) else os.path.getsize(file)) as bar:
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            try:
                text = _decoded(line, f"{file}:{number}")
                row = from_json(text) if text.strip() else None
            except UserError as error:
                bad(error, on_bad)
            except json.JSONDecodeError as error:
                bad(_malformed(file, number, error), on_bad)
            else:
                if text.strip():
                    yield f"{file}:{number}", row


def _json_rows(file: str, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    """Yield the items of a list. Decoding one at a time gives each a line number, and saves memory."""
    with _open(file) as whole:
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

    def token(position: int, expected: str) -> tuple[str, int]:
        """Return the next character, which must be in `expected`, and the offset of what follows it."""
        position = _after_blanks(text, position)
        character = text[position : position + 1]
        if not character or character not in expected:
            raise json.JSONDecodeError(f"Expecting {' or '.join(expected)}", text, position)
        return character, _after_blanks(text, position + 1)

    if not text.strip():
        return
    mark, position = token(0, "[")
    if text[position : position + 1] == "]":
        mark, position = token(position, "]")
    line, counted = 1, 0
    while mark != "]":
        line, counted = line + text.count("\n", counted, position), position
        item, end = item_at(text, position)
        yield position, line, item
        mark, position = token(end, ",]")
    if position < len(text):
        raise json.JSONDecodeError("Expecting the end of the file", text, position)


def _seekable(file: str) -> str | IO[bytes]:
    if not file.endswith(PACKED):
        return file
    with _open(file) as whole:
        return io.BytesIO(whole.read())


def _parquet_rows(file: str, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(_seekable(file)) as table, _bar(file, table.metadata.num_rows, "row") as bar:
            rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                bar.update()
                yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable parquet file ({reason(error)}); write it again") from error


def _bar(file: str, total: int | None, unit: str = "B") -> tqdm:
    description = f"reading {os.path.basename(file)}"
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", delay=SECONDS_BEFORE_BAR, leave=False)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _malformed(file: str, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{file}:{line}: malformed JSON ({error.msg} at column {error.colno}); correct or remove it")


def is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def reason(error: BaseException) -> str:
    """Return the first line of the error at the root of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
