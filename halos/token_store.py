"""Token ids of texts on disk, memory-mapped, under a hash of the texts and of the tokenizer's rules.

An entry has a manifest: its checksums are compared at every start (0.2 s per GB, a quarter of what hashing the texts
takes), and a damaged entry is made again. Processes that start at once tokenize once: the others wait.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain

import numpy as np
from tqdm import tqdm

from halos import distributed, locks, manifest
from halos.tokens import LITERAL, Encoder

BLOCK = 1024  # texts encoded per call: enough for every thread, and few enough to stay in the caches of a CPU
AT_ONCE = 2  # blocks that are encoded at once


class TokenStore:
    """Token ids of many texts, memory-mapped. `store[i]` is the (n,) int32 array of text i; `lengths` is (n_texts,)."""

    def __init__(self, directory: str):
        self.directory = directory
        self.offsets = np.load(os.path.join(directory, "offsets.npy"))
        path = os.path.join(directory, "ids.bin")
        empty = not self.offsets[-1]
        self.ids = np.empty(0, np.int32) if empty else np.memmap(path, np.int32, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def has_context(self) -> bool:
        """Return whether some response has tokens that are not trained on. These are stored as ~id."""
        return bool(len(self.ids)) and bool(self.ids.min() < 0)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize(texts: Sequence[str], encoder: Encoder, kind: str, cache_dir: str, description: str = "") -> TokenStore:
    """Return the ids of `texts`. They are read from `{cache_dir}/.tokens` if the same texts were encoded before.

    kind: "prompts" or "responses", the method of `encoder` to use
    """
    directory = os.path.join(cache_dir, ".tokens", _content_key(texts, encoder.fingerprint, kind))
    # The other processes of a machine come after its first one, which has compared the checksums.
    if distributed.local_rank() and os.path.isdir(directory):
        return TokenStore(directory)
    description = description or kind
    damage = _damage(directory)
    if damage:
        waiting = f"waiting for {{}}, which is tokenizing the same {description}"
        with locks.take(directory, lambda who: print(waiting.format(who), flush=True)):
            if damage := _damage(directory):  # nobody else has made it meanwhile
                if os.path.isdir(directory):
                    print(f"{damage}; tokenizing again", flush=True)
                with manifest.written(directory) as unfinished:
                    _write_files(texts, getattr(encoder, kind), unfinished, description)
    manifest.remove_leftovers(os.path.dirname(directory))
    return TokenStore(directory)


def _content_key(texts: Iterable[str], *parts: str) -> str:
    digest = hashlib.blake2b(" ".join(parts).encode(), digest_size=20)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] and ["a", "bc"] differ
        digest.update(data)
    return digest.hexdigest()


def _damage(directory: str) -> str | None:
    """Return what is wrong with an entry; None if it is whole. Entries of earlier versions have no manifest."""
    try:
        manifest.check(directory)
    except manifest.Damaged as damage:
        return str(damage)
    return None


def _write_files(texts: Sequence[str], encode: Callable, unfinished: str, description: str) -> None:
    lengths = np.empty(len(texts), np.int64)
    done = 0
    bar = tqdm(total=len(texts), desc=f"tokenizing {description}", unit=" texts", delay=2, leave=False)
    with bar, open(os.path.join(unfinished, "ids.bin"), "wb") as file:
        for encoded in _encoded(texts, encode):
            lengths[done : done + len(encoded)] = [len(ids) for ids in encoded]
            file.write(np.fromiter(chain.from_iterable(encoded), np.int32).tobytes())
            done += len(encoded)
            bar.update(len(encoded))
    np.save(os.path.join(unfinished, "offsets.npy"), np.concatenate(([0], lengths.cumsum())))


def _encoded(texts: Sequence[str], encode: Callable) -> Iterator[list[list[int]]]:
    """Yield the ids of block after block. While one block is in the library, Python is busy with another one.

    A block with texts of marked characters changes the library's settings, and so may the first one: these are alone.
    """
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(texts), BLOCK):
            block = texts[start : start + BLOCK]
            is_alone = not start or any(LITERAL in text for text in block)
            while pending and (is_alone or len(pending) > AT_ONCE):
                yield pending.popleft().result()
            if is_alone:
                yield encode(block)
            else:
                pending.append(pool.submit(encode, block))
        while pending:
            yield pending.popleft().result()
