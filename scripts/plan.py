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
    python scripts/plan.py hardware                           the table in README.md: the fewest GPUs for each model

How the numbers are computed is in halos/plan/.
"""

import math
import os
import sys
from typing import Any

from omegaconf import DictConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.commands import hydra_main, report_user_errors, take_words, whole_number  # noqa: E402
from halos.errors import UserError  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

OWN = {"gpus": "8", "gpu_memory": "80", "nodes": "", "forwards": "1"}


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
    elif words in (["table"], ["hardware"]):
        print(written_table(words[0]))
    else:
        print_plan()


def written_table(which: str) -> str:
    """A table of all models in config/model/, as it stands in the documentation."""
    from halos.plan.hardware import hardware
    from halos.plan.table import table

    return {"table": table, "hardware": hardware}[which](os.path.join(PROJECT, "config"))


def print_plan() -> None:
    with report_user_errors():
        own = own_values(take_words(OWN))

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


def own_values(texts: dict[str, str]) -> dict[str, Any]:
    """Values of the four words above; `nodes` is None if it is not given."""
    return {
        "gpus": whole_number("gpus", texts["gpus"], OWN["gpus"]),
        "forwards": whole_number("forwards", texts["forwards"], OWN["forwards"]),
        "nodes": whole_number("nodes", texts["nodes"], "1") if texts["nodes"] else None,
        "gpu_memory": amount("gpu_memory", texts["gpu_memory"]),
    }


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
