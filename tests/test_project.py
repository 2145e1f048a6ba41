"""The structure of the project: which file may import which, and lists that must agree."""

import ast
import glob
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from helpers import PROJECT


def imports_of(path: str) -> set[str]:
    """Return the full names of the modules that a file imports, also inside functions.

    `from halos import errors` imports `halos.errors`.
    """
    with open(path) as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "halos":
            names |= {f"halos.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def rooms(pattern: str = "**/*.py") -> list[str]:
    return glob.glob(os.path.join(PROJECT, "halos", pattern), recursive=True)


def test_halos_never_imports_what_researchers_edit():
    assert len(rooms()) > 40
    for path in rooms():
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"trainers", "dataloaders", "utils", "train", "eval", "compare"}, path


@pytest.mark.parametrize("wing", ["judge", "plan", "inspection", "suite", "loss_card"])
def test_the_engine_never_imports_a_wing(wing):
    for path in rooms("*.py"):
        assert not [name for name in imports_of(path) if name.startswith(f"halos.{wing}")], path


def test_the_judge_imports_little_of_the_engine():
    """The judge imports only these files of halos, so it works in an environment without torch."""
    allowed = {"halos.errors", "halos.files", "halos.datafiles", "halos.secrets", "halos.pictures"}
    for path in rooms("judge/*.py"):
        others = {name for name in imports_of(path) if name.startswith("halos.") and not name.startswith("halos.judge")}
        assert others <= allowed, path


def test_the_map_names_every_room():
    """halos/__init__.py has one line for each file of halos/, and so has the __init__.py of each wing."""
    for folder in ("", "judge/", "plan/", "inspection/", "suite/", "loss_card/"):
        found = {os.path.basename(path) for path in rooms(f"{folder}*.py")} - {"__init__.py"}
        with open(os.path.join(PROJECT, "halos", folder, "__init__.py")) as file:
            named = re.findall(r"^ *(\w+\.py|\w+/) +\S", ast.get_docstring(ast.parse(file.read()), clean=False), re.M)
        assert len(named) == len(set(named)) and found == {name for name in named if name.endswith(".py")}, folder


def test_few_files_touch_torch_distributed():
    for path in [*rooms("*.py"), os.path.join(PROJECT, "trainers.py")]:
        if os.path.basename(path) not in ("distributed.py", "launch.py", "sharding.py", "states.py", "watching.py"):
            with open(path) as file:
                assert "torch.distributed" not in file.read(), path


def test_environment_yml_and_pyproject_list_the_same():
    with open(os.path.join(PROJECT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    with open(os.path.join(PROJECT, "environment.yml")) as file:
        conda = yaml.safe_load(file)["dependencies"]
    assert conda[-1]["pip"] == project["dependencies"]
    assert f"python{project['requires-python']}" == conda[0]


def test_the_lock_holds_every_dependency_and_torch_comes_first():
    with open(os.path.join(PROJECT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    with open(os.path.join(PROJECT, "requirements.lock")) as file:
        pins = [line.strip() for line in file if not line.startswith("#")]
    assert pins[0].startswith("torch==") and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    locked = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split("[><=]", name)[0] for name in wanted} <= locked


def test_an_image_leaves_out_what_git_ignores():
    """Runs, caches and environments of a clone are not copied into a container."""

    def patterns(name: str) -> set[str]:
        with open(os.path.join(PROJECT, name)) as file:
            return {line.strip().removeprefix("**/").strip("/") for line in file if line.strip() and line[0] != "#"}

    assert patterns(".gitignore") | {".git"} <= patterns(".dockerignore")


def test_help_imports_neither_torch_nor_transformers():
    """`--help` imports neither torch nor transformers, which makes it fast."""
    code = (
        "import sys, train; sys.argv = ['train.py', '--help']\n"
        "try: train.main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'transformers', 'datasets', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert "Align a language model" in done.stdout and "loaded: []" in done.stdout, done.stdout + done.stderr


def test_what_a_run_imports_before_it_needs_it():
    """Libraries that a run may not need are imported where they are used: they made each start seconds slower.

    What was imported is not searched for garbage again: `gc.freeze` has taken it.
    """
    code = (
        "import gc, sys\n"
        "from halos.commands import importing\n"
        "with importing():\n"
        "    import dataloaders, trainers\n"
        "    from halos import checkpoint, launch, loading, reference_cache, resume, run_dir, samplers, states\n"
        "late = {'matplotlib', 'wandb', 'datasets', 'openai', 'pandas', 'pyarrow', 'sklearn', 'vllm'}\n"
        "print(sorted(late & set(sys.modules)), gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "[] True True", done.stdout + done.stderr
