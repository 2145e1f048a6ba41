"""Memory and open files over many steps, and how long training waits while a state is saved."""

import os
import statistics
import tempfile
import time

import torch

from benchmarks.campaign import forks, runs
from benchmarks.workload import llama
from halos.models import PolicyModel
from halos.states import StateWriter

STEPS = 3000
WARM = 500  # the step after which memory should no longer grow


def memory_and_files(train, folder: str, steps: int = STEPS, warm: int = WARM) -> dict[int, tuple[float, int]]:
    """Train for many steps, with a state and an evaluation every 100. Returns step -> (resident MB, open files)."""
    often = [f"n_examples={8 * steps}", "n_epochs=null", "eval_every=800", "save_every=800"]
    words = runs.words_of(folder, "kto", *often, "intermediate_checkpoints=false")
    child = forks.start(train, words, folder)
    found: dict[int, tuple[float, int]] = {}
    wanted = sorted({warm, *range(500, steps, 500), steps - 5})
    while child.is_alive() and wanted:
        if _rows(folder) >= wanted[0]:
            found[wanted.pop(0)] = _resident(child.pid), len(os.listdir(f"/proc/{child.pid}/fd"))
        time.sleep(0.02)
    ended = child.wait(600)
    assert ended.code == 0, ended.err[-2000:]
    return found


def _rows(folder: str) -> int:
    path = os.path.join(folder, "run", "metrics.jsonl")
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 2000))
        lines = file.read().split(b"\n")[:-1]
    return max((int(line.split(b'"step": ')[1].split(b",")[0]) for line in lines if b'"step": ' in line), default=0)


def _resident(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def models(path: str | None) -> dict[str, PolicyModel]:
    """The models whose states are timed. path: of a real one"""
    found = {"tiny": llama(192, 3, 576), "35M": llama()}
    if path:
        from transformers import AutoModelForCausalLM

        found[os.path.basename(path)] = PolicyModel(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    return found


def stalls(policy: PolicyModel, n: int = 7) -> tuple[float, float, int]:
    """Milliseconds that training waits for a state: written in the background, and waited for; and its bytes."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        writer = StateWriter(folder, keep=2)
        for step in range(2 * n):
            started = time.perf_counter()
            writer.write(policy, optimizer, {"updates": step})
            if step % 2:
                writer.wait()
            times[bool(step % 2)].append(1000 * (time.perf_counter() - started))
            writer.wait()
        writer.close()
        newest = runs.states.complete(folder)[0]
        size = sum(os.path.getsize(os.path.join(newest, name)) for name in os.listdir(newest))
    return statistics.median(times[False][1:]), statistics.median(times[True][1:]), size
