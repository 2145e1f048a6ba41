"""The files of eval.py's samples: the partial file that grows while they are made, and the rows of the finished file.

A sample is written to the partial file as soon as it is there, so a command that was killed goes on where it was. A
finished command writes the rows whole and removes the partial file. To add a form of the finished file (--format),
write a function like `alpaca_rows`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from halos import distributed
from halos.chat import ASSISTANT, HUMAN, without_marks
from halos.errors import UserError
from halos.files import make_room
from halos.locks import is_file_of

#### THE PARTIAL FILE


def keys_of(what: dict[str, Any], prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[str]:
    """Return a key per sample: a hash of all that determines its text.

    what: the checkpoint and the settings that all samples share, as JSON can hold them
    prompts: arrays of ids; seeds: one per sample, as `sampling.response_seeds` returns them
    """
    shared = json.dumps(what, sort_keys=True).encode()
    keys = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        digest = hashlib.blake2b(shared, digest_size=16)
        digest.update(seed.to_bytes(8, "little") + prompt.astype(np.int32).tobytes())
        keys.append(digest.hexdigest())
    return keys


class PartialFile:
    """The samples of an unfinished command. A line is {"key": ..., "text": ...}.

    Rank 0 reads and writes the file; `texts` (key -> text) is what it had at the start, on all ranks. A torn last line
    is cut off. A file that holds none of the `wanted` keys is of another command, and is renamed.
    Raises UserError if another process writes the file, or if it cannot be written.
    """

    def __init__(self, path: str, wanted: Iterable[str]):
        self.path = path
        self.file = self._open() if distributed.is_main() else None
        texts = self._read()
        if texts and texts.keys().isdisjoint(wanted):
            make_room(path)
            self.close()
            self.file, texts = self._open(), {}
        self.texts: dict[str, str] = distributed.from_main(texts)

    def _open(self):
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); choose another samples_dir") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(f"{self.path} is in use by another eval.py; wait for it, or use --output FILE") from error
        if not is_file_of(file.fileno(), self.path):  # the other eval.py has just finished, and removed or renamed it
            file.close()
            return self._open()
        return file

    def _read(self) -> dict[str, str]:
        """Return the whole lines, and cut off what follows the last one. A damaged line is left out."""
        texts: dict[str, str] = {}
        if self.file is None:
            return texts
        self.file.seek(0)
        data = self.file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self.file.truncate(whole)
        for line in data[:whole].splitlines():
            try:
                record = json.loads(line)
                texts[record["key"]] = record["text"]
            except (ValueError, LookupError, TypeError):
                continue  # the sample is made again
        return texts

    def known(self, keys: Sequence[str]) -> dict[int, str]:
        """Return index -> text of the samples that were made before."""
        return {index: self.texts[key] for index, key in enumerate(keys) if key in self.texts}

    def recorder(self, keys: Sequence[str]) -> Callable[[dict[int, str]], None]:
        """Return a function that appends new samples, index -> text. It does nothing on ranks other than 0."""

        def record(texts: dict[int, str]) -> None:
            if self.file is None or not texts:
                return
            lines = [json.dumps({"key": keys[index], "text": text}) + "\n" for index, text in texts.items()]
            data = "".join(lines).encode()
            try:
                if self.file.write(data) != len(data):
                    raise OSError(None, "no space left")
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}); make room, run again") from error

        return record

    def remove(self) -> None:
        """Delete the file, after the finished file is written."""
        if self.file is not None:
            os.remove(self.path)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


#### THE FINISHED FILE


def rows_of(
    prompts: list, policy: list[str], reference: list[str] | None, scores: list[list[float]] | None = None
) -> list[dict]:
    """Return the rows of a sample file: prompt, messages of a conversation, chosen, policy, reference.

    With several samples per prompt there is a row for each, and `sample` numbers them from 0.

    policy, reference: the first sample of every prompt, then the second of every prompt, and so on
    scores: those of all samples of each prompt, if `policy` has the best one of each
    """
    n = len(prompts)
    reference = reference or [""] * len(policy)
    return [
        {"prompt": without_marks(prompt.text)}
        | ({"messages": prompt.messages} if prompt.messages else {})
        | ({"sample": number} if len(policy) > n else {})
        | {"chosen": prompt.chosen, "policy": policy[index + number * n], "reference": reference[index + number * n]}
        | ({"scores": scores[index]} if scores else {})
        for index, prompt in enumerate(prompts)
        for number in range(len(policy) // n)
    ]


def alpaca_rows(prompts: list, policy: list[str], generator: str) -> list[dict]:
    """Return the rows that AlpacaEval reads: instruction, output, generator, dataset. policy: one per prompt"""
    return [
        {
            "instruction": instruction_of(prompt),
            "output": text.strip(),
            "generator": generator,
            "dataset": prompt.dataset,
        }
        for prompt, text in zip(prompts, policy, strict=True)
    ]


def instruction_of(prompt) -> str:
    """Return the text of the last user message, or of the last Human turn of a prompt that is text."""
    if prompt.messages:
        return next((turn["content"] for turn in reversed(prompt.messages) if turn["role"] == "user"), "")
    return without_marks(prompt.text).rpartition(HUMAN)[2].removesuffix(ASSISTANT).strip()
