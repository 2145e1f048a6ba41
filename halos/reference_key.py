"""The key of a reference model: a hash of its weights, architecture and dtype, and of the engine's version.

How a batch is run does not count: packed or padded, its size, the number of ranks, the chunks of the head. It changes
log-probs by rounding only. Change ENGINE_VERSION when the engine computes another number.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from omegaconf import DictConfig

from halos import loading, locks, positions
from halos.files import finished

ENGINE_VERSION = 1
FILES = "files.json"  # hashes of files that have been read, so that the next run need not read them

# Fields of a model's config that do not change what it computes.
NO_MATTER = "_name_or_path architectures dtype torch_dtype transformers_version use_cache".split()


def of_run(config: DictConfig, device: torch.device) -> str | None:
    """Return the key of the run's reference model; None if the files with its weights are unknown."""
    files = loading.weights_of_run(config)
    if files is None:
        return None
    root = folder(config)
    os.makedirs(root, exist_ok=True)
    lm_config = loading.load_config(config)
    is_fixed = positions.is_fixed(lm_config, config.model.max_length)
    parts = {
        "engine": ENGINE_VERSION,
        "weights": hashes(files, os.path.join(root, FILES)) if files else _random(config),
        "architecture": {name: value for name, value in lm_config.to_dict().items() if name not in NO_MATTER},
        "code": getattr(lm_config, "_commit_hash", None) if config.trust_remote_code else None,
        "rotary_length": config.model.max_length if is_fixed else None,
        "dtype": _dtype(config, device),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _dtype(config: DictConfig, device: torch.device) -> str:
    """Return the dtype of the reference. A base that an adapter is on may be rounded before it computes in float32."""
    dtype, stored = loading.reference_dtype(config, device), loading.policy_dtype(config)
    rounds = config.model.use_peft and stored not in (torch.float32, dtype)
    return f"{dtype} from {stored}" if rounds else str(dtype)


def folder(config: DictConfig) -> str:
    return os.path.join(config.cache_dir, ".logps")


def _random(config: DictConfig) -> list[Any]:
    """Return what random weights depend on, besides the architecture."""
    return [config.seed, torch.__version__, transformers.__version__]


def hashes(files: list[str], path: str) -> list[str]:
    """Return the hash of each file's content, from the table at `path` if the file is as it was then.

    A file counts as unchanged if its size, its times, and its inode are the same.
    """
    known = _read(path)
    status = [_status(file) for file in files]
    entries = [known.get(os.path.realpath(file)) for file in files]
    changed = [
        file for file, now, entry in zip(files, status, entries, strict=True) if not entry or entry["status"] != now
    ]
    if changed:
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(changed, pool.map(_hash, changed), strict=True))
        with locks.take(path, on_wait=lambda who: None):
            known = _read(path)
            for file, now in zip(files, status, strict=True):
                if file in digests:
                    known[os.path.realpath(file)] = {"status": now, "hash": digests[file]}
            with finished(path) as unfinished, open(unfinished, "w", encoding="utf-8") as opened:
                json.dump(known, opened, indent=1)
    return [known[os.path.realpath(file)]["hash"] for file in files]


def _read(path: str) -> dict[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        return {name: {"status": entry["status"], "hash": entry["hash"]} for name, entry in known.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # there is none, or it is damaged: the files are read again


def _status(file: str) -> list[int]:
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hash(file: str) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:40]
