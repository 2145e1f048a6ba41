"""The commands of an installed package: halos-train, halos-eval and halos-compare.

`halos-train WORDS` does what `python train.py WORDS` does, with the train.py of the project in the current directory if
that is one (`project_dir.is_project`), and with the installed one otherwise. A researcher who edits trainers.py and
config/ in a directory wants those to be trained with, although another copy is installed; ignoring them would train
another loss without a word. Only the current directory counts, not those above it.

The script starts in a new interpreter, exactly as a user would start it: its directory comes first on sys.path, in this
process and in the workers that it launches. A clone's own halos/ is therefore used, too; in a directory without halos/,
the installed one is.
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
    """The script that a command runs in a directory."""
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
