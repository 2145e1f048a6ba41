"""The console commands of an installed package: halos-train, halos-eval and halos-compare.

`halos-train ARGS` runs `python train.py ARGS`. If the current directory is a project (`project_dir.is_project`), its
train.py runs; otherwise the installed one. A researcher who edits trainers.py and config/ in a directory wants to train
with those files, even if another copy is installed. The installed copy would silently use another loss. Parent
directories are not searched.

The command replaces its process with a new interpreter that runs the script, so everything works as in a clone: the
script's directory comes first on sys.path, in this process and in the workers that it launches. If that directory
contains halos/, as a clone does, it is imported; otherwise the installed one is.
"""

import os
import sys
from typing import NoReturn

from halos.errors import UserError
from halos.project_dir import PROJECT, is_project


def train() -> NoReturn:
    _run("train.py")


def evaluate() -> NoReturn:
    _run("eval.py")


def compare() -> NoReturn:
    _run("compare.py")


def script_path(name: str, directory: str) -> str:
    """Return the path of the script that a command runs in a directory."""
    if not is_project(directory):
        return os.path.join(PROJECT, name)
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        raise UserError(
            f"{directory} has a trainers.py and a config/ of its own, but no {name}; "
            f"copy {os.path.join(PROJECT, name)} there, or run the command in another directory"
        )
    return path


def _run(name: str) -> NoReturn:
    try:
        path = script_path(name, os.getcwd())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    os.execv(sys.executable, [sys.executable, path, *sys.argv[1:]])
