"""Settings of a suite: a YAML of settings/ and the words of the command."""

import os
from dataclasses import dataclass
from typing import Any

import yaml

from halos.commands import whole_number
from halos.errors import UserError, did_you_mean
from halos.project_dir import PROJECT

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "settings")
KEYS = ("losses sizes base words sft responses_per_update tries n_samples n_tuning_samples n_pairs truth judge").split()


@dataclass(frozen=True)
class Suite:
    """The settings of a suite. The keys of the YAML are explained in settings/tiny.yaml.

    rows: sft, kto, sft+kto: the losses of the stages of a run, joined by plus signs
    seeds: 1 .. n; seed 0 is for tuning
    sizes: name -> words of every training command
    aa: a row that is trained with twice as many seeds, for the A/A run, or None
    out: directory of the runs and of the results
    """

    rows: tuple[str, ...]
    seeds: int
    sizes: dict[str, list[str]]
    base: dict[str, Any] | None
    words: list[str]
    sft: list[str]
    responses_per_update: int
    tries: dict[str, dict[str, list]]
    n_samples: int
    n_tuning_samples: int
    n_pairs: int
    truth: str | None
    judge: list[str] | None
    aa: str | None
    out: str

    @property
    def losses(self) -> list[str]:
        """Names of config/loss, in the order of the rows."""
        return list(dict.fromkeys(loss for row in self.rows for loss in row.split("+")))

    @property
    def n_tries(self) -> int:
        """Number of settings that are tried for each row."""
        return sum(map(len, self.tries_of("sft").values()))

    def tries_of(self, row: str) -> dict[str, list]:
        return self.tries.get(loss_of(row), self.tries["other"])


def loss_of(row: str) -> str:
    """Return the loss of the last stage: kto of sft+kto."""
    return row.rpartition("+")[2]


def before(row: str) -> str:
    """Return the row that a row starts from: sft of sft+kto; '' for the base."""
    return row.rpartition("+")[0]


def stages_of(row: str) -> tuple[str, ...]:
    """Return the rows that a row passes through: sft and sft+kto for sft+kto."""
    losses = row.split("+")
    return tuple("+".join(losses[: n + 1]) for n in range(len(losses)))


def rows_of(losses: list[str]) -> tuple[str, ...]:
    """Return the rows for named losses: sft, each loss alone, and each after SFT; a name with a plus is one row."""
    alone = [name for name in losses if "+" not in name and name != "sft"]
    after = [name if "+" in name else f"sft+{name}" for name in losses if name != "sft"]
    starts = [before(name) for name in after]
    return tuple(dict.fromkeys(["sft", *alone, *starts, *after]))


def load(own: dict[str, str], others: list[str]) -> Suite:
    """Make the suite that the command describes. Raises UserError for what cannot be used.

    own: texts of the words of scripts/suite.py, '' where one is not given
    others: key=value words for every training command
    """
    model = own["model"]
    found = read(own["settings"] or (model if is_known(model) else "default"))
    rows = rows_of(names(own["losses"]) or found.pop("losses"))
    found.pop("losses", None)
    sizes = {size: [f"model={model}", *words] for size, words in (found["sizes"] or {model: []}).items()}
    chosen = {size: words_of_size(size, sizes) for size in names(own["sizes"]) or sizes}
    if own["aa"] and own["aa"] not in rows:
        raise UserError(f"aa={own['aa']} is not a row; {did_you_mean(own['aa'], rows)}")
    ours = {"rows": rows, "sizes": chosen, "words": [*found["words"], *others], "aa": own["aa"] or None}
    seeds = whole_number("seeds", own["seeds"], "5")
    suite = Suite(**{**found, **ours}, seeds=seeds, out=own["out"] or os.path.join(".cache", f"suite_{model}"))
    check_tries(suite)
    return suite


def read(name: str) -> dict[str, Any]:
    """Read settings by their name or path."""
    path = os.path.join(FOLDER, f"{name}.yaml") if is_known(name) else name
    if not os.path.isfile(path):
        known = [file.removesuffix(".yaml") for file in os.listdir(FOLDER)]
        raise UserError(f"settings={name}: there is no such file; {did_you_mean(name, known)}, or give a path")
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"settings={name}: {' '.join(str(error).split())}; correct the file") from None
    if not isinstance(found, dict) or set(found) != set(KEYS):
        wrong = ", ".join(sorted(set(KEYS) ^ set(found))) if isinstance(found, dict) else "all"
        raise UserError(f"settings={name}: these keys are missing or unknown: {wrong}; {FOLDER} has examples")
    return found


def is_known(name: str) -> bool:
    return os.path.isfile(os.path.join(FOLDER, f"{name}.yaml"))


def names(text: str) -> list[str]:
    """Return the names in a list as Hydra writes it: [dpo,kto] or dpo,kto."""
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def words_of_size(size: str, sizes: dict[str, list[str]]) -> list[str]:
    """Return the words of a size of the settings, or of a model in config/model."""
    if size in sizes:
        return sizes[size]
    models = [file.removesuffix(".yaml") for file in os.listdir(os.path.join(PROJECT, "config", "model"))]
    if size not in models:
        raise UserError(
            f"sizes=[{size}] is neither in the settings nor in config/model; {did_you_mean(size, [*sizes, *models])}"
        )
    return [f"model={size}"]


def check_tries(suite: Suite) -> None:
    """Raise UserError unless equally many settings are tried for each row."""
    counts = {row: sum(map(len, suite.tries_of(row).values())) for row in suite.rows}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{row}: {n}" for row, n in counts.items())
        raise UserError(f"tries: not equally many settings for each row ({told}); a comparison would favour some rows")
