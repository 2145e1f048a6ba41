"""The journal: an append-only file of all calls and verdicts, so that nothing that was paid for is lost.

A line is a JSON object about one key. A key identifies a request to a judge (`Judge.key`).

    {"sent": KEY, ...}      a call is about to be made; if no reply or error follows, it was possibly billed
    {"got": KEY, ...}       the reply, as it came, with or without a verdict in it
    {"error": KEY, ...}     the call failed, and why
    {"verdict": KEY, ...}   final: the score of the first slot, or why there will never be one

Lines are handed to the operating system at once, so that they survive the death of the process. They are synced to the
disk in groups. Journals of earlier versions must stay readable: add fields, and never change one.
"""

import asyncio
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from typing import BinaryIO

from halos.errors import UserError
from halos.judge.judges import Reply

NAME = "journal.jsonl"
SECONDS_BETWEEN_SYNCS = 0.5
REPLY_FIELDS = tuple(Reply.__dataclass_fields__)


class JournalLocked(UserError):
    """Another process writes this journal."""

    code = 5


@dataclass(slots=True)
class Entry:
    """All that the journal says about one key.

    score: the verdict, score of the first slot in [0, 1]; failed: or why there will never be one
    sent: number of calls; open: calls without a reply or error; lost: failed calls that may have been billed
    error: why the last call failed, or None
    answers: number of replies that are chat completions; tokens: (input, output) of all replies
    reply_at: position in the file of the last such reply, or -1
    """

    score: float | None = None
    failed: str | None = None
    sent: int = 0
    open: int = 0
    lost: int = 0
    error: str | None = None
    answers: int = 0
    tokens: tuple[int, int] = (0, 0)
    reply_at: int = -1

    @property
    def final(self) -> bool:
        return self.score is not None or self.failed is not None

    @property
    def possibly_billed(self) -> int:
        """Number of calls that may have been billed without a reply."""
        return self.open + self.lost


class Journal:
    """The journal of a directory. One process writes it at a time.

    read_only: do not lock or repair the file; see what is there now
    damaged: numbers of lines that cannot be read; torn: bytes of a last line that was cut off, or 0
    Raises JournalLocked if another process writes it, and UserError if the directory cannot be used.
    """

    def __init__(self, directory: str, read_only: bool = False):
        self.path = os.path.join(directory, NAME)
        self.entries: dict[str, Entry] = {}
        self.damaged: list[int] = []
        self.torn = 0
        self.read_only = read_only
        self.synced = True
        try:
            self.file = self._open(directory)
            self.size = self._load()
        except OSError as error:
            raise UserError(f"--cache {directory}: {error.strerror or error}; give a directory to write to") from error

    def _open(self, directory: str) -> BinaryIO | None:
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
        return file

    #### READING

    def _load(self) -> int:
        """Index the file and return its size in bytes. A torn last line, as a crash leaves it, is cut off."""
        if self.file is None:
            return 0
        position = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not self.read_only:  # else another process may be writing it
                        self.torn = len(line)
                        self.file.truncate(position)
                    break
                try:
                    self._index(json.loads(line), position)
                except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
                    self.damaged.append(number)
                position += len(line)
        return position

    def _index(self, record: dict, position: int) -> None:
        """Add one line, which starts at `position`, to the entry of its key."""
        kind = next(kind for kind in ("sent", "got", "error", "verdict") if kind in record)
        entry = self.entries.setdefault(record[kind], Entry())
        if kind == "sent":
            entry.sent += 1
            entry.open += 1
        elif kind == "got":
            entry.open -= 1
            entry.error = None
            tokens_in, tokens_out = record["usage"] or (0, 0)
            entry.tokens = (entry.tokens[0] + tokens_in, entry.tokens[1] + tokens_out)
            if not record["broken"]:
                entry.answers += 1
                entry.reply_at = position
        elif kind == "error":
            entry.open -= 1
            entry.lost += bool(record["billed"])
            entry.error = record["reason"]
        else:
            entry.score, entry.failed = record.get("score"), record.get("failed")

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
        return Reply(**{**{name: record[name] for name in REPLY_FIELDS}, "usage": usage})

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

    def failed(self, key: str, reason: str) -> None:
        self._append({"verdict": key, "failed": reason})

    def _append(self, record: dict) -> None:
        assert self.file is not None and not self.read_only
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self.file.write(line)
            if written != len(line):
                raise OSError("the disk took a part of a line")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); make room, and run again"
            ) from error
        self._index(record, self.size)
        self.size += len(line)
        self.synced = False

    async def sync_regularly(self) -> None:
        """Sync new lines to the disk every half second, until cancelled."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SYNCS)
            if not self.synced and self.file is not None:
                self.synced = True
                await asyncio.to_thread(os.fsync, self.file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.file is not None:
            if not self.read_only:
                os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
