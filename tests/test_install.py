"""The package as pip installs it: the files of a wheel, the project that a command runs, and the commands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from types import SimpleNamespace

import pytest

from halos import console
from halos.errors import UserError
from halos.metrics import read_metrics
from halos.project_dir import PROJECT, is_project
from helpers import ONE_BLOCK

# Modules that a wheel must not install at the top level.
TOP_LEVEL = ("train", "eval", "compare", "trainers", "dataloaders", "utils", "config", "assets", "tests", "scripts")
# Folders of a clone that a wheel leaves out.
LEFT_OUT = ("tests/", "benchmarks/", "docs/", "scripts/", ".ci/", ".github/")

SMALL = [*ONE_BLOCK, "n_examples=16"]


def load(path: str, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git clone, so that the project's files cannot be listed")
    return [path for path in listed.stdout.splitlines() if os.path.exists(os.path.join(PROJECT, path))]


def expected_in_wheel() -> set[str]:
    """Return the paths in a wheel of all tracked files that a run may need: modules, and folders not in LEFT_OUT."""
    files = [path for path in tracked_files() if not path.startswith(LEFT_OUT) and ("/" in path or path[-3:] == ".py")]
    return {path if path.startswith("halos/") else f"halos/project/{path}" for path in files}


#### THE FILES OF A WHEEL


def test_the_build_hook_takes_every_module_and_folder(monkeypatch):
    """The build hook includes every top-level module and folder. A new one that a wheel would lack fails this test."""
    plugin = SimpleNamespace(BuildHookInterface=object)  # the build backend is not installed where tests run
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", plugin)
    inclusions = load(os.path.join(PROJECT, "scripts", "build_hook.py"), "build_hook").inclusions(PROJECT)
    needed = {"/".join(path.split("/")[:3]) for path in expected_in_wheel() if path.startswith("halos/project/")}
    assert needed <= set(inclusions.values())
    assert all(os.path.exists(source) for source in inclusions)


def test_the_hook_and_the_commands_that_pyproject_names_exist():
    with open(os.path.join(PROJECT, "pyproject.toml"), "rb") as file:
        pyproject = tomllib.load(file)
    hook = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["path"]
    assert os.path.isfile(os.path.join(PROJECT, hook)) and os.path.isfile(os.path.join(PROJECT, "halos", "py.typed"))
    scripts = pyproject["project"]["scripts"]
    assert set(scripts) == {"halos-train", "halos-eval", "halos-compare"}
    assert all(callable(getattr(console, target.removeprefix("halos.console:"))) for target in scripts.values())


#### THE PROJECT DIRECTORY


def test_the_project_directory(tmp_path):
    """The project directory is the parent of halos/ in a clone, and halos/project/ in a wheel."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert root == PROJECT and is_project(PROJECT) and not is_project(str(tmp_path))
    (tmp_path / "halos").mkdir()
    copy = shutil.copy(os.path.join(PROJECT, "halos", "project_dir.py"), tmp_path / "halos")
    assert load(copy, "in_a_clone").PROJECT == str(tmp_path)
    (tmp_path / "halos" / "project").mkdir()
    assert load(copy, "in_a_wheel").PROJECT == str(tmp_path / "halos" / "project")


def test_a_command_runs_the_project_in_the_current_directory(tmp_path):
    """A directory with trainers.py, config/config.yaml and config/loss is a project; without the script it is refused.

    In any other directory, a command runs the installed project.
    """
    directory, installed = str(tmp_path), os.path.join(PROJECT, "train.py")
    assert console.script_path("train.py", directory) == installed
    (tmp_path / "trainers.py").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").touch()
    assert console.script_path("train.py", directory) == installed
    (tmp_path / "config" / "loss").mkdir()
    with pytest.raises(UserError, match="no train.py; copy .*train.py there"):
        console.script_path("train.py", directory)
    (tmp_path / "train.py").touch()
    assert console.script_path("train.py", directory) == str(tmp_path / "train.py")


#### INSTALLED COMMANDS (pip gets the build backend from the package index)


class Environment:
    """A virtual environment with the packages of the running one, into which pip installs the project."""

    def __init__(self, directory, *what: str):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        self.bin = directory / "bin"
        query = [self.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.packages = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
        real = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        with open(os.path.join(self.packages, "of_the_tests.pth"), "w") as file:
            file.write("\n".join(sorted(real)))
        pip("--python", str(self.bin / "python"), "install", "--no-deps", "--force-reinstall", *what)

    def run(self, command: str, *words: object, cwd, fails: bool = False) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
        line = [str(self.bin / command), *map(str, words)]
        done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> str:
    """The path of a wheel that pip builds in isolation, as for a user."""
    directory = tmp_path_factory.mktemp("wheel")
    with open(os.path.join(PROJECT, "pyproject.toml"), "rb") as file:
        requires = tomllib.load(file)["build-system"]["requires"]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "0", "-d", str(directory / "backend")]
    done = subprocess.run([*fetch, *requires], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the build backend cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    pip("wheel", "--quiet", "--no-deps", "-w", str(directory), PROJECT)
    (name,) = [name for name in os.listdir(directory) if name.endswith(".whl")]
    return str(directory / name)


@pytest.mark.slow
def test_a_wheel_contains_what_a_clone_has(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    assert expected_in_wheel() <= files
    assert {path.split("/")[0] for path in files if ".dist-info/" not in path} == {"halos"}


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_commands(wheel, tmp_path, editable):
    """Installed commands train in one directory as the clone's train.py does, and sample and compare in another."""
    environment = Environment(tmp_path / "venv", *(["-e", PROJECT] if editable else [wheel]))
    installed = {name for name in os.listdir(environment.packages) if name.endswith((".py", ".pth")) or "." not in name}
    wanted = {"_halos.pth"} if editable else {"halos"}
    assert installed - {"of_the_tests.pth", "__pycache__"} == wanted
    if not editable:
        find = f"from importlib.util import find_spec; print([name for name in {TOP_LEVEL} if find_spec(name)])"
        assert environment.run("python", "-c", find, cwd=tmp_path).strip() == "[]"

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    words = ["nproc_per_node=2", *SMALL]
    environment.run("halos-train", "exp_name=sft", *words, cwd=here)
    environment.run("python", os.path.join(PROJECT, "train.py"), "exp_name=own", *words, cwd=here)
    ours, theirs = (read_metrics(here / ".cache" / name / "metrics.jsonl") for name in ("own", "sft"))
    assert [row.get("loss/train") for row in ours] == [row.get("loss/train") for row in theirs] and len(ours) > 3
    load_from = ["loss=dpo", "exp_name=dpo", "model.load_from=sft/LATEST/policy.pt"]
    environment.run("halos-train", *load_from, *SMALL, cwd=here)

    config = here / ".cache" / "dpo" / "config.yaml"
    environment.run("halos-eval", "-c", config, "-m", "sample", "-n", "6", "-s", "false", cwd=there)
    environment.run("halos-eval", "-c", config, "-m", "eval", cwd=there)
    evaluated = json.loads((config.parent / "eval.json").read_text())["results"]
    assert evaluated["loss/eval"] == pytest.approx(read_metrics(config.parent / "metrics.jsonl")[-1]["loss/eval"])
    judge = ["--judge", "halos.demo:check", "--judge_kind", "score", "--report", "page.html"]
    environment.run("halos-compare", "-f", "samples/dpo.json", "-bk", "chosen", "-r", "r.jsonl", *judge, cwd=there)
    assert json.loads((there / "r.jsonl").read_text())["total"] == 6
    assert "<html" in (there / "page.html").read_text()


@pytest.mark.slow
def test_a_project_of_ones_own(wheel, tmp_path):
    """A loss that is added to a copy of the installed project is used by commands in that copy, in every process."""
    environment = Environment(tmp_path / "venv", wheel)
    mine = tmp_path / "mine"
    shutil.copytree(os.path.join(environment.packages, "halos", "project"), mine)
    with open(mine / "trainers.py", "a") as file:
        file.write("\n\nclass MineTrainer(SFTTrainer):\n    pass\n")
    loss = (mine / "config" / "loss" / "sft.yaml").read_text()
    (mine / "config" / "loss" / "mine.yaml").write_text(loss.replace("SFTTrainer", "MineTrainer"))
    words = ["loss=mine", "nproc_per_node=2", "exp_name=mine", *SMALL]
    environment.run("halos-train", *words, cwd=mine)
    assert "MineTrainer" in (mine / ".cache" / "mine" / "config.yaml").read_text()
    assert "loss=mine: there is no" in environment.run("halos-train", *words, cwd=tmp_path, fails=True)
    os.remove(mine / "eval.py")
    message = environment.run("halos-eval", "-c", ".cache/mine/config.yaml", cwd=mine, fails=True)
    assert message.startswith("error: ") and "no eval.py; copy " in message
