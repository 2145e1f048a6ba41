"""README.md, word for word: its files are written, its commands are run, and their results are as it says."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from halos.metrics import read_metrics
from halos.plan.hardware import hardware
from halos.plan.table import MODELS
from helpers import CONFIG_DIR, PROJECT, clone

BLOCK = re.compile(r"<!-- test: (.+?) -->\n```\w*\n(.*?)```", re.DOTALL)


def blocks(kind: str) -> list[str]:
    with open(os.path.join(PROJECT, "README.md"), encoding="utf-8") as file:
        return [text for name, text in BLOCK.findall(file.read()) if name == kind]


def commands(kind: str) -> list[str]:
    """Return the commands in all blocks of a kind. A backslash continues a command in the next line."""
    return [line for block in blocks(kind) for line in block.replace("\\\n", "").splitlines() if line.strip()]


def python(line: str, cwd) -> subprocess.CompletedProcess:
    """Run `python ...` as a user types it."""
    program, *words = shlex.split(line, comments=True)
    assert program == "python"
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project from which KTO is removed, and then added as in the README."""
    copy = clone(tmp_path_factory.mktemp("project"))
    trainers = (copy / "trainers.py").read_text()
    start = trainers.index("class KTOTrainer")
    end = trainers.find("\nclass ", start) + 1 or len(trainers)
    without = trainers[:start].rstrip() + "\n\n\n" + trainers[end:]
    (copy / "trainers.py").write_text(without)
    os.remove(copy / "config" / "loss" / "kto.yaml")
    gone = python("python train.py loss=kto", copy)
    assert gone.returncode == 2 and "kto" in gone.stderr
    (copy / "trainers.py").write_text(without + "\n\n" + blocks("trainers.py")[0])
    (copy / "config" / "loss" / "kto.yaml").write_text(blocks("config/loss/kto.yaml")[0])
    for name in ("pairs.jsonl", "feedback.jsonl"):
        (copy / name).write_text(blocks(name)[0])
    return copy


def test_every_command_that_needs_no_gpu_runs(checkout):
    """All commands for a CPU run. The README's KTO has the same training losses as the project's own, bit by bit."""
    lines = commands("run")
    assert len(lines) >= 5
    for line in lines:
        done = python(line, checkout)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert len(json.loads((checkout / "samples" / "kto_tiny.json").read_text())) == 64
    assert json.loads((checkout / "result.jsonl").read_text())["total"] == 64
    assert {"eval.json", "curves.png", "LATEST"} <= set(os.listdir(checkout / ".cache" / "kto_tiny"))

    own = python(f"python {PROJECT}/train.py loss=kto n_examples=1280 exp_name=own", checkout)
    assert own.returncode == 0, own.stderr
    ours, theirs = (read_metrics(checkout / ".cache" / name / "metrics.jsonl") for name in ("own", "kto_tiny"))
    assert [row.get("loss/train") for row in ours] == [row.get("loss/train") for row in theirs]


def test_commands_for_gpus_parse_and_mean_what_they_say(checkout):
    lines = commands("parse")
    shown = [python(line + " --cfg job", checkout) for line in lines]
    assert all(done.returncode == 0 for done in shown), shown
    assert "name_or_path: huggyllama/llama-7b" in shown[0].stdout and "cache_dir: /data/models" in shown[0].stdout
    assert "name_or_path: Qwen/Qwen2.5-0.5B" in shown[1].stdout


def hardware_in_readme() -> list[str]:
    with open(os.path.join(PROJECT, "README.md"), encoding="utf-8") as file:
        table = file.read().partition("<!-- table: python scripts/plan.py hardware -->\n")[2]
    return table.partition("\n\n")[0].splitlines()


def test_hardware_is_what_the_planner_says_today():
    """The first rows of two families; `-m slow` compares all of them."""
    models = ("pythia1-4b", "llama7b")
    head, rule, *rows = hardware_in_readme()
    assert hardware(CONFIG_DIR, models).splitlines() == [head, rule, rows[0], rows[MODELS.index("llama7b")]]
    assert len(rows) == len(MODELS)


@pytest.mark.slow
def test_all_hardware_is_what_the_planner_says_today():
    assert hardware(CONFIG_DIR).splitlines() == hardware_in_readme()


def pages() -> list[str]:
    return [
        "README.md",
        "LOG.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{name}" for name in sorted(os.listdir(os.path.join(PROJECT, "docs")))),
    ]


@pytest.mark.parametrize("name", pages())
def test_a_page_is_finished(name):
    """No placeholder for a measurement is left, every linked file exists, and lines have at most 120 characters."""
    with open(os.path.join(PROJECT, name), encoding="utf-8") as file:
        text = file.read()
    assert "@@" not in text
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert os.path.exists(os.path.join(PROJECT, os.path.dirname(name), target)), target
    is_written = "<!-- written by" in text  # a table of numbers
    assert [line for line in text.splitlines() if len(line) > 120 and not is_written] == []
