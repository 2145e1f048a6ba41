"""The commands of a suite as text, to be run on other machines or submitted to a cluster.

They are those that the suite itself runs, in an order in which each finds what it starts from. Where several settings
are tried, these are the commands of the first one.
"""

import shlex

from halos.suite import plan
from halos.suite.plan import Run
from halos.suite.settings import Suite

LAUNCHER = "hydra/launcher="


def as_text(suite: Suite, words: list[str], formats: dict[str, str]) -> str:
    """Return all commands, one a line.

    words: of the command of this suite; one that names a launcher of Hydra makes each line of training a sweep over
        seeds, which submits them all
    """
    command = shlex.join(["python", "scripts/suite.py", *(word for word in words if not is_of_launcher(word))])
    launcher = [word for word in suite.words if is_of_launcher(word)]
    parts = ["# The prompts, which are the same for all", command.replace("suite.py", "suite.py --prompts", 1)]
    bases = [run for size in suite.sizes if (run := plan.base_run(suite, size))]
    parts += ["# What all rows start from", *trained(suite, bases, formats)] if bases else []
    for level in range(1 + max(row.count("+") for row in suite.rows)):
        rows = tuple(row for row in suite.rows if row.count("+") == level)
        parts.append(f"# {', '.join(rows)}".upper() + (", when the runs above have ended" if level else ""))
        runs = [run for run in all_runs(suite) if run.row in rows]
        first = [run for run in runs if run.seed == 1]
        parts += [swept(suite, run, formats, launcher) for run in first] if launcher else trained(suite, runs, formats)
    parts.append("# Samples and judgments")
    for run in all_runs(suite):
        parts.append(line("eval.py", plan.sample_words(suite, run)))
        parts += [line("compare.py", plan.judge_words(suite, run))] if suite.judge is not None else []
    return "\n".join([*parts, "# The table and the picture, of what the lines above have left", command])


def all_runs(suite: Suite) -> list[Run]:
    """Return the runs of the comparison, with the first setting that is tried."""
    settings, seeds = plan.first_settings(suite), range(1, suite.seeds + 1)
    return [run for size in suite.sizes for run in plan.final_runs(suite, size, seeds, settings)]


def trained(suite: Suite, runs: list[Run], formats: dict[str, str]) -> list[str]:
    return [line("train.py", plan.train_words(suite, run, formats)) for run in runs]


def swept(suite: Suite, run: Run, formats: dict[str, str], launcher: list[str]) -> str:
    """Return the sweep over all seeds of the row of a run whose seed is 1."""
    seeds = ",".join(map(str, range(1, suite.seeds + 1)))
    words = [
        word.replace(plan.name_of_seed(1), plan.name_of_seed("${seed}")) if word.startswith(NAMES) else word
        for word in plan.train_words(suite, run, formats)
        if not is_of_launcher(word)
    ]
    words[words.index("seed=1")] = f"seed={seeds}"
    return line("train.py", ["-m", *launcher, *words])


NAMES = ("exp_name=", "model.load_from=")


def is_of_launcher(word: str) -> bool:
    return word.startswith((LAUNCHER, "hydra.launcher."))


def line(program: str, words: list[str]) -> str:
    return shlex.join(["python", program, *words])
