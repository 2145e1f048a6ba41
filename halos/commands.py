"""Command-line helpers: parse flags, run Hydra, and report errors.

A user's mistake is reported in one line, with exit code 2. A bug is reported with its traceback. Use `hydra_main` for a
program that Hydra configures (train.py), and `report_user_errors` with `FlagParser` for one with its own flags.
"""

import argparse
import functools
import gc
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from halos import dataset_specs, secrets
from halos.config_keys import OPTIONAL, command_words, flat, is_open, unknown_key
from halos.errors import Stopped, UserError, did_you_mean, disk_full, first_line

MOST_DIGITS = 6  # of a script's own numbers
FULL_ERROR = "HYDRA_FULL_ERROR"  # environment variable; with the value 1, a user's mistake shows its traceback too


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries in this block, without searching their objects for garbage, now or later.

    torch and transformers make 370,000 objects that stay to the end. Python would search them again and again while
    they are made, and then while data is read.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Report a UserError, a full disk or a Stopped run in one line and exit with its code; after Ctrl-C, exit with 130.

    If nobody reads the output any more, as in `--help | head -1`, exit with 141 and say nothing, as other programs do.
    All other exceptions pass through, with their traceback. No message has a key or a password in it.
    """
    full = os.environ.get(FULL_ERROR) == "1"
    try:
        try:
            with secrets.kept(*sys.argv[1:]):
                yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if full:
            raise
        _say("interrupted")
        sys.exit(130)
    except Stopped as stopped:
        _say(str(stopped))
        sys.exit(stopped.code)
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        mistake = error if isinstance(error, UserError) else disk_full(error)
        if full or mistake is None:
            raise
        _say(f"error: {mistake}")
        sys.exit(mistake.code)


class FlagParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, without printing the usage first."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def positive(kind: type, or_zero: bool = False) -> Callable[[str], int | float]:
    """Return an argparse type for numbers above zero. `kind` is int or float."""

    def number(text: str) -> int | float:
        value = kind(text)
        if not (value > 0 or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    number.__name__ = kind.__name__  # argparse shows this name if the text cannot be parsed as a number
    return number


def take_words(own: dict[str, str]) -> dict[str, str]:
    """Take a script's own key=value words out of sys.argv, before Hydra reads the others. Return their texts.

    own: key -> text if the word is not given
    """
    given = [word.partition("=") for word in sys.argv[1:] if word.partition("=")[0] in own]
    sys.argv[1:] = [word for word in sys.argv[1:] if word.partition("=")[0] not in own]
    return own | {key: text for key, _, text in given}


def whole_number(key: str, text: str, example: str, least: int = 1) -> int:
    """Return the number that the text of one of a script's own words is. example: a good value, for the remedy"""
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < least:
        shown, most = text[:50], 10**MOST_DIGITS - 1
        reason = f"is not a whole number of at least {least} (and at most {most})"
        raise UserError(f"{key}={shown} {reason}; use for example {key}={example}")
    return int(text)


def _say(message: str) -> None:
    sys.stdout.flush()
    line = " ".join(message.split())
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr, flush=True)


def hydra_main(config_path: str, config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate a task like `hydra.main`, but report every mistake in one line, whether Hydra or `validate` finds it.

    The path is relative to the file of the decorated function. In a sweep (-m), the jobs after a failed one still run.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def program() -> None:
            if os.environ.get(FULL_ERROR) == "1":
                return main(task)()
            failures: list[int | str | None] = []
            owner = os.getpid()
            with report_user_errors():
                _refuse_unknown_flags()
                dataset_specs.register(path, *_more_config_dirs())
                os.environ[FULL_ERROR] = "1"  # makes Hydra raise its errors instead of printing them
                try:
                    main(functools.wraps(task)(lambda config: _run_job(task, config, failures, owner)))()
                except BrokenPipeError:
                    raise
                except Exception as error:  # an error of Hydra's: _run_job catches those of the task
                    raise UserError(hydra_message(error)) from error
                finally:
                    os.environ.pop(FULL_ERROR, None)
            if failures:
                sys.exit(failures[0])

        path = os.path.join(os.path.dirname(os.path.abspath(inspect.getfile(task))), config_path)
        main = hydra.main(version_base="1.3", config_path=path, config_name=config_name)
        return program

    return decorate


def _run_job(
    task: Callable[[DictConfig], None], config: DictConfig, failures: list[int | str | None], owner: int
) -> None:
    """Run one job of a sweep, and report a failure at once.

    Hydra itself reports only the first failed job, and only at the end of the sweep.
    owner: id of the process of the command. A job in another process (hydra/launcher=submitit_slurm) reports its
        failure in its own log, and raises for the command, which does not see `failures` change
    """
    os.environ.pop(FULL_ERROR, None)  # processes that the task starts must not inherit our setting
    try:
        with report_user_errors():
            return task(config)
    except SystemExit as stop:
        code = stop.code
    except Exception:
        traceback.print_exc()
        code = 1
    finally:
        os.environ[FULL_ERROR] = "1"
    job = HydraConfig.get()
    # Under torchrun or srun, other ranks may still be in this job. If this rank started the next job, their
    # collectives would not match. So it exits.
    if OmegaConf.is_missing(job.job, "num") or code == 130 or "RANK" in os.environ:
        sys.exit(code)
    if code:
        failed = f"job #{job.job.num} failed: {' '.join(command_words())}"
        _say(failed)
        failures.append(code)
        if os.getpid() != owner:
            raise UserError(f"{failed}; the log of this job says why, and the other jobs went on")


def _more_config_dirs() -> list[str]:
    """Return the folder of --config-dir, if the command has one."""
    folder = _hydra_flags()[0].config_dir
    return [os.path.abspath(folder)] if folder else []


def _hydra_flags() -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the command, and the words that Hydra does not take. Wrong flags raise UserError."""
    # Private, because Hydra has no public list of its flags, and hydra.main parses and runs in one step.
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --hydra-help lists the flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_known_args()


def _refuse_unknown_flags() -> None:
    """Raise UserError for flags that Hydra does not have, before argparse prints its usage."""
    for word in _hydra_flags()[1]:
        if word.startswith("-"):
            raise UserError(f"{word} is not a flag; keys have no dashes (lr=1e-6), and --hydra-help lists the flags")
        raise UserError(f"{word} stands apart from the other key=value words; put flags such as -m before all of them")


def hydra_message(error: Exception) -> str:
    """Return one line that says what is wrong with the command, from Hydra's longer message."""
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: there is no config/{group}/{name}.yaml; {did_you_mean(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not key=value; write a list as key=[a,b], and quote odd text: 'key=\"a, b\"'"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}; correct the file"
    new_key = re.search(r"To append to your config use \+(.*?)=(.*)", text)
    if new_key and isinstance(cause, ConfigKeyError | ConfigAttributeError) and not new_key[1].startswith("hydra."):
        return _new_key_message(new_key[1], new_key[2], cause)
    if several := re.match(r"Ambiguous value for argument '(.*?)=(.*)'", text):
        key, value = several.groups()
        return f"{key}={value} has several values; write {key}=[{value}] for a list, or add -m for a run with each"
    for pattern, message in HYDRA_MESSAGES.items():
        if found := re.match(pattern, text):
            return found.expand(message)
    reasons = [first_line(e).rstrip(".") for e in (error, cause) if e is not None and str(e)]
    hint = "" if isinstance(error, HydraException | ValueError) else f" ({FULL_ERROR}=1 shows where)"
    return (": ".join(reasons) or type(error).__name__) + hint


HYDRA_MESSAGES = {
    r"Could not append to config. An item is already at '(.*)'": r"+\1: there is such a key already; leave out the +",
    r"Multiple values for (\w+)": r"+\1: there is a \1 already; leave out the +",
    r"Could not delete from config. '(.*)' does not exist": r"~\1: there is no key \1; leave it out",
    r"Sweep parameters '(.*)' requires --multirun": r"\1 stands for several runs; add -m to run them",
}


def _new_key_message(key: str, value: str, cause: ConfigKeyError | ConfigAttributeError) -> str:
    """Return the message about a key that Hydra does not know, written without ++.

    Most such keys are typing errors; a few are legal additions.
    """
    if is_open(f"{key}.") or key in OPTIONAL:
        return f"{key}={value} adds a key, which takes two plus signs; write ++{key}={value}"
    # Private, because OmegaConf has no public method that returns the root config of a node.
    root = cause.parent_node._get_root() if cause.parent_node is not None else {}
    known = [k for k in flat(root) if not k.startswith("hydra")]
    return unknown_key(cause.full_key if key in known and cause.full_key else key, value, known)
