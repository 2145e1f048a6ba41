"""Training steps that fail: a value that is not finite, or too little memory. Messages, and the examples to keep."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig, OmegaConf

from halos.errors import UserError
from halos.files import finished
from halos.tokens import TokenizedExample

MOST_SKIPPED = 10  # steps in a row that on_nonfinite=skip skips


class NotFinite(Exception):
    """A loss or a gradient is not finite. It is raised before it reaches the weights, on all ranks alike."""

    def __init__(self, what: str, examples: list[TokenizedExample]):
        super().__init__(f"{what} is not finite")
        self.what = what
        self.examples = examples


class Checks:
    """Conditions that must hold before the weights change. The device is asked for all of them in one transfer."""

    def __init__(self):
        self.fails: list[torch.Tensor] = []
        self.errors: list[Exception] = []

    def add(self, fails: torch.Tensor, error: Exception) -> None:
        """Raise this error at `settle` if `fails`, a bool of one value, is True."""
        self.fails.append(fails)
        self.errors.append(error)

    def finite(self, values: torch.Tensor, what: str, examples: list[TokenizedExample]) -> None:
        self.add(~torch.isfinite(values.detach()).all(), NotFinite(what, examples))

    def settle(self, *numbers: torch.Tensor) -> list[float]:
        """Raise the first error whose condition holds; return these numbers as floats. Waits for the device."""
        fails, errors = self.fails, self.errors
        self.fails, self.errors = [], []
        read = torch.stack([value.double() for value in (*fails, *numbers)]).tolist()
        for failed, error in zip(read, errors, strict=False):
            if failed:
                raise error
        return read[len(fails) :]


def write_examples(path: str, examples: list[TokenizedExample], tokenizer) -> None:
    texts = [
        {
            "prompt": tokenizer.decode(example.prompt),
            "responses": [tokenizer.decode(response) for response in example.responses],
            "ids": example.ids,
        }
        for example in examples
    ]
    with finished(path) as unfinished, open(unfinished, "w") as file:
        json.dump(texts, file, indent=1)


@contextmanager
def explained_out_of_memory(config: DictConfig, examples: list[TokenizedExample], size: str) -> Iterator[None]:
    """Turn an error about memory into a UserError with the tokens of the step, the peak, and what to change.

    size: the key of the number of examples that were run at a time
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a RuntimeError that starts with the place in its source.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        tokens = sum(example.n_tokens for example in examples)
        raise UserError(
            f"out of memory in a step of {tokens:,} tokens, at a peak of {peak_memory() / 2**30:.1f} GiB; lower "
            f"model.max_tokens_per_forward={config.model.max_tokens_per_forward}, which changes nothing but time, or "
            f"{size}={OmegaConf.select(config, size)}"
        ) from error


def peak_memory() -> int:
    """Return the most bytes that this process has had at a time: of its GPU, or of main memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
