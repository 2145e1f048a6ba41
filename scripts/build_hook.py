"""Hatchling's hook for the wheel: puts the project's scripts, what researchers edit, config/ and assets/ into
halos/project/.

They are top-level modules and folders in a clone. In an environment, names such as `utils` and `config` belong to
everybody. An editable install needs no copy: halos/project_dir.py finds the clone.
"""

from glob import glob
from os.path import basename, join
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("config", "assets", "losses")


def inclusions(root: str) -> dict[str, str]:
    """{path in the clone: path in the wheel}. Every module of the root is taken: trainers.py may import new ones."""
    paths = [*glob(join(root, "*.py")), *(join(root, folder) for folder in FOLDERS)]
    return {path: f"halos/project/{basename(path)}" for path in sorted(paths)}


class ProjectFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"].update(inclusions(self.root))
