"""Will it fit? Plan the memory and the traffic of each GPU: python scripts/plan.py model=llama13b gpus=8

Takes the words of the training command, and four of its own:

    gpus=8           GPUs of the run, one rank each
    gpu_memory=80    memory of each GPU in GB, as its vendor counts it (nearly GiB)
    nodes=N          machines that the GPUs are in; without it, one per 8 GPUs
    forwards=1       forward passes of each GPU per microbatch: more than 1 if its share of the examples has more
                     tokens than model.max_tokens_per_forward

    python scripts/plan.py loss=dpo model=llama65b gpus=64 hsdp_replicas=1
    python scripts/plan.py model=base_model model.name=own model.name_or_path=DIR model.max_tokens_per_forward=8192
    python scripts/plan.py table > docs/scaling_tables.md

How the numbers are computed is in halos/plan/.
"""

import math
import os
import sys
from typing import Any

from omegaconf import DictConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.commands import hydra_main, report_user_errors  # noqa: E402
from halos.errors import UserError  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

MOST_DIGITS = 6
OWN = {"gpus": "8", "gpu_memory": "80", "nodes": "", "forwards": "1"}


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
    elif words == ["table"]:
        from halos.plan.table import table

        print(table(os.path.join(PROJECT, "config")))
    else:
        print_plan(words)


def print_plan(words: list[str]) -> None:
    with report_user_errors():
        own = own_values(words)
    sys.argv[1:] = [word for word in words if key_of(word) not in OWN]

    @hydra_main(os.path.join(PROJECT, "config"), "config")
    def run(config: DictConfig) -> None:
        import dataloaders
        import trainers
        from halos.config import validate
        from halos.plan.report import report

        validate(config, trainers, dataloaders)
        print(report(config, **own))

    run()


#### WORDS


def own_values(words: list[str]) -> dict[str, Any]:
    """Values of the four words above; `nodes` is None if it is not given."""
    texts = OWN | {key_of(word): word.partition("=")[2] for word in words if key_of(word) in OWN}
    return {
        "gpus": whole_number("gpus", texts["gpus"]),
        "forwards": whole_number("forwards", texts["forwards"]),
        "nodes": whole_number("nodes", texts["nodes"]) if texts["nodes"] else None,
        "gpu_memory": amount("gpu_memory", texts["gpu_memory"]),
    }


def key_of(word: str) -> str:
    return word.partition("=")[0]


def whole_number(key: str, text: str) -> int:
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        shown, largest = text[:50], 10**MOST_DIGITS - 1
        raise UserError(
            f"{key}={shown} is not a whole number of at least 1 (and at most {largest}); use for example "
            f"{key}={OWN[key] or 1}"
        )
    return int(text)


def amount(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{key}={text} is not a number above 0; use for example {key}={OWN[key]}")
    return value


if __name__ == "__main__":
    main()
