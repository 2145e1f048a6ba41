"""Settings of a comparison: one field per flag of compare.py, with its default, checked when they are made.

To add a flag: a field here (and its check, if it has one), and a line in compare.py. What can only be checked against
files, modules or the environment is checked where it is used: sample files in samples.py, judges in comparison.py,
addresses and keys in servers.py, paths of results in outputs.py.
"""

import math
import os
import re
from dataclasses import dataclass, fields
from types import UnionType

from halos.errors import UserError, did_you_mean

# A dated snapshot, so that numbers of different months can be compared.
DEFAULT_JUDGE = "gpt-5.4-mini-2026-03-17"
CHOICES = {"judge_kind": ("pairwise", "score"), "mode": ("json", "text", "logprob"), "order": ("both", "one")}
WHOLE = ("seed", "max_comp", "concurrency")
# Least and largest values that make sense. A call that waits longer than a day is a mistake.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (-math.inf, math.inf),
    "max_comp": (1, math.inf),
    "concurrency": (1, 4096),
    "sleep_time": (0, 86400),
    "rpm": (0.001, 1e9),
    "tpm": (1, 1e12),
    "timeout": (0.001, 86400),
    "max_cost": (1e-6, 1e9),
    "max_fail": (0, 1),
}
HIGHEST_PRICE = 1e6
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and bytes of the command that are not UTF-8


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison. `python compare.py --help` explains each field under its name.

    judge: names of judges; each is a model, pkg.module:function, or reward:DIR with a reward model
    length_anchor: csv files as `verdicts` writes them
    price: US dollars per million input and output tokens, one pair of numbers for all judges or one per judge
    sleep_time, timeout: seconds; rpm, tpm: calls and tokens per minute; max_cost: US dollars
    max_fail: share of the units that may end without a verdict, between 0 and 1

    Raises UserError, in one line, if a value cannot be used.
    """

    file: str
    file2: str | None = None
    candidate_key: str = "policy"
    baseline_key: str | None = None  # None: see `baseline`
    history_key: str = "prompt"
    max_comp: int | None = None
    seed: int = 0
    human: str | None = None
    length_anchor: tuple[str, ...] = ()
    judge: tuple[str, ...] = (DEFAULT_JUDGE,)
    judge_kind: str = "pairwise"
    base_url: str | None = None
    mode: str = "json"
    template: str | None = None
    order: str = "both"
    concurrency: int = 32
    sleep_time: float = 0.0
    rpm: float | None = None
    tpm: float | None = None
    timeout: float = 60.0
    price: tuple[tuple[float, float], ...] = ()
    max_cost: float | None = None
    max_fail: float = 0.01
    results_file: str = "results.jsonl"
    cache: str | None = None
    verdicts: str | None = None
    plot: str | None = None
    report: str | None = None
    export_feedback: str | None = None
    dry_run: bool = False
    stats_only: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_texts(self)
        _check_numbers(self)
        _check_judges(self)

    @property
    def baseline(self) -> str:
        """Key of the baseline's response: with a second file the candidate's, else that of the reference model."""
        return self.baseline_key or (self.candidate_key if self.file2 else "reference")

    @property
    def journal_directory(self) -> str:
        beside = os.path.dirname(self.results_file)
        return self.cache or os.path.join("" if beside.startswith(("/dev", "/proc")) else beside, "judgments")

    def changed(self) -> dict:
        """The fields whose values are not the defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


def _check_types(settings: Settings) -> None:
    """Check fields of one text or of true and false; numbers and tuples are checked below."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), field.type
        if isinstance(value, os.PathLike):
            raise UserError(f"{field.name}={value!r} is not a text; write {field.name}={os.fspath(value)!r}")
        if kind in (str, bool) or (isinstance(kind, UnionType) and str in kind.__args__):
            wanted = "true or false" if kind is bool else "a text"
            if not isinstance(value, kind):  # type: ignore[arg-type]
                raise UserError(f"{field.name}={value!r} is not {wanted}; give one")


def _check_texts(settings: Settings) -> None:
    if isinstance(settings.length_anchor, str):
        raise UserError(f"length_anchor={settings.length_anchor!r} is not a tuple; write ({settings.length_anchor!r},)")
    for name, value in vars(settings).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.strip():
                raise UserError(f"--{name} is empty; give a value, or leave it out")
            if isinstance(text, str) and UNUSABLE.search(text):
                raise UserError(f"--{name} {text!r:.80} has a character that no name has; correct it")
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            raise UserError(f"--{name} {value}: {did_you_mean(str(value), choices)}")
    feedback = settings.export_feedback
    if feedback is not None and not feedback.endswith(".jsonl"):
        raise UserError(f"--export_feedback {feedback} does not end in .jsonl, as training data does; name it .jsonl")


def _check_numbers(settings: Settings) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if value is None and getattr(Settings, name) is None:
            continue
        kind, wanted = (int, "a whole number") if name in WHOLE else (int | float, "a number")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"--{name} {value!r} is not {wanted}; give one")
        if not low <= value <= high:  # NaN is in no range
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:.7g}"
            raise UserError(f"--{name} {value} is not {limits}; give such a number, or leave it out")


def _check_judges(settings: Settings) -> None:
    """Check the number of judges and of prices."""
    names, prices = settings.judge, settings.price
    if isinstance(names, str) or not names:
        raise UserError(f"judge={names!r} is not a tuple of names; write judge=({names or DEFAULT_JUDGE!r},)")
    if not all(isinstance(name, str) for name in (*names, *settings.length_anchor)):
        raise UserError(f"judge={names!r}, length_anchor={settings.length_anchor!r}: not all are texts; give texts")
    if len(set(names)) < len(names):
        raise UserError(f"--judge {max(names, key=names.count)} is given twice; give each judge once")
    if prices and not all(isinstance(price, tuple | list) and len(price) == 2 for price in prices):
        raise UserError(f"price={prices!r} is not a tuple of (input, output); write price=((0.75, 4.5),)")
    for number in (number for price in prices for number in price):
        if not isinstance(number, int | float) or not 0 <= number <= HIGHEST_PRICE:
            raise UserError(f"--price {number} is not a price; give dollars per million tokens, as in 0.75,4.50")
    if len(prices) not in (0, 1, len(names)):
        raise UserError(f"--price is given {len(prices)} times for {len(names)} judges; give it once, or for each")
