"""The classes that a configuration names: `DPOTrainer` of trainers.py, or `losses.dpo.IPOTrainer` of another file."""

import importlib
from types import ModuleType

from halos.errors import UserError, did_you_mean


def find(module: ModuleType, name: str) -> type:
    """Return the class with this name, which `component` has checked. A name with dots starts with its own module."""
    path, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(path) if path else module, attribute)


def component(module: ModuleType, name: str, base: type, key: str) -> type:
    """Return the class with this name. It must be a subclass of `base`. `key` is where it was configured."""
    path, _, attribute = name.rpartition(".")
    home = _imported(path, f"{key}={name}") if path else module
    found = getattr(home, attribute, None)
    if isinstance(found, type) and issubclass(found, base) and found is not base:
        return found
    usable = [n for n, c in vars(home).items() if isinstance(c, type) and issubclass(c, base) and c is not base]
    where = home.__name__ if hasattr(home, "__path__") else f"{home.__name__.replace('.', '/')}.py"
    problem = f"is not defined in {where}" if found is None else f"is not a subclass of {base.__name__} in {where}"
    raise UserError(f"{key}={name} {problem}; {did_you_mean(attribute, usable)}")


def _imported(path: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except (ModuleNotFoundError, ValueError, TypeError) as error:  # the last two: of names such as '..A'
        # A module that exists and cannot import another one has an error of its own.
        if isinstance(error, ModuleNotFoundError) and not f"{path}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{setting}: there is no module {path!r}; a name with dots is that of a file, as in losses.dpo.IPOTrainer"
        ) from None
