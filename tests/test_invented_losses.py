"""The five losses of docs/losses.md, added to a copy of the project word for word, pass the project's generic tests.

The tests that run there are unchanged: they find the losses in config/loss/.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PROJECT, clone

BLOCK = re.compile(r"<!-- (\S+?)(?:: (\w+))? -->\n```\w*\n(.*?)```", re.DOTALL)
NAMES = ("exo", "cpo", "length_dpo", "clipped_dpo", "logistic_kto")


def blocks() -> list[tuple[str, str, str]]:
    """Return (file, loss, text) of each code block of the page that names a file."""
    text = (Path(PROJECT) / "docs" / "losses.md").read_text(encoding="utf-8")
    return [(file, loss or Path(file).stem, content) for file, loss, content in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with the losses of the page."""
    copy = clone(tmp_path_factory.mktemp("project"))
    for file, _, content in blocks():
        with open(copy / file, "a", encoding="utf-8") as out:
            out.write(content if file.endswith(".yaml") else f"\n\n{content}")
    return copy


def pytest_in(copy, *words: str) -> str:
    """Run pytest in the copy, on tests of the five losses only, and return its last line."""
    selected = " or ".join(NAMES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def passed(summary: str) -> int:
    return int(re.search(r"(\d+) passed", summary)[1])


def test_each_is_one_yaml_and_one_short_class():
    """Each loss is one YAML file and a class of at most 15 lines; a loader has at most 12. No other file changes."""
    found = {}
    for file, loss, content in blocks():
        found.setdefault(file.split("/")[0], {})[loss] = len(content.splitlines())
    assert set(found) == {"config", "trainers.py", "dataloaders.py"}
    assert set(found["trainers.py"]) == set(found["config"]) == set(NAMES)
    assert max(found["trainers.py"].values()) <= 15 and max(found["dataloaders.py"].values()) <= 12


def test_the_generic_tests_pick_them_up(extended):
    """The generic tests pass for each: as plain functions, packed = padded, one forward pass = several, resuming."""
    files = ("tests/test_loss_card.py", "tests/test_losses.py", "tests/test_training.py", "tests/test_engine.py")
    assert passed(pytest_in(extended, *files)) >= 4 * len(NAMES)


@pytest.mark.slow
def test_they_train_alike_on_any_number_of_processes(extended):
    """Each loss trains on 2, 3 and 4 processes as on one."""
    assert passed(pytest_in(extended, "-m", "slow or not slow", "tests/test_distributed.py")) >= 3 * len(NAMES)


def test_their_runs_by_command(extended, tmp_path):
    """`python train.py loss=logistic_kto` trains on the demo data; a value outside a loss's rules is one error line."""
    words = ["loss=logistic_kto", "n_examples=64", "n_eval_examples=32", f"cache_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0 and "kl_eval/unrelated" in done.stderr + done.stdout, done.stderr
    assert os.path.exists(tmp_path / "logistic_kto_tiny" / "LATEST" / "policy.pt")
    done = subprocess.run([sys.executable, "train.py", "loss=cpo", "loss.beta=-1"], cwd=extended, capture_output=True)
    assert done.returncode == 2 and done.stderr == b"error: loss.beta=-1 must be a number above 0\n"
