"""The pages of docs/: their files are written, their commands are run, and the site links to what exists."""

import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import yaml

from helpers import PROJECT, clone
from test_readme import BLOCK

HOOK = os.path.join(PROJECT, "scripts", "docs_hook.py")


def page(name: str) -> str:
    with open(os.path.join(PROJECT, "docs", name), encoding="utf-8") as file:
        return file.read()


PAGES = ("add_dataset.md", "add_loader.md", "add_model.md")
# Runs each argument, `python SCRIPT WORDS`, in this one process, which imports torch once.
RUN_ALL = """
import runpy, shlex, sys
from hydra.core.global_hydra import GlobalHydra
for line in sys.argv[1:]:
    print("$", line, flush=True)
    sys.argv = shlex.split(line)[1:]
    GlobalHydra.instance().clear()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""


def write_files(name: str, copy) -> list[str]:
    """Write the files of a page into a copy of the project, and return its commands.

    What a page says of dataloaders.py goes to its end.
    """
    lines = []
    for kind, text in BLOCK.findall(page(name)):
        if kind in ("run", "parse"):
            lines += [line + (" --cfg job" if kind == "parse" else "") for line in text.splitlines()]
        else:
            with open(copy / kind, "a" if kind.endswith(".py") else "x", encoding="utf-8") as file:
                file.write(f"\n\n{text}")
    return lines


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """Follow all pages in one copy of the project: command -> what it printed."""
    copy = clone(tmp_path_factory.mktemp("project"))
    lines = [line for name in PAGES for line in write_files(name, copy)]
    done = subprocess.run([sys.executable, "-c", RUN_ALL, *lines], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [part.partition("\n") for part in ("\n" + done.stdout).split("\n$ ")[1:]]
    assert [line for line, _, _ in parts] == lines
    return {line: output for line, _, output in parts}


def output_of(outputs: dict[str, str], *words: str) -> str:
    (found,) = [output for line, output in outputs.items() if all(word in line.split() for word in words)]
    return found


def test_add_a_dataset(outputs):
    """Of four training rows, the YAML drops one in another language, and the reader one with fewer than two votes."""
    train, test = output_of(outputs, "scripts/inspect_data.py").split("\ntest: ")
    for name, reason in {"debates": "not in keep.where", "votes": "fewer than 2 votes"}.items():
        assert re.search(rf"  {name}: 4 rows read, 3 examples, .* dropped: 1 {reason}", train), train
        assert re.search(rf"  {name}: \d rows read, 1 examples", test), test


def test_add_a_loader(outputs):
    """The prompt with two pairs has one row, too."""
    assert "train OnePairDataLoader: 2 rows per epoch" in output_of(outputs, "loss.dataloader=OnePairDataLoader")


def test_add_a_model(outputs):
    trained = output_of(outputs, "model=small_neox")
    assert "GPTNeoXForCausalLM" in trained and "packed (packed and padded" in trained
    assert "name_or_path: Qwen/Qwen2.5-0.5B" in output_of(outputs, "model=qwen")
    assert "name_or_path: /data/mine" in output_of(outputs, "model=base_model")


#### THE SITE


@pytest.fixture
def hook() -> ModuleType:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    spec = importlib.util.spec_from_file_location("docs_hook", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_site(hook):
    link = hook.site_link
    assert link("../trainers.py", "docs", "R") == "R/trainers.py"
    assert link("../assets/growth.png", "docs", "R") == link("assets/growth.png", "", "R") == "assets/growth.png"
    assert link("assets/lm_eval/halos_demo.yaml", "", "R") == "R/assets/lm_eval/halos_demo.yaml"
    assert link("docs/data.md", "", "R") == link("data.md", "docs", "R") == "data.md"
    assert link("../README.md", "docs", "R") == "index.md" and link("../LOG.md", "docs", "R") == "log.md"
    text = "[a](../x.py) ![b](../assets/c.png) [d](data.md#e) [f](https://g.h) [i](#j)"
    found = hook.LINK.findall(text)
    assert found == ["../x.py", "../assets/c.png", "data.md"]


def test_every_page_is_in_the_navigation(hook):
    """The build fails for a page that the navigation does not name; so does this test, in less time."""
    with open(os.path.join(PROJECT, "mkdocs.yml")) as file:
        named = set(re.findall(r"[\w]+\.md", yaml.safe_dump(yaml.safe_load(file)["nav"])))
    assert named == set(os.listdir(os.path.join(PROJECT, "docs"))) | set(hook.PAGES)


def test_the_site_is_built_without_a_warning(hook, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "index.html", encoding="utf-8") as file:
        assert "Pretend that KTO is missing" in file.read()
