"""What halos/judge/ may import, and what may import it; what importing it costs; modules of users called `judge`."""

import ast
import glob
import os
import subprocess
import sys

import pytest

from comparing import compare, results, rows_of, write_samples
from helpers import PROJECT

ALLOWED = {"errors", "files", "datafiles", "secrets", "pictures"}
SCRIPTS = ("train", "eval", "compare", "trainers", "dataloaders", "utils")
JUDGE = os.path.join(PROJECT, "halos", "judge")


def imports_of(path: str) -> set[str]:
    """List what a file imports from the project, inside functions as well, by full names: halos.files.finished, say."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("halos", *SCRIPTS)}


def files_of(*folders: str) -> list[str]:
    return [path for folder in folders for path in glob.glob(os.path.join(PROJECT, folder, "*.py"))]


def test_the_judge_imports_four_rooms_of_halos_and_its_own():
    paths = files_of("halos/judge")
    assert len(paths) > 15
    for path in paths:
        names = imports_of(path)
        assert all(name.startswith("halos.") for name in names), path
        assert {name.split(".")[1] for name in names} <= ALLOWED | {"judge"}, path


def test_nothing_else_of_halos_imports_the_judge():
    paths = [path for path in glob.glob(os.path.join(PROJECT, "halos", "**", "*.py"), recursive=True)]
    outside = [path for path in paths if not path.startswith(JUDGE)] + files_of("scripts")
    assert len(outside) > 15
    for path in [*outside, *(os.path.join(PROJECT, name) for name in ("train.py", "trainers.py", "dataloaders.py"))]:
        assert not any(name.split(".")[1:2] == ["judge"] for name in imports_of(path)), path


def test_imports_inside_functions_and_of_modules_are_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from halos.judge import chat\n    import halos.models\n")
    (tmp_path / "b.py").write_text("from halos import judge, files\nimport torch, trainers\n")
    assert imports_of(tmp_path / "a.py") == {"halos.judge.chat", "halos.models"}
    assert imports_of(tmp_path / "b.py") == {"halos.judge", "halos.files", "trainers"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import halos.judge", {"openai", "httpx2", "scipy", "matplotlib", "torch", "hydra", "pyarrow", "datasets"}),
        ("import compare", {"openai", "httpx2", "scipy", "matplotlib", "torch", "transformers"}),
    ],
)
def test_what_is_not_needed_yet_is_not_imported(code, absent):
    """These take most of a second together."""
    code += f"\nimport sys\nprint(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_public_names():
    """Those that docs/judging.md and users' templates, judges and notebooks name."""
    from halos.judge import PromptTemplate, Reply, Settings, Stop, Unanswerable, Unavailable, is_python, load_template
    from halos.judge import compare as compare_function

    named = (
        PromptTemplate,
        Reply,
        Settings,
        Stop,
        Unanswerable,
        Unavailable,
        compare_function,
        is_python,
        load_template,
    )
    assert all(map(callable, named))


def test_the_map_names_every_room():
    import halos.judge

    rooms = {os.path.basename(path) for path in files_of("halos/judge")} - {"__init__.py"}
    listed = {line.split()[0] for line in halos.judge.__doc__.splitlines() if line.startswith("    ")}
    assert listed == rooms


def test_a_module_of_the_user_called_judge_is_found(tmp_path):
    """And not the folder of the same name in halos; a template in it as well."""
    write_samples(tmp_path, 10)
    (tmp_path / "judge.py").write_text(
        "from halos.judge import PromptTemplate\n\n\n"
        "def longer(prompt, first, second):\n    return 1 if len(first) > len(second) else 2\n\n\n"
        "class Mine(PromptTemplate):\n    pass\n"
    )
    done = compare(tmp_path, "--judge", "judge:longer", "--template", "judge:Mine")
    assert done.returncode == 0, done.stderr
    (line,) = results(tmp_path)
    wins = sum(len(row["policy"]) > len(row["chosen"]) for row in rows_of(10))
    assert (line["judges"][0]["name"], line["wins"], line["losses"]) == ("judge:longer", wins, 10 - wins)
