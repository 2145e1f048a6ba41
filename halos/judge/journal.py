"""The journal: an append-only file of all calls and verdicts, so that nothing that was paid for is lost.

A line is a JSON object about one key. A key identifies a request to a judge (`Judge.key`).

    {"sent": KEY, ...}      a call is about to be made; if no reply or error follows, it was possibly billed
    {"got": KEY, ...}       the reply, as it came, with or without a verdict in it
    {"error": KEY, ...}     the call failed, and why
    {"verdict": KEY, ...}   the score of the first slot, or why there is none, now or ("final") ever

Lines are handed to the operating system at once, so that they survive the death of the process. They are synced to the
disk every half second and at the end. Journals of earlier versions must stay readable: add fields, and never change
one. Every line is checked before it is used (records.py). No secret is written.
"""

import asyncio
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from typing import BinaryIO

from halos import secrets
from halos.errors import UserError
from halos.judge.judges import Reply
from halos.judge.records import kind_of, problem_with

NAME = "journal.jsonl"
SECONDS_BETWEEN_SYNCS = 0.5
NO_VERDICT = "no verdict in "  # how a failure begins that another run may repair; earlier versions called it final
REPLY_FIELDS = tuple(Reply.__dataclass_fields__)


class JournalLocked(UserError):
    """Another process writes this journal."""

    code = 5


@dataclass(slots=True)
class Entry:
    """All that the journal says about one key.

    score: the verdict, score of the first slot in [0, 1]; failed: or why there is none
    for_good: whether a failure is one in every later run too
    sent: number of calls; open: calls without a reply or error; lost: failed calls that may have been billed
    error: why the last call failed, or None
    answers: number of replies that are chat completions; tokens: (input, output) of all replies
    reply_at: position in the file of the last such reply, or -1
    """

    score: float | None = None
    failed: str | None = None
    for_good: bool = False
    sent: int = 0
    open: int = 0
    lost: int = 0
    error: str | None = None
    answers: int = 0
    tokens: tuple[int, int] = (0, 0)
    reply_at: int = -1

    @property
    def final(self) -> bool:
        return self.score is not None or (self.failed is not None and self.for_good)

    @property
    def possibly_billed(self) -> int:
        """Number of calls that may have been billed without a reply."""
        return self.open + self.lost


class Journal:
    """The journal of a directory. One process writes it at a time.

    read_only: do not lock or repair the file; see what is there now
    damaged: number of a line that is not used -> why; torn: bytes of a last line that was cut off, or 0
    Raises JournalLocked if another process writes it, and UserError if the directory or the file cannot be used.
    """

    def __init__(self, directory: str, read_only: bool = False):
        self.path = os.path.join(directory, NAME)
        self.entries: dict[str, Entry] = {}
        self.damaged: dict[int, str] = {}
        self.torn = 0
        self.read_only = read_only
        self.synced = True
        try:
            self.file = self._open(directory)
            self.size = self._load()
        except OSError as error:
            raise UserError(f"--cache {directory}: {error.strerror or error}; give a directory to write to") from error

    def _open(self, directory: str) -> BinaryIO | None:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise UserError(f"{self.path} is not a file; give --cache another directory")
        if self.read_only:
            return open(self.path, "rb", buffering=0) if os.path.exists(self.path) else None
        os.makedirs(directory, exist_ok=True)
        file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise JournalLocked(
                f"{self.path} is in use by another compare.py; wait for it, or give --cache another directory"
            ) from error
        _sync_directory(directory)
        return file

    #### READING

    def _load(self) -> int:
        """Index the file and return its size in bytes. A torn last line, as a crash leaves it, is cut off."""
        if self.file is None:
            return 0
        position = used = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and _is_torn(line):
                    if not self.read_only:  # else another process may be writing it
                        self.torn = len(line)
                        self.file.truncate(position)
                    break
                used += self._read_line(number, line, position)
                position += len(line)
        if self.damaged and not used:
            number, problem = next(iter(self.damaged.items()))
            raise UserError(
                f"{self.path} is not a journal of compare.py (line {number}: {problem}); move it away, or give --cache "
                "another directory"
            )
        return position + self._end_line(position)

    def _read_line(self, number: int, line: bytes, position: int) -> bool:
        """Index a line, or take note of what is wrong with it; return whether it is a record. Empty lines are none."""
        if not line.strip():
            return False
        try:
            record = json.loads(line.decode("utf-8-sig"))
            problem = problem_with(record)
        except (ValueError, RecursionError):
            problem = "not JSON"
        if problem:
            self.damaged[number] = secrets.redact(problem)
            return False
        self._index(record, position)
        return True

    def _end_line(self, position: int) -> int:
        """End a last line that is damaged and has no end, so that the next one is not damaged too. Return its bytes."""
        if self.read_only or not position or self.file is None:
            return 0
        with open(self.path, "rb") as file:
            file.seek(position - 1)
            return 0 if file.read(1) == b"\n" else self.file.write(b"\n")

    def _index(self, record: dict, position: int) -> None:
        """Add one line, which starts at `position`, to the entry of its key."""
        kind = kind_of(record)
        entry = self.entries.setdefault(record[kind], Entry())
        if kind == "sent":
            entry.sent += 1
            entry.open += 1
        elif kind == "got":
            entry.open = max(0, entry.open - 1)  # the line of the call may be damaged
            entry.error = None
            tokens_in, tokens_out = record["usage"] or (0, 0)
            entry.tokens = (entry.tokens[0] + tokens_in, entry.tokens[1] + tokens_out)
            if not record["broken"]:
                entry.answers += 1
                entry.reply_at = position
        elif kind == "error":
            entry.open = max(0, entry.open - 1)
            entry.lost += record["billed"]
            entry.error = record["reason"]
        else:
            entry.score, entry.failed = record.get("score"), record.get("failed")
            entry.for_good = record.get("final", not str(entry.failed).startswith(NO_VERDICT))

    def entry(self, key: str) -> Entry:
        """Look up a key; the entry of an unknown one is empty."""
        return self.entries.get(key) or Entry()

    def reply(self, key: str) -> Reply | None:
        """Read the last reply to a key from the file, or None."""
        position = self.entry(key).reply_at
        if position < 0 or self.file is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(position)
            record = json.loads(file.readline())
        usage = record["usage"] and tuple(record["usage"])
        return Reply(**{**{name: record[name] for name in REPLY_FIELDS if name in record}, "usage": usage})

    #### WRITING

    def sent(self, key: str, **what) -> None:
        """Write that a call is about to be made. what: more that people may want to know of it."""
        self._append({"sent": key, "at": round(time.time(), 3), **what})

    def got(self, key: str, reply: Reply, attempt: int) -> None:
        self._append({"got": key, "attempt": attempt, **asdict(reply)})

    def error(self, key: str, reason: str, billed: bool) -> None:
        self._append({"error": key, "reason": reason, "billed": billed})

    def verdict(self, key: str, score: float) -> None:
        self._append({"verdict": key, "score": score})

    def failed(self, key: str, reason: str, final: bool) -> None:
        """Write that there is no verdict. final: and that there will never be one"""
        self._append({"verdict": key, "failed": reason, "final": final})

    def _append(self, record: dict) -> None:
        assert self.file is not None and not self.read_only
        kind = kind_of(record)
        record = {**secrets.redacted(record), kind: record[kind]}
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self.file.write(line)
            if written != len(line):
                self.file.truncate(self.size)  # else the next line would be a part of this one
                raise OSError("the disk took a part of a line")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); make room, and run again"
            ) from error
        self._index(record, self.size)
        self.size += len(line)
        self.synced = False

    async def sync_regularly(self) -> None:
        """Sync new lines to the disk every half second, until cancelled. Raises UserError if the disk refuses."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SYNCS)
            if not self.synced:
                await asyncio.to_thread(self.sync)

    def sync(self) -> None:
        if self.file is None or self.read_only:
            return
        self.synced = True
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} is not safe on the disk ({error.strerror}); run again") from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.file is not None:
            try:
                self.sync()
            finally:
                self.file.close()
                self.file = None


def _is_torn(line: bytes) -> bool:
    """Return whether a last line without an end is the beginning of one of ours, or what a disk has in its place."""
    return line[:2] == b'{"'[: len(line)] or not line.strip(b"\0")


def _sync_directory(path: str) -> None:
    """Make a new file known to the disk."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
