"""The project directory: where the scripts, trainers.py, dataloaders.py, utils.py, config/ and assets/ are.

In a clone, and after `pip install -e .`, it is the directory that contains halos/. A wheel has a copy of those files in
halos/project/ (scripts/build_hook.py puts it there), so that `halos` is the only top-level name that it installs.
"""

import os

_HALOS = os.path.dirname(os.path.abspath(__file__))
_IN_WHEEL = os.path.join(_HALOS, "project")

PROJECT = _IN_WHEEL if os.path.isdir(_IN_WHEEL) else os.path.dirname(_HALOS)


# A directory that contains these is a project. They are files that a researcher edits.
MARKS = ("trainers.py", "config/config.yaml", "config/loss")


def is_project(directory: str) -> bool:
    return all(os.path.exists(os.path.join(directory, mark)) for mark in MARKS)
