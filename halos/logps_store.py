"""Per-token log-probs of responses on disk, memory-mapped, each under an address that its content determines.

A store is a directory of segments, which are written whole and never changed: three arrays and a manifest. Several
processes can add segments at the same time. An entry that two of them have added is harmless, since both are the same.
A segment whose checksum is wrong is removed, and its entries count as missing.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator

import numpy as np

from halos import locks, manifest
from halos.files import OLD, UNFINISHED
from halos.tokens import TokenizedExample

ADDRESS = np.dtype("V16")  # of a response: a hash of the token ids of its prompt and of its own, and of what is trained


def addresses(example: TokenizedExample) -> Iterator[bytes]:
    """Yield the address of each response of an example."""
    prompt = hashlib.blake2b(digest_size=ADDRESS.itemsize)
    _update(prompt, example.prompt)
    for response, mask in zip(example.responses, example.masks, strict=True):
        digest = prompt.copy()
        _update(digest, response)
        if mask is not None and not mask.all():
            digest.update(np.packbits(mask).tobytes())
        yield digest.digest()


def addresses_of_ids(prompt: np.ndarray, responses: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Yield the same for the ids of a prompt and of responses of which all tokens are trained on."""
    shared = hashlib.blake2b(digest_size=ADDRESS.itemsize)
    _update(shared, prompt)
    for response in responses:
        digest = shared.copy()
        _update(digest, response)
        yield digest.digest()


def _update(digest, ids: np.ndarray) -> None:
    digest.update(len(ids).to_bytes(8, "little"))  # so that the end of one text cannot count as the start of the next
    digest.update(np.ascontiguousarray(ids, np.int32))


def segments(directory: str) -> list[str]:
    """Return the names of the whole segments. Segments that are damaged are removed."""
    if not os.path.isdir(directory):
        return []
    manifest.remove_leftovers(directory)
    names = sorted(
        name for name in os.listdir(directory) if not name.startswith(".") and not name.endswith((UNFINISHED, OLD))
    )
    return [name for name in names if _is_whole(os.path.join(directory, name))]


def _is_whole(segment: str) -> bool:
    try:
        manifest.check(segment)
    except manifest.Damaged as damage:
        print(f"{damage}; the reference log-probs of this segment are computed again", flush=True)
        shutil.rmtree(segment, ignore_errors=True)
        return False
    return True


def add_segment(directory: str, addresses: bytes, logps: list[np.ndarray]) -> str:
    """Write entries, and return the name of their segment.

    addresses: those of all entries, one after the other
    logps: (n,) float32 of each entry
    """
    path = os.path.join(directory, uuid.uuid4().hex)
    with locks.take(path), manifest.written(path) as unfinished:
        np.save(os.path.join(unfinished, "addresses.npy"), np.frombuffer(addresses, ADDRESS))
        np.save(os.path.join(unfinished, "offsets.npy"), np.cumsum([0, *map(len, logps)]))
        np.concatenate(logps).astype(np.float32).tofile(os.path.join(unfinished, "logps.bin"))
    return os.path.basename(path)


class LogpsStore:
    """The entries of some segments. `store[i]` is the (n,) float32 array of entry i, and `find` says which one to read.

    In memory are 28 bytes per entry: its address, where it starts, and its length.
    """

    def __init__(self, directory: str, names: list[str]):
        self.directory = directory
        paths = [os.path.join(directory, name) for name in names]
        addresses = [np.load(os.path.join(path, "addresses.npy")) for path in paths]
        offsets = [np.load(os.path.join(path, "offsets.npy")) for path in paths]
        self.logps = [np.memmap(os.path.join(path, "logps.bin"), np.float32, mode="r") for path in paths]
        self.bases = np.cumsum([0, *map(len, self.logps)])  # where each segment starts among all log-probs
        starts = [base + own[:-1] for base, own in zip(self.bases, offsets, strict=False)]
        everything = np.concatenate([np.empty(0, ADDRESS), *addresses])
        order = np.argsort(everything)
        self.addresses = everything[order]
        self.starts = np.concatenate([np.empty(0, np.int64), *starts])[order]
        self.lengths = np.concatenate([np.empty(0, np.int32), *map(np.diff, offsets)]).astype(np.int32)[order]

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, entry: int) -> np.ndarray:
        start = self.starts[entry]
        segment = int(np.searchsorted(self.bases, start, side="right")) - 1
        start -= self.bases[segment]
        return self.logps[segment][start : start + self.lengths[entry]]

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Return the entry of each address, and -1 for those that the store does not have."""
        if not len(self):
            return np.full(len(addresses), -1)
        entries = np.searchsorted(self.addresses, addresses).clip(max=len(self) - 1)
        return np.where(self.addresses[entries] == addresses, entries, -1)
